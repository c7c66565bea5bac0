r"""The probability flow of a diffusion model, and the density that it carries.

A denoiser defines a flow without noise, in log-SNR λ

    dx/dλ = ½ √k (x̂_0 − √k x),      div = ½ (√k tr ∂x̂_0/∂x − k d),

which carries a density from λ_N, next to the prior, to λ_1, next to the data:

    log p(x at λ_1) = log N(x at λ_N; 0, I) + ∫_{λ_1}^{λ_N} div dλ.

It is solved from λ_1 to λ_N with a step of its own for every example. The trace is exact (by d
vector-Jacobian products) or Hutchinson's estimate zᵀJz, z = ±1 fixed along the path, whose
variance is 2(‖S‖² − Σ S_ii²) with S the symmetric part of J.

References:
    Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole 2021, section 4.3 and appendix D.
    Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud 2019, FFJORD (Hutchinson's trace).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.dormand_prince import Solution, integrate
from nelbo.errors import InputRefused
from nelbo.parameterizations import Mean
from nelbo.processes.base import along
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Prediction, Reverse, gaussian_process
from nelbo.schedules import Schedule, Stepped
from nelbo.spacing import Interpolated, time_at

CHUNK = 16
"""Vector-Jacobian products of one batched backward pass."""


@dataclass(frozen=True)
class Flow:
    """The probability flow of a model: its field, and the density that it carries.

    Arguments:
        model: as measured, but with a schedule that is defined at every time.
        tolerance: absolute and relative error allowed per step, of a state and of nats per
            dimension.
    """

    model: Reverse
    tolerance: float = 1e-5

    @classmethod
    def of(cls, model: Reverse, tolerance: float = 1e-5) -> Flow:
        """The flow of any Gaussian model; a chain is read between its steps (`Interpolated`).

        Raises:
            InputRefused: no Gaussian process, an output that is tied to the steps of its chain, or
                a chain that erases everything.
        """
        process = model.process
        if not isinstance(process, Gaussian):
            raise InputRefused(
                f"the probability flow is defined for Gaussian diffusion, not "
                f"{type(process).__name__}: bits have no density to carry"
            )
        if isinstance(model.parameterization, Mean):
            raise InputRefused(
                "a network that predicts the mean of the step before speaks of the steps of its "
                "chain only, and the flow goes between them: take epsilon, x0, velocity or levels"
            )
        schedule = process.schedule
        if isinstance(schedule, Stepped):
            schedule = Interpolated(schedule)
        parts = (model.network, model.parameterization, model.decoder_rule)
        return cls(Reverse(Gaussian(schedule), *parts), tolerance)

    @property
    def schedule(self) -> Schedule:
        """λ(t)."""
        return gaussian_process(self.model.process, "the probability flow").schedule

    def at(self, x: Tensor, t: Tensor) -> Prediction:
        """A network call in the network's own precision, and everything after it in float64."""
        weight = next(self.model.network.parameters(), x)
        output = self.model.network(x.to(weight.dtype), t, None).double()
        return Prediction(self.model, x, t, output)

    def log_density(
        self, x: Tensor, start: Tensor, end: Tensor | float, probes: Tensor | None = None
    ) -> tuple[Tensor, Solution]:
        """log p(x at λ = start), the prior being N(0, I) at λ = end.

        Arguments:
            x: (B, *shape) float64. start: () or (B,) log-SNR, above end.
            probes: (B, R, d) of ±1, fixed along each path; None: the exact trace.
        Returns:
            (B, R) nats, R = 1 for the exact trace, and the solution with its evaluations.
        """
        shape, flat = x.shape[1:], x.double().flatten(1)
        dims, width = flat.shape[1], 1 if probes is None else probes.shape[1]

        def field(rows: Tensor, logsnr: Tensor, state: Tensor) -> Tensor:
            here = state[:, :dims].reshape(-1, *shape)
            return self._slopes(here, logsnr, None if probes is None else probes[rows])

        state = torch.cat([flat, flat.new_zeros(len(flat), width)], 1)
        done = integrate(
            field,
            state,
            start,
            end,
            relative=self.tolerance,
            absolute=self.tolerance,
            norm=lambda error: _larger(error[:, :dims], error[:, dims:]),
        )
        last, volume = done.y[:, :dims], dims * done.y[:, dims:]
        prior = -0.5 * (last.square() + math.log(2 * math.pi)).sum(1)
        return prior[:, None] + volume, done

    @torch.enable_grad()
    def _slopes(self, x: Tensor, logsnr: Tensor, probes: Tensor | None) -> Tensor:
        """dx/dλ (b, d), and the divergence per dimension (b, R)."""
        x = x.detach().requires_grad_()
        x_0 = self.at(x, time_at(self.schedule, logsnr)).x_0
        trace = exact_trace(x_0, x) if probes is None else probed_trace(x_0, x, probes)
        keep = torch.sigmoid(logsnr)
        root, dims = keep.sqrt(), x[0].numel()
        rate = 0.5 * along(root, x) * (x_0 - along(root, x) * x)
        divergence = 0.5 * (root[:, None] * trace / dims - keep[:, None])
        return torch.cat([rate.flatten(1), divergence], 1).detach()


def _larger(states: Tensor, volumes: Tensor) -> Tensor:
    """The larger of the root mean square over dimensions and the worst log-volume."""
    return torch.maximum(states.square().mean(1).sqrt(), volumes.abs().amax(1))


def exact_trace(y: Tensor, x: Tensor) -> Tensor:
    """tr ∂y/∂x of every example, (B, 1), by d vector-Jacobian products.

    Arguments:
        y: (B, *shape), of which row b depends on x[b] alone. x: (B, *shape), requires grad.
    """
    count, dims = len(x), x[0].numel()
    total = x.new_zeros(count)
    for places in torch.arange(dims, device=x.device).split(CHUNK):
        unit = torch.zeros(len(places), 1, dims, dtype=x.dtype, device=x.device)
        unit.scatter_(2, places[:, None, None], 1.0)
        rows = _products(y, x, unit.expand(-1, count, -1))
        total = total + rows.gather(2, places[:, None, None].expand(-1, count, 1)).sum((0, 2))
    return total[:, None]


def probed_trace(y: Tensor, x: Tensor, probes: Tensor) -> Tensor:
    """zᵀ(∂y/∂x)z of every example and probe, (B, R).

    Arguments:
        probes: (B, R, d).
    """
    vectors = probes.transpose(0, 1)
    return (_products(y, x, vectors) * vectors).sum(2).T


def _products(y: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    """(m, B, d) vectors times the Jacobian of every example; the graph is kept for more."""
    # one by one: torch cannot batch the gradient of a normalisation of channels-last images
    seeds = vectors.reshape(len(vectors), *y.shape)
    found = [torch.autograd.grad(y, x, seed, retain_graph=True)[0] for seed in seeds]
    return torch.stack(found).flatten(2)
