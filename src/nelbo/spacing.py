"""Times by log-SNR: where a schedule reaches a given noise level, and grids even in log-SNR.

Solvers of the probability flow make errors that depend on steps in log-SNR. A grid even in time
can spend most of its steps where nothing happens, and cross half of the range in its last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nelbo.errors import InputRefused
from nelbo.schedules import LogSNRLinear, Schedule, Stepped

HALVINGS = 60
"""Bisections of [0, 1]: 1e-18, below the spacing of float64."""


class Interpolated(Schedule):
    """A chain read between its steps: log-SNR linear in t from i/T to (i+1)/T.

    The chain itself says nothing between its steps; neither does its network, which is then asked
    at times for which it was not trained.

    Arguments:
        chain: of T steps, the last of which keeps something.
    Raises:
        InputRefused: keep = 0 at the end: its log-SNR is −∞, and nothing leads there in finite λ.
    """

    def __init__(self, chain: Stepped) -> None:
        super().__init__()
        self.chain = chain
        if not bool(torch.isfinite(chain.table()).all()):
            raise InputRefused(
                "the last step of this chain erases everything (log-SNR −∞), so that the "
                "probability flow has no finite end; it is defined for chains whose last beta is "
                "below 1 (linear, cosine) and for continuous schedules"
            )

    def logsnr(self, t: Tensor) -> Tensor:
        table = self.chain.table()
        position = t.double().to(table.device) * len(table) - 1
        low = position.floor().clamp(0, max(len(table) - 2, 0)).long()
        high = (low + 1).clamp(max=len(table) - 1)
        return torch.lerp(table[low], table[high], position - low).to(t.device)

    def grid(self, steps: int) -> Tensor:
        return self.chain.grid(steps)


def time_at(schedule: Schedule, logsnr: Tensor) -> Tensor:
    """t with λ(t) = logsnr, by bisection; the ends of [0, 1] for what lies beyond them.

    Arguments:
        schedule: defined everywhere in [0, 1]: continuous, or an `Interpolated` chain.
        logsnr: float64, any shape.
    """
    if isinstance(schedule, LogSNRLinear):
        span = schedule.logsnr_min - schedule.logsnr_max
        return (logsnr - schedule.logsnr_max) / span
    low, high = torch.zeros_like(logsnr), torch.ones_like(logsnr)
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        above = schedule.logsnr(middle) > logsnr
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return 0.5 * (low + high)


def even_logsnr(schedule: Schedule, times: Tensor, steps: int) -> Tensor:
    """`steps` places of a grid (steps,), increasing, as near to even in log-SNR as there are.

    Arguments:
        times: (N,) the model's grid. First and last stay; where keep = 0 at the last time, the
            others are even without it.
        steps: 1 to N. One is the last time.
    """
    if steps == 1:
        return torch.tensor([len(times) - 1])
    logsnr = schedule.logsnr(times)
    erased = 0 if bool(torch.isfinite(logsnr[-1])) else 1
    inner, count = logsnr[: len(logsnr) - erased], steps - erased
    wanted = torch.linspace(0, 1, count, dtype=torch.float64)
    wanted = inner[0] + (inner[-1] - inner[0]) * wanted
    return torch.tensor(_nearest(inner, wanted) + [len(times) - 1] * erased)


def _nearest(logsnr: Tensor, wanted: Tensor) -> list[int]:
    """Increasing indices of a falling table, next to the wanted values, none twice."""
    found = (logsnr[None] - wanted[:, None]).abs().argmin(1).tolist()
    for k in range(1, len(found)):
        found[k] = max(found[k], found[k - 1] + 1)
    ceiling = len(logsnr) - 1
    for k in range(len(found) - 1, -1, -1):
        found[k], ceiling = min(found[k], ceiling), min(found[k], ceiling) - 1
    assert ceiling >= -1, "more times than the chain has"
    return found
