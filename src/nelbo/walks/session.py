"""One start of a training run: it continues, trains, saves, validates, logs, and stops if told."""

from __future__ import annotations

import math
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nelbo import checkpoint, console
from nelbo.design import enough
from nelbo.errors import InputRefused, exit_code
from nelbo.estimate import NATS
from nelbo.fewcalls import Plan
from nelbo.files import set_aside
from nelbo.recipes.recipe import Recipe
from nelbo.rundir import RunDirectory
from nelbo.trainer import Record, Trainer
from nelbo.walks.measuring import Request, measure, plan_of
from nelbo.walks.signals import Stop
from nelbo.walks.stored import PLAYER, best_step

LOG_POINTS = 400
"""Lines of training loss in metrics.jsonl, about."""


@dataclass
class Session:
    """One start of a run: trains, saves, validates, and remembers what to show."""

    directory: RunDirectory
    recipe: Recipe
    trainer: Trainer
    quiet: bool
    seconds: float = 0.0
    validation: dict[str, Any] | None = None
    losses: list[Record] = field(default_factory=list)
    mark: float = field(default_factory=time.monotonic)
    shown_loss: float = math.nan
    plan: Plan | None = None
    """The devices of the validation, once they were made."""
    logged: float = 0.0

    @property
    def model(self) -> Any:
        """The averaged model: what is measured and sampled."""
        return self.trainer.averages[PLAYER].module

    def status(self, state: str, code: int | None = None, message: str = "") -> None:
        seconds = round(self.seconds, 3)
        self.directory.status(
            state, self.trainer.step, self.trainer.steps, message, exit_code=code, seconds=seconds
        )

    def fail(self, error: BaseException) -> None:
        """Write down how this start ended; the way to a bug goes to log.txt."""
        code = exit_code(error)
        self.status("failed" if code < 128 else "stopped", code, str(error))
        if code == 1:
            self.directory.log("".join(traceback.format_exception(error)))

    # --- saving and continuing -------------------------------------------------------------

    def restore(self, resume: bool) -> None:
        """Load the newest valid checkpoint of a run that is continued."""
        root = self.directory.checkpoints
        if not resume or not checkpoint.steps(root):
            self.directory.rewind(0)
            self.save()  # a disk that cannot hold it is found out now
            return
        self.seconds = self.directory.seconds()
        step = self._load_newest()
        for newer, path in checkpoint.steps(root):
            if newer > step:
                set_aside(path)  # its step will be saved again; nothing is lost
        self.directory.rewind(step)
        console.say(f"continuing {self.directory.path} after step {step}")
        self.directory.log(f"continuing after step {step}")

    def _load_newest(self) -> int:
        """Load the newest checkpoint that is valid and fits; its step."""
        root, problems = self.directory.checkpoints, []
        for step, path in reversed(checkpoint.steps(root)):
            try:
                self._load(path, step)
            except InputRefused as error:
                problems.append(str(error))
                continue
            for problem in problems:
                console.say(f"skipped: {problem}")
                self.directory.log(f"skipped: {problem}")
            return step
        raise InputRefused("\n".join([f"{root}: holds no valid checkpoint", *problems]))

    def _load(self, path: Path, step: int) -> None:
        tensors = checkpoint.load(path).tensors
        expected = self.trainer.state_dict()
        for name in (PLAYER, f"{PLAYER}-ema"):
            checkpoint.check_tensors(tensors.get(name, {}), expected[name], str(path))
        if f"{PLAYER}-optimizer" not in tensors:
            raise InputRefused(f"{path}: {PLAYER}-optimizer.safetensors is missing")
        for name, group in self.trainer.carried_state().items():
            checkpoint.check_tensors(tensors.get(name, {}), group, str(path / name))
        self.trainer.load_state_dict(tensors, step)

    def save(self) -> None:
        """A checkpoint of now; then keep the best and the last."""
        root = self.directory.checkpoints
        info = {"step": self.trainer.step, "validation": self.validation}
        path = checkpoint.step_path(root, self.trainer.step)
        if not path.exists():
            checkpoint.save(path, self.trainer.state_dict(), info)
        best = best_step(self.directory)
        newest = [step for step, _ in checkpoint.steps(root)][-self.recipe.options.keep :]
        checkpoint.prune(root, {self.trainer.step, *newest, *(() if best is None else (best,))})
        self.status("running")

    # --- the loop --------------------------------------------------------------------------

    def train(self, stop: Stop) -> int:
        """Train to the end, or to a signal; returns the exit code."""
        options, trainer = self.recipe.options, self.trainer
        self.mark = time.monotonic()
        with console.Meter("train", trainer.steps, "steps", self.quiet) as meter:
            for record in trainer:
                self._count()
                self.losses.append(record)
                meter.update(record.step, self._note())
                last = record.step == trainer.steps
                self.validation = None
                if options.validate_every and (record.step % options.validate_every == 0 or last):
                    self.validate()
                if record.step % max(1, trainer.steps // LOG_POINTS) == 0 or last:
                    self._log()
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
        """The bound of the averaged model on the validation part; the same draws every time."""
        if len(self.recipe.dataset.validation) < 2:
            return
        calls = enough(len(self.recipe.dataset.validation), self.recipe.options.validate_calls)
        request = Request("validation", calls, seed=0, quiet=True)
        # controls must know the schedule of the very model that is measured: it may be learned
        subject = replace(self.recipe, model=self.model)
        if self.plan is None:  # the same data every time: what is fitted to them is kept
            self.plan = plan_of(subject, request)
        (result,) = measure(subject, [self.model], request, plan=self.plan)
        estimate = result.estimates()["total"].bits_per_dim(self.recipe.dataset.dims)
        self.validation = estimate.as_json()
        row = {"step": self.trainer.step, "seconds": round(self.seconds, 3)}
        self.directory.metric({**row, "validation": self.validation})
        if not self.quiet:
            rate = f"{self.trainer.step} of {self.trainer.steps} steps"
            console.say(f"{rate}: validation bound {estimate}, loss {self._shown()}")
        self.mark = time.monotonic()

    def _loss(self) -> float:
        """Mean loss since the last line: bits/dim of the bound, else as the objective has it."""
        mean = math.fsum(r.losses[PLAYER] for r in self.losses) / len(self.losses)
        if self.recipe.objective.unit != NATS:
            return mean
        return (mean + self.recipe.dataset.offset()) / (self.recipe.dataset.dims * math.log(2))

    def _shown(self) -> str:
        unit = " bits/dim" if self.recipe.objective.unit == NATS else ""
        return f"{self.shown_loss:.3f}{unit}"

    def _note(self) -> str:
        value = self._loss() if self.losses else self.shown_loss
        decay = 0.0 if math.isnan(self.shown_loss) else 0.98
        self.shown_loss = value if not decay else decay * self.shown_loss + (1 - decay) * value
        return f"loss {self._shown()}"

    def _log(self) -> None:
        record = self.losses[-1]
        examples = sum(r.examples for r in self.losses)
        seconds = self.seconds - self.logged
        self.logged = self.seconds
        self.directory.metric(
            {
                "step": record.step,
                "loss": self._loss(),
                "grad_norm": record.grad_norms[PLAYER] / self.recipe.dataset.dims,
                "lr": record.rate,
                "examples_per_second": examples / max(seconds, 1e-9),
                "seconds": round(self.seconds, 3),
            }
        )
        self.losses.clear()
