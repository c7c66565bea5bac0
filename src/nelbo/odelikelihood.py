r"""The likelihood of the probability flow: of another model than the one that the bound scores.

`Flow` carries a density between λ_N and λ_1. What lies between data and x_1, d dimensions:

    none          −log p(√k_1 x_0) − (d/2) log k_1: the density of x_1/√k_1 at a real vector x_0;
    uniform       the same at x_0 + u, u uniform in the bin, minus d log(bin width);
    variational   −log p_θ(x_0|x_1) + log q(x_1|x_0) − log p(x_1), x_1 ~ q(x_1|x_0).

The first is exact. The other two are bounds on −log P(x_0) in expectation over their draws; the
decoder p_θ(x_0|x_1) is the model's own.

References:
    Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole 2021, section 4.3 and appendix D.
    Ho, Chen, Srinivas, Duan, Abbeel 2019, Flow++, section 3.1 (dequantisation).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nelbo.bound import prior_term
from nelbo.distributions import per_example
from nelbo.errors import UsageError
from nelbo.estimate import Estimate
from nelbo.flow import Flow
from nelbo.processes.base import along
from nelbo.randomness import generator
from nelbo.reverse import Reverse

Dequantise = Literal["none", "uniform", "variational"]
Track = Callable[[int, int], None]


@dataclass(frozen=True)
class Measure:
    """How the likelihood is measured.

    Arguments:
        dequantise: how x_0 gets to λ_1; see the module.
        levels: n of discrete data at 2j/(n−1) − 1, None for real vectors.
        draws: of u or x_1 per example; 1 for "none".
        probes: Hutchinson probes per draw, None: the exact trace.
        batch: paths that are followed together.
    """

    dequantise: Dequantise = "none"
    levels: int | None = None
    draws: int = 1
    probes: int | None = None
    tolerance: float = 1e-5
    batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dequantise == "none" and self.levels is not None:
            raise UsageError(
                "data with levels have no density: take --dequantise variational or uniform"
            )
        if self.dequantise == "uniform" and self.levels is None:
            raise UsageError(
                "real vectors have no bins to fill: take --dequantise none or variational"
            )
        if self.dequantise == "none" and self.draws != 1:
            raise UsageError("--draws: without dequantisation nothing is drawn; leave it out")


@dataclass(frozen=True)
class FlowLikelihood:
    """−log p of every example, nats, float64.

    Arguments:
        values: (n, draws, probes); one probe stands for the exact trace as well.
        evaluations: (n, draws) evaluations of the field, each one network call and its gradients.
        prior: (n,) KL(q(x_N|x_0)‖N(0, I)), the mismatch at the far end.
    """

    values: Tensor
    evaluations: Tensor
    prior: Tensor
    measure: Measure

    def estimate(self) -> Estimate:
        """Nats per example; se_mc from the draws, or from the probes where nothing is drawn."""
        if self.measure.dequantise != "none":
            return Estimate.of(self.values.mean(2))
        if self.measure.probes is not None:
            return Estimate.of(self.values[:, 0])
        return Estimate.of(self.values[:, 0, 0], exact=True)

    def probe_error(self) -> float:
        """The part of se_mc that the probes make: 0 for an exact trace, nan for one probe."""
        n, draws, probes = self.values.shape
        if self.measure.probes is None:
            return 0.0
        if probes == 1:
            return math.nan
        return math.sqrt(float(self.values.var(2).mean()) / (n * draws * probes))


def ode_likelihood(
    model: Reverse,
    x_0: Tensor,
    times: Tensor,
    measure: Measure,
    *,
    offset: float = 0.0,
    track: Track = lambda done, total: None,
) -> FlowLikelihood:
    """−log p(x_0) of the probability flow between the first and the last of `times`.

    Arguments:
        x_0: (n, *shape) on the model's scale. times: (N,) of which the ends count.
        offset: nats per example to add (densities in other units).
        track: told the number of paths done and in all.
    Raises:
        InputRefused: a model without a flow. NumericalFailure: a path cannot be followed.
    """
    flow = Flow.of(model, measure.tolerance)
    was_training = model.training
    model.eval()
    try:
        paths = torch.arange(len(x_0) * measure.draws)
        parts = []
        for some in paths.split(measure.batch):
            parts.append(_follow(flow, x_0, some, times, measure))
            track(int(some[-1]) + 1, len(paths))
    finally:
        model.train(was_training)
    values = torch.cat([part[0] for part in parts]) + offset
    evaluations = torch.cat([part[1] for part in parts])
    with torch.no_grad():
        prior = prior_term(model, x_0.double(), times).cpu()
    shape = (len(x_0), measure.draws)
    return FlowLikelihood(values.reshape(*shape, -1), evaluations.reshape(shape), prior, measure)


@torch.no_grad()
def _follow(
    flow: Flow, x_0: Tensor, paths: Tensor, times: Tensor, measure: Measure
) -> tuple[Tensor, Tensor]:
    """−log p (b, R) and evaluations (b,) of some paths, path = example·draws + draw."""
    rows = paths // measure.draws
    here = x_0[rows.to(x_0.device)].double()
    x_1, correction = _first_latent(flow, here, paths, times[0], measure)
    ends = flow.schedule.logsnr(times[[0, -1]]).to(x_1)
    probes = None if measure.probes is None else _probes(here, paths, measure)
    value, done = flow.log_density(x_1, ends[0], ends[1], probes)
    return (correction[:, None] - value).cpu(), done.evaluations.cpu()


def _first_latent(
    flow: Flow, x_0: Tensor, paths: Tensor, t_1: Tensor, measure: Measure
) -> tuple[Tensor, Tensor]:
    """x_1 (b, *shape) and what is to be added to −log p(x_1), (b,) nats."""
    log_keep, dims = flow.schedule.log_keep(t_1), x_0[0].numel()
    keep = along((0.5 * log_keep).exp(), x_0)
    change = (-0.5 * dims * log_keep).to(x_0).expand(len(x_0))
    if measure.dequantise == "none":
        return keep * x_0, change
    if measure.dequantise == "uniform":
        assert measure.levels is not None
        width = 2 / (measure.levels - 1)
        noise = _drawn(torch.rand, x_0, paths, measure) - 0.5
        return keep * (x_0 + width * noise), change - dims * math.log(width)
    lose = along((0.5 * flow.schedule.log_lose(t_1)).exp(), x_0)
    x_1 = keep * x_0 + lose * _drawn(torch.randn, x_0, paths, measure)
    forward = flow.model.process.marginal(x_0, t_1).log_prob(x_1)
    decoder = flow.at(x_1, t_1).decoder().log_prob(x_0)
    return x_1, per_example(forward) - per_example(decoder)


def _drawn(kind: Callable[..., Tensor], x_0: Tensor, paths: Tensor, measure: Measure) -> Tensor:
    """One draw per path from a stream of its own, like x_0."""
    streams = (generator(measure.seed, "flow", "draw", *_name(p, measure)) for p in paths.tolist())
    shape = x_0.shape[1:]
    return torch.stack([kind(shape, dtype=x_0.dtype, generator=g) for g in streams]).to(x_0)


def _probes(x_0: Tensor, paths: Tensor, measure: Measure) -> Tensor:
    """(b, R, d) of ±1, from a stream of its own for every path."""
    assert measure.probes is not None
    shape, made = (measure.probes, x_0[0].numel()), []
    for path in paths.tolist():
        stream = generator(measure.seed, "flow", "probe", *_name(path, measure))
        made.append(torch.randint(2, shape, generator=stream))
    return (2 * torch.stack(made) - 1).to(x_0)


def _name(path: int, measure: Measure) -> tuple[int, int]:
    """(example, draw): what a stream of randomness is called after."""
    return divmod(path, measure.draws)
