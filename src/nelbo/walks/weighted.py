"""`nelbo evaluate --importance M`: the importance-weighted bound, never without M and its ESS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nelbo import console
from nelbo.estimate import Estimate
from nelbo.likelihood import ImportanceWeighted, importance_weighted
from nelbo.recipes.recipe import Subject


@dataclass(frozen=True)
class Weighing:
    """How many trajectories, and how they are drawn."""

    draws: int
    seed: int = 0
    batch: int = 512
    quiet: bool = False
    device: str = "cpu"


def measure(subject: Subject, rows: Tensor, weighing: Weighing) -> ImportanceWeighted:
    """Weigh joint trajectories of every row, with progress on stderr.

    Arguments:
        rows: (n, *shape) as stored.
    """
    with console.Meter("importance weights", 1, "calls", weighing.quiet) as meter:
        return importance_weighted(
            subject.model.to(weighing.device),
            subject.dataset.encode(rows[:]),
            subject.times,
            weighing.draws,
            seed=weighing.seed,
            batch=weighing.batch,
            offset=subject.dataset.offset(),
            device=weighing.device,
            track=lambda done, total: meter.update(done, total=total),
        )


def entry(found: ImportanceWeighted, dims: int) -> dict[str, Any]:
    """The JSON object: L_M with M, effective sample sizes, and L_m for m = 1, 2, 4, ..."""
    sizes = {"median": found.ess.median(), "mean": found.ess.mean(), "least": found.ess.min()}
    return {
        "importance": {
            **_figure(found.draws, found.estimate(), dims),
            "ess": {name: _finite(float(size)) for name, size in sizes.items()},
            "curve": [_figure(m, estimate, dims) for m, estimate in found.curve()],
            "statement": found.describe(dims),
        }
    }


def _figure(draws: int, estimate: Estimate, dims: int) -> dict[str, Any]:
    bits = _finite(estimate.mean / math.log(2))
    value = estimate.bits_per_dim(dims).as_json()
    return {"draws": draws, **value, "mean_bits_per_example": bits}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def arrays(found: ImportanceWeighted) -> dict[str, Tensor]:
    """(n,) L_M in nats and the effective sample size of every example."""
    return {"importance": found.values, "importance_ess": found.ess}


def lines(value: dict[str, Any]) -> str:
    """The object as a statement and a table for people."""
    found = value["importance"]
    keys = (("mean", 4), ("se", 4), ("se_mc", 4), ("mean_bits_per_example", 2))
    rows = [
        [f"L_M, M = {point['draws']}", *(_number(point[key], digits) for key, digits in keys)]
        for point in found["curve"]
    ]
    table = console.table(rows, ["trajectories", "bits/dim", "± se", "± se_mc", "bits/example"])
    return f"{found['statement']}\n\n{table}"


def _number(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:.{digits}f}"
