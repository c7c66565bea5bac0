"""One start of a training run: it continues, trains, saves, validates, logs, and stops if told."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nelbo import checkpoint, console, distributed, sharding
from nelbo.errors import InputRefused, RankLost, exit_code
from nelbo.files import set_aside
from nelbo.recipes.groups import Start
from nelbo.rundir import RunDirectory
from nelbo.trainer import Trainer
from nelbo.walks.signals import Stop
from nelbo.walks.stored import best_step
from nelbo.walks.watch import Watch

State = Mapping[str, Mapping[str, Tensor]]
LOG_POINTS = 400
"""Lines of training loss in metrics.jsonl, about."""


@dataclass
class Session:
    """One start of a run: trains, saves, validates, and remembers what to show."""

    directory: RunDirectory
    options: Start
    trainer: Trainer
    watch: Watch
    seconds: float = 0.0
    validation: dict[str, Any] | None = None
    mark: float = field(default_factory=time.monotonic)
    logged: float = 0.0
    examples: int = 0

    @property
    def quiet(self) -> bool:
        """Whether nothing is said on stderr."""
        return self.options.quiet

    def status(self, state: str, code: int | None = None, message: str = "") -> None:
        seconds = round(self.seconds, 3)
        self.directory.status(
            state, self.trainer.step, self.trainer.steps, message, exit_code=code, seconds=seconds
        )

    def fail(self, error: BaseException) -> None:
        """Write down how this start ended; the way to a bug goes to log.txt.

        What was done before another rank failed is saved, where it is whole.
        """
        trainer = self.trainer
        whole = trainer.settled and trainer.share == 1 and not trainer.carried_state()
        if isinstance(error, RankLost) and whole:
            self._write(self.trainer.state_dict())
        code = exit_code(error)
        self.status("failed" if code < 128 else "stopped", code, str(error))
        if code == 1:
            self.directory.log("".join(traceback.format_exception(error)))

    # --- saving and continuing -------------------------------------------------------------

    def restore(self, resume: bool) -> None:
        """Load the newest valid checkpoint of a run that is continued."""
        root = self.directory.checkpoints
        if not resume or not distributed.on_main(lambda: bool(checkpoint.steps(root))):
            self.directory.rewind(0)
            self._align()
            self.save()  # a disk that cannot hold it is found out now
            return
        self.seconds = self.directory.seconds()
        expected = self.trainer.state_dict()  # of parts: all ranks bring it together
        step = distributed.on_main(lambda: self._load_newest(expected))
        if not distributed.is_main():
            self._load(checkpoint.step_path(root, step), step, expected)
        distributed.on_main(lambda: self._set_aside(step))
        self._align()
        self.directory.rewind(step)
        console.say(f"continuing {self.directory.path} after step {step}")
        self.directory.log(f"continuing after step {step}")

    def _set_aside(self, step: int) -> None:
        for newer, path in checkpoint.steps(self.directory.checkpoints):
            if newer > step:
                set_aside(path)  # its step will be saved again; nothing is lost

    def _align(self) -> None:
        """All ranks begin with the weights of the first one, to the last bit."""
        for player in self.trainer.players:
            distributed.same(sharding.plain(player.module.state_dict().values()))

    def _load_newest(self, expected: State) -> int:
        """Load the newest checkpoint that is valid and fits; its step."""
        root, problems = self.directory.checkpoints, []
        for step, path in reversed(checkpoint.steps(root)):
            try:
                self._load(path, step, expected)
            except InputRefused as error:
                problems.append(str(error))
                continue
            for problem in problems:
                console.say(f"skipped: {problem}")
                self.directory.log(f"skipped: {problem}")
            return step
        raise InputRefused("\n".join([f"{root}: holds no valid checkpoint", *problems]))

    def _load(self, path: Path, step: int, expected: State) -> None:
        tensors = checkpoint.load(path).tensors
        for player in self.trainer.players:
            averages = [f"{player.name}-ema"] if player.averaged else []
            for name in (player.name, *averages):
                checkpoint.check_tensors(tensors.get(name, {}), expected[name], str(path))
            if f"{player.name}-optimizer" not in tensors:
                raise InputRefused(f"{path}: {player.name}-optimizer.safetensors is missing")
        for name, group in self.trainer.carried_state().items():
            checkpoint.check_tensors(tensors.get(name, {}), group, str(path / name))
        self.trainer.load_state_dict(tensors, step)

    def save(self) -> None:
        """A checkpoint of now; then keep the best and the last. All ranks come here."""
        state = self.trainer.state_dict()
        distributed.on_main(lambda: self._write(state))

    def _write(self, state: State) -> None:
        if not distributed.is_main():
            return
        root = self.directory.checkpoints
        info = {"step": self.trainer.step, "validation": self.validation}
        path = checkpoint.step_path(root, self.trainer.step)
        if not path.exists():
            checkpoint.save(path, state, info)
        best = best_step(self.directory)
        newest = [step for step, _ in checkpoint.steps(root)][-self.options.keep :]
        checkpoint.prune(root, {self.trainer.step, *newest, *(() if best is None else (best,))})
        self.status("running")

    # --- the loop --------------------------------------------------------------------------

    def train(self, stop: Stop) -> int:
        """Train to the end, or to a signal; returns the exit code."""
        options, trainer = self.options, self.trainer
        self.mark = time.monotonic()
        with console.Meter("train", trainer.steps, "steps", self.quiet) as meter:
            for record in trainer:
                self._count()
                self.examples += record.examples
                meter.update(record.step, self.watch.note(record))
                last = record.step == trainer.steps
                self.validation = None
                if options.validate_every and (record.step % options.validate_every == 0 or last):
                    self.validate()
                if record.step % max(1, trainer.steps // LOG_POINTS) == 0 or last:
                    self._log(record.rate)
                stop.agree()
                if stop.signal is not None or last or record.step % options.save_every == 0:
                    self.save()
                if stop.signal is not None:
                    break
        return 0 if stop.signal is None else self._stopped(stop)

    def _count(self) -> None:
        now = time.monotonic()
        self.seconds += now - self.mark
        self.mark = now

    def _stopped(self, stop: Stop) -> int:
        text = f"stopped by signal {stop.signal} after step {self.trainer.step}; saved"
        self.status("stopped", stop.exit_code, text)
        self.directory.log(text)
        console.say(f"{text}. Continue with --resume")
        return stop.exit_code

    def validate(self) -> None:
        """A look at the validation part, written down."""
        self.trainer.settle()
        found = self.watch.validate()
        if found is None:
            return
        self.validation = found.kept
        row = {"step": self.trainer.step, "seconds": round(self.seconds, 3)}
        self.directory.metric({**row, **found.row})
        if not self.quiet:
            console.say(f"{self.trainer.step} of {self.trainer.steps} steps: {found.text}")
        self.mark = time.monotonic()

    def _log(self, rate: float) -> None:
        self.trainer.settle()  # what has failed is not written down as a loss
        seconds = self.seconds - self.logged
        self.logged = self.seconds
        self.directory.metric(
            {
                "step": self.trainer.step,
                **self.watch.row(),
                "lr": rate,
                "examples_per_second": self.examples / max(seconds, 1e-9),
                "seconds": round(self.seconds, 3),
            }
        )
        self.examples = 0
