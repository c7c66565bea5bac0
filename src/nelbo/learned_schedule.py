r"""A learned log-SNR of continuous time: end points and shape are parameters.

    λ(t) = λ_max − s C(t),   s = softplus(fall),   C(t) = ∫_0^t K softmax(rise)_{⌊K u⌋} du,

so that C is piecewise linear from 0 to 1 and λ falls whatever the parameters are.

The bound of continuous time depends on λ_max and λ_min = λ_max − s alone: they follow its
gradient. The shape C moves no bits, only the variance of an estimate from one draw of t, and
follows the gradient of E[loss²]. One backward pass gives both: with ℓ_b the loss of example b, the
gradient that reaches C at t_b is multiplied by 2 ℓ_b, since ∂ℓ_b² = 2 ℓ_b ∂ℓ_b, and the one that
reaches the end points is not.

References:
    Kingma, Salimans, Poole, Ho 2021, Variational diffusion models, section 5, appendix I.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from nelbo.schedules import LogSNRLinear, Smooth


class Weights:
    """Factors of the gradients of a batch, known only after the losses are."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.factor: Tensor | None = None

    def settle(self, losses: Tensor) -> None:
        """Give the losses (B,) whose squares the shape is to lower."""
        self.factor = 2 * losses

    def hook(self, gradient: Tensor) -> Tensor:
        """The gradient of the squares from that of the losses."""
        assert self.factor is not None, "losses must be settled before the backward pass"
        return gradient * self.factor.to(gradient)


class LearnedLogSNR(Smooth):
    """End points and shape are parameters; float64.

    Arguments:
        start: the schedule to begin with.
        hold_max: leave λ_max where it is. A density has no best one: the nearer to the data it is
            read, the finer the grain that a model can put its mass on.
        cells: K, pieces of the shape.
    """

    top: Tensor

    def __init__(self, start: LogSNRLinear, hold_max: bool = False, cells: int = 32) -> None:
        super().__init__()
        top = torch.tensor(start.logsnr_max, dtype=torch.float64)
        if hold_max:
            self.register_buffer("top", top)
        else:
            self.top = nn.Parameter(top)
        span = start.logsnr_max - start.logsnr_min
        fall = torch.tensor(span + math.log(-math.expm1(-span)), dtype=torch.float64)
        self.fall = nn.Parameter(fall)
        self.rise = nn.Parameter(torch.zeros(cells, dtype=torch.float64))
        self._weights: Weights | None = None

    def ends(self) -> tuple[Tensor, Tensor]:
        """λ_max and λ_min."""
        return self.top, self.top - softplus(self.fall)

    def logsnr(self, t: Tensor) -> Tensor:
        place, cell = self._cell(t)
        share = self.rise.softmax(0)
        start = share.cumsum(0) - share
        fallen = self._hooked(start[cell] + share[cell] * (place - cell), place)
        return (self.top - softplus(self.fall) * fallen).to(t.device)

    def slope(self, t: Tensor) -> Tensor:
        place, cell = self._cell(t)
        steepness = self._hooked(len(self.rise) * self.rise.softmax(0)[cell], place)
        return (-softplus(self.fall) * steepness).to(t.device)

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Position in cells, and the cell."""
        place = t.to(self.rise.device).double() * len(self.rise)
        return place, place.detach().floor().long().clamp(0, len(self.rise) - 1)

    def _hooked(self, value: Tensor, place: Tensor) -> Tensor:
        weights = self._weights
        if weights is None or not value.requires_grad:
            return value
        if value.shape == (weights.batch,):
            value.register_hook(weights.hook)
        else:
            still = (place == 0) | (place == len(self.rise))
            assert bool(still.all()), "whose gradient the shape gets is known for whole batches"
        return value

    @contextmanager
    def routed(self, batch: int) -> Iterator[Weights]:
        """Inside, λ and λ′ at times (B,) send the shape the gradient of the squared losses.

        Every other shape of t must be where C does not move, at 0 or 1.
        """
        self._weights = Weights(batch)
        try:
            yield self._weights
        finally:
            self._weights = None
