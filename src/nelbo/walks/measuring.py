"""Measure: the bounds of a subject's models on a part of its data, with progress on stderr."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nelbo import console
from nelbo.data.part import head
from nelbo.evaluation import Evaluation
from nelbo.evaluation import measure as measure_bounds
from nelbo.fewcalls import Plan, Target
from nelbo.recipes.recipe import Subject
from nelbo.reverse import Reverse
from nelbo.walks import devices

PILOT = 2048
"""Training examples from which the design of a few-call evaluation may draw."""


@dataclass(frozen=True)
class Request:
    """What to measure."""

    split: str = "test"
    calls: float | None = None
    seed: int = 0
    batch: int = 512
    limit: int | None = None
    quiet: bool = False
    importance: int | None = None
    """Joint trajectories per example of the importance-weighted bound."""
    pilot: int = PILOT
    without: frozenset[str] = frozenset()
    """Devices of a few-call evaluation that are switched off."""
    until: float | None = None
    """The error at which to stop, in bits/dim, of the kind `error`."""
    error: str = "se_mc"

    def few(self, latents: int) -> bool:
        """Whether this is not the full bound."""
        return latents > 1 and (self.until is not None or self.calls is not None)


def measure(
    subject: Subject,
    models: list[Reverse],
    request: Request,
    title: str = "evaluate",
    plan: Plan | None = None,
) -> list[Evaluation]:
    """The bounds of models on a part of the subject's data, with progress on stderr.

    Two models are measured on the same draws, and their difference is the third result.

    Arguments:
        plan: the devices of a few-call evaluation, if they were made before; see `plan_of`.
    """
    dataset = subject.dataset
    rows = head(getattr(dataset, request.split), request.limit)
    pilot = dataset.train[: request.pilot]
    tensors = [*models[0].parameters(), *models[0].buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")  # an exact denoiser has none
    if plan is None:
        plan = plan_of(subject, request)
    with console.Meter(title, 1, "calls", request.quiet) as meter:
        progress = _Progress(meter, dataset.dims)
        return measure_bounds(
            models,
            rows,
            subject.times,
            encode=dataset.encode,
            calls=None if request.until is not None else request.calls,
            until=_target(request, dataset.dims, progress),
            pilot=pilot,
            plan=plan,
            batch=request.batch,
            seed=request.seed,
            offset=dataset.offset(),
            device=device,
            track=progress.track,
        )


def plan_of(subject: Subject, request: Request) -> Plan | None:
    """The devices of a few-call evaluation, which cost a fit to the training data; else None."""
    if not request.few(len(subject.times)):
        return None
    dataset = subject.dataset
    rows = head(getattr(dataset, request.split), request.limit)
    return devices.plan_of(subject, rows, dataset.train[: request.pilot], request.without)


@dataclass
class _Progress:
    """What the meter shows: calls, and the error that was reached."""

    meter: console.Meter
    dims: int
    note: str = ""

    def track(self, done: int, total: int) -> None:
        self.meter.update(done, self.note, total)

    def report(self, calls: float, error: float) -> None:
        self.note = f"error {error / (self.dims * math.log(2)):.5f} bits/dim"


def _target(request: Request, dims: int, progress: _Progress) -> Target | None:
    if request.until is None:
        return None
    nats = request.until * dims * math.log(2)
    return Target(nats, request.error, request.calls, progress.report)
