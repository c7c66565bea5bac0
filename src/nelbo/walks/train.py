"""Train: from options to a run directory that holds a model, its bound, samples and a report."""

from __future__ import annotations

import json
import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nelbo import checkpoint, console, report
from nelbo.data.loading import batch_indices
from nelbo.errors import InputRefused
from nelbo.files import set_aside
from nelbo.objectives import Vlb
from nelbo.recipes.build import build
from nelbo.recipes.options import Options, name_of, stored
from nelbo.recipes.recipe import Recipe
from nelbo.rundir import RunDirectory, default_path
from nelbo.samplers import Ancestral
from nelbo.trainer import Player, Rate, Record, Trainer
from nelbo.walks import evaluate as evaluating
from nelbo.walks import sample as sampling
from nelbo.walks.signals import Stop
from nelbo.walks.stored import PLAYER, Stored, best_step, check_data, device_of, options_of

LOG_POINTS = 400
"""Lines of training loss in metrics.jsonl, about."""


def run(options: Options, arguments: list[str]) -> int:
    """`nelbo train`: returns the exit code."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    directory = RunDirectory(options.out or default_path(name_of(options)))
    recipe = _begin(directory, options, arguments)
    device = device_of(options.device)
    session = Session(directory, recipe, trainer_of(recipe, device), options.quiet)
    directory.environment(device)
    try:
        with Stop() as stop:
            session.restore(options.resume)
            code = session.train(stop)
        if code == 0:
            session.finish(device, options.json)
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        session.status("failed", code, str(error))
        raise
    finally:
        directory.release()
    return code


def _begin(directory: RunDirectory, options: Options, arguments: list[str]) -> Recipe:
    """A new directory, or with --resume the one that exists."""
    if options.resume and directory.path.exists():
        directory.open()
        directory.lock()
        recipe = build(options_of(directory))
        check_data(directory, recipe)
        _say_ignored(options, recipe)
        return recipe
    recipe = build(options)
    # refuse data that cannot fill a batch before anything is written
    batch_indices(len(recipe.dataset.train), options.batch, options.seed, 0)
    parameters = sum(p.numel() for p in recipe.model.parameters())
    about = {
        "recipe": recipe.name,
        "options": stored(options),
        "data": recipe.dataset.record,
        "model": {"parameters": parameters, "description": recipe.description},
    }
    directory.create(about, arguments)
    return recipe


def _say_ignored(options: Options, recipe: Recipe) -> None:
    """With --resume the run keeps its own options; say so if others were typed."""
    if name_of(options) != recipe.name:
        raise InputRefused(f"the run to resume is of the recipe {recipe.name}")
    before, now = stored(recipe.options), stored(options)
    defaults = stored(type(options)(**({"path": options.path} if "path" in now else {})))  # type: ignore[attr-defined]
    typed = sorted(k for k in now if now[k] != before[k] and now[k] != defaults[k])
    if typed:
        console.say(f"--resume keeps the options of the run; ignored: {', '.join(typed)}")


def trainer_of(recipe: Recipe, device: str) -> Trainer:
    """The trainer of a recipe; batches and noise are functions of (seed, step)."""
    options, dataset = recipe.options, recipe.dataset
    model = recipe.model.to(device)
    if options.compile:
        model.network.compile()

    def batch(step: int) -> Tensor:
        rows = batch_indices(len(dataset.train), options.batch, options.seed, step)
        return dataset.encode(dataset.train[rows]).to(device)

    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.rate,
        betas=(0.9, options.beta2),
        weight_decay=options.weight_decay,
        fused=True,
    )
    player = Player(PLAYER, model, optimizer, lambda x_0: recipe.objective(model, x_0))
    return Trainer(
        [player],
        batch,
        Rate(options.rate, options.steps, options.warmup, options.decay),
        steps=options.steps,
        seed=options.seed,
        ema=options.ema,
        clip=None if options.clip is None else options.clip * dataset.dims,
        accumulation=options.accumulation,
        autocast=_autocast(device) if options.bf16 else None,
    )


def _autocast(device: str) -> Any:
    def context() -> AbstractContextManager[None]:
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)

    return context


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

    # --- saving and continuing -------------------------------------------------------------

    def restore(self, resume: bool) -> None:
        """Load the newest valid checkpoint of a run that is continued."""
        root = self.directory.checkpoints
        if not resume or not checkpoint.steps(root):
            self.save()  # a disk that cannot hold it is found out now
            return
        self.seconds = self.directory.seconds()
        step, loaded, problems = checkpoint.newest_valid(root)
        for problem in problems:
            console.say(f"skipped: {problem}")
            self.directory.log(f"skipped: {problem}")
        where = str(checkpoint.step_path(root, step))
        expected = self.trainer.state_dict()
        for name in (PLAYER, f"{PLAYER}-ema"):
            checkpoint.check_tensors(loaded.tensors.get(name, {}), expected[name], where)
        self.trainer.load_state_dict(loaded.tensors, step)
        for newer, path in checkpoint.steps(root):
            if newer > step:
                set_aside(path)  # its step will be saved again; nothing is lost
        console.say(f"continuing {self.directory.path} after step {step}")
        self.directory.log(f"continuing after step {step}")

    def save(self) -> None:
        """A checkpoint of now; then keep the best and the last."""
        root = self.directory.checkpoints
        info = {"step": self.trainer.step, "validation": self.validation}
        path = checkpoint.step_path(root, self.trainer.step)
        if not path.exists():
            checkpoint.save(path, self.trainer.state_dict(), info)
        best = best_step(self.directory)
        checkpoint.prune(root, {self.trainer.step} | (set() if best is None else {best}))
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
                if stop.signal is not None and not last:
                    return self._stopped(stop)
        return 0

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
        calls = self.recipe.options.validate_calls
        request = evaluating.Request("validation", calls, seed=0, quiet=True)
        result = evaluating.measure(self.recipe, self.model, request)
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
        if not isinstance(self.recipe.objective, Vlb):
            return mean
        return (mean + self.recipe.dataset.offset()) / (self.recipe.dataset.dims * math.log(2))

    def _shown(self) -> str:
        unit = " bits/dim" if isinstance(self.recipe.objective, Vlb) else ""
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

    # --- after the last step ---------------------------------------------------------------

    def finish(self, device: str, as_json: bool) -> None:
        """Measure, sample, report, print."""
        stored_run = Stored(self.directory, self.recipe, self.trainer.step, {})
        options = self.recipe.options
        request = evaluating.Request("test", options.calls, options.seed, quiet=self.quiet)
        result = evaluating.measure(self.recipe, self.model, request)
        extra = evaluating.truth(self.recipe, request)
        value = evaluating.write(stored_run, request, result, extra)
        times = self.recipe.times
        samples, strip = sampling.draw(
            self.recipe,
            self.model,
            options.samples,
            Ancestral(),
            times,
            options.seed,
            device,
            self.quiet,
            batch=options.samples,
        )
        sampling.write(
            stored_run, self.directory.samples, samples, strip, times, options.seed
        )
        self.status("finished", 0)
        page = report.write(self.directory.path)
        if as_json:
            print(json.dumps({**value, "run": str(self.directory.path)}, indent=1))
        else:
            print(evaluating.lines(value))
            print(f"\nreport: {page}")

