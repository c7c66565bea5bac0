r"""Second-order ways back along the probability flow: deterministic, and with few network calls.

Both follow the flow of DDIM with η = 0 and start where it does; the error of N steps falls as 1/N²
instead of 1/N. Neither is the p_θ that the bound measures. With λ = log-SNR and h = (λ_s − λ_t)/2,

    DPM-Solver++ (data prediction):  x_s = √(l_s/l_t) x_t + √k_s (1 − e^{−h}) x̂_0(x_t)  + second,
    second = √k_s (1 − e^{−h}) d/2   or   √k_s ((e^{−h} − 1)/h + 1) d,   d = (h/h_r) Δx̂_0,

with h_r and Δx̂_0 from the step before: one network call per step. Heun's rule on du/dτ = ε̂,
u = x/√k, τ = e^{−λ/2}, takes two calls per step and no memory.

References:
    Lu, Zhou, Bao, Chen, Li, Zhu 2022, DPM-Solver++, algorithm 2 and appendix A.
    Karras, Aittala, Aila, Laine 2022, Elucidating the design space, algorithm 1.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nelbo.processes.base import along
from nelbo.reverse import Reverse, gaussian_process
from nelbo.samplers import DDIM, Sampler, State
from nelbo.schedules import Schedule, Stepped

SHORT = 15
"""Walks with fewer network calls end in a first-order step, as diffusers has it."""


class History(NamedTuple):
    """What a multistep method remembers: the prediction before, its log-SNR, and calls so far."""

    x_0: Tensor | None = None
    logsnr: Tensor | None = None
    calls: int = 0


class DPMSolverPP(Sampler):
    """DPM-Solver++, multistep, in the data prediction; order 2 is known as "2M".

    Arguments:
        order: 1 (DDIM with η = 0, written for x̂_0) or 2.
        kind: the form of the second-order term, "midpoint" or "heun".
        final: the last step ends at the data ("zero": x̂_0) or at the noise of the schedule's first
            time ("sigma_min").
    """

    def __init__(
        self,
        order: Literal[1, 2] = 2,
        kind: Literal["midpoint", "heun"] = "midpoint",
        final: Literal["zero", "sigma_min"] = "zero",
    ) -> None:
        if order not in (1, 2) or kind not in ("midpoint", "heun"):
            raise ValueError(f"order {order!r} of kind {kind!r}: take 1 or 2, midpoint or heun")
        if final not in ("zero", "sigma_min"):
            raise ValueError(f"final {final!r}: take zero or sigma_min")
        self.order = order
        self.kind = kind
        self.final = final

    def init(self, model: Reverse, x_t: Tensor) -> History:
        gaussian_process(model.process, "DPM-Solver++")
        return History()

    def step(
        self, model: Reverse, x_t: Tensor, t: Tensor, s: Tensor, state: State
    ) -> tuple[Tensor, State]:
        return self._step(model, x_t, t, s, state, self.order)

    def finish(self, model: Reverse, x_1: Tensor, t_1: Tensor, state: State) -> Tensor:
        if self.final == "zero":
            return model.predict(x_1, t_1)
        schedule = gaussian_process(model.process, "DPM-Solver++").schedule
        first = first_time(schedule).to(t_1)
        order = 1 if state.calls + 1 < SHORT else self.order
        return self._step(model, x_1, t_1, first, state, order)[0]

    def _step(
        self, model: Reverse, x_t: Tensor, t: Tensor, s: Tensor, state: History, order: int
    ) -> tuple[Tensor, History]:
        q = model.process.schedule
        x_0, now, target = model.predict(x_t, t), q.logsnr(t), q.logsnr(s)
        h = 0.5 * (target - now)
        carried = (0.5 * (q.log_lose(s) - q.log_lose(t))).exp()
        keep, gained = (0.5 * q.log_keep(s)).exp(), -torch.expm1(-h)
        x_s = along(carried, x_t) * x_t + along(keep * gained, x_t) * x_0
        if order == 2 and state.x_0 is not None and state.logsnr is not None:
            # after a start at keep = 0 the step before was infinite, and the ratio is 0
            ratio = h / (0.5 * (now - state.logsnr))
            weight = 0.5 * gained if self.kind == "midpoint" else 1 - gained / h
            x_s = x_s + along(keep * weight * ratio, x_t) * (x_0 - state.x_0)
        return x_s, History(x_0, now, state.calls + 1)


class Heun(Sampler):
    """Heun's second-order rule on du/dτ = ε̂(x, τ); two calls per step, one at the end (Euler).

    The first step is Euler's as well where it starts at keep = 0, for u is not defined there.
    """

    def step(
        self, model: Reverse, x_t: Tensor, t: Tensor, s: Tensor, state: State
    ) -> tuple[Tensor, State]:
        q = gaussian_process(model.process, "Heun").schedule
        at = model.at(x_t, t)
        noise = at.noise()
        keep, lose = (along((0.5 * v).exp(), x_t) for v in (q.log_keep(s), q.log_lose(s)))
        euler = keep * at.x_0 + lose * noise
        if not bool(torch.isfinite(q.logsnr(t))):
            return euler, state
        # √k_s (τ_t − τ_s)/2 times the change of ε̂: u itself is large near the prior and cancels
        gap = 0.5 * (0.5 * q.log_keep(s)).exp() * ((-0.5 * q.logsnr(t)).exp() - root(q, s))
        return euler - along(gap, x_t) * (model.at(euler, s).noise() - noise), state

    def finish(self, model: Reverse, x_1: Tensor, t_1: Tensor, state: State) -> Tensor:
        return model.predict(x_1, t_1)


def root(schedule: Schedule, t: Tensor) -> Tensor:
    """τ = √(lose/keep) = e^{−λ/2}."""
    return (-0.5 * schedule.logsnr(t)).exp()


def first_time(schedule: Schedule) -> Tensor:
    """The time next to the data: 1/T of a chain, 0 of a continuous schedule."""
    if isinstance(schedule, Stepped):
        return schedule.times([0])[0]
    return torch.zeros((), dtype=torch.float64)


def sampler_named(name: str, eta: float) -> Sampler:
    """The deterministic samplers of the command line: ddim (unless eta is above 0), dpmpp, heun.

    Raises:
        KeyError: no such sampler.
    """
    kinds = {"ddim": DDIM(eta), "dpmpp": DPMSolverPP(), "heun": Heun()}
    return kinds[name]
