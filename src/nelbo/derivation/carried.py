"""Flows whose density is known: the exact denoiser of a Gaussian mixture drives them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nelbo.data.mixture import GaussianMixture
from nelbo.decoders import Density
from nelbo.flow import Flow
from nelbo.parameterizations import X0
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.schedules import LogSNRLinear, Schedule

STEPS = 2e-5
"""Nats; the steps of the flow are held to a twentieth of it."""


class Denoiser(nn.Module):
    """E[x_0|x_t] of a mixture."""

    def __init__(self, data: GaussianMixture, schedule: Schedule) -> None:
        super().__init__()
        self.data, self.schedule = data, schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.data.denoise(x_t, self.schedule.keep(t), self.schedule.lose(t))


def exact_flow(data: GaussianMixture, high: float, low: float) -> Flow:
    """The flow of the exact denoiser between these log-SNRs."""
    schedule = LogSNRLinear(high, low)
    model = Reverse(Gaussian(schedule), Denoiser(data, schedule), X0(), Density())
    return Flow.of(model, STEPS / 20)
