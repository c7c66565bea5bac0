"""Learning rates by update."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """Learning rate by update: linear warm-up, then constant or a half cosine to zero.

    Arguments:
        peak: rate after the warm-up. steps: updates in all. warmup: updates of the warm-up.
        decay: "cosine" or "constant".
    """

    peak: float
    steps: int
    warmup: int = 0
    decay: str = "cosine"

    def __call__(self, step: int) -> float:
        """The rate of the update with 0-based number `step`."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.decay == "constant":
            return self.peak
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
