r"""The bound on every subset of a grid, and in continuous time, from one error curve.

With M_t = E‖x_0 − x̂_0(x_t)‖²/d, a variance σ² that depends on times alone, and s < t

    E KL(q(x_s|x_t,x_0) ‖ p_θ(x_s|x_t)) = (d/2) [expm1(δ) − δ + k_s c² M_t/σ²],  δ = log β̃ − log σ²
                                        = (d/2) (snr_s − snr_t) M_t              for σ² = β̃,
                                        = (d/2) log(1 + (snr_s − snr_t) M_t)     for the best σ²,

so N calls per example, one at every time, give the expected cost of all N(N−1)/2 pairs; the same
calls give the decoder term at every time, should it be the first. A refined grid tends to

    L_∞ = prior + decoder + ½ ∫ E‖ε − ε̂‖² dλ = prior + decoder + (d/2) ∫ M d snr

between the same end points, with a gap of O(1/N). All are means over the examples of the curve,
and carry the error of these.

References:
    Kingma, Salimans, Poole, Ho 2021, Variational diffusion models, section 4 (continuous time);
    Watson, Ho, Norouzi, Chan 2021 (subsets); Bao, Li, Zhu, Zhang 2022 (the best σ²).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nelbo.bound import decoder_term, prior_term
from nelbo.decoders import Constant, Density, Discretized, Following
from nelbo.distributions import expm1_minus, per_example
from nelbo.drawing import Drawer
from nelbo.errors import NumericalFailure
from nelbo.estimate import Estimate
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Decoder, Prediction, Reverse, gaussian_process
from nelbo.schedules import even
from nelbo.subsets import Subsets, best_subsets
from nelbo.variances import Optimal, Variance
from nelbo.windows import chebyshev, lagrange, neighbours

NODES = 7
"""Variances at which a decoder that follows the first pair is measured, at every first time."""
WIDTH, DECODER_WIDTH = 0.25, 0.1
"""Reach in log-SNR of the means over neighbouring times, of the error and of the decoder term."""


@dataclass(frozen=True)
class Curve:
    """What one call at every time says of m examples, float64.

    Arguments:
        times: (N,). process: the forward process.
        error: (m, N) ‖x_0 − x̂_0‖²/d. prior: (m,) nats.
        decoder: (m, N) nats, the decoder term at every time; or (m, N, W) at W variances where
            it follows the first pair.
        dims: d. offset: nats per example of a density's units.
    """

    times: Tensor
    process: Gaussian
    error: Tensor
    prior: Tensor
    decoder: Tensor
    dims: int
    offset: float = 0.0

    def smoothed(self) -> Curve:
        """The curve with means over neighbouring times, of (1 + snr) M_t and of the decoder term.

        Both change little over a quarter of a unit of log-SNR, their noise much. A search among
        all grids would pick the times whose error was drawn too small, and promise too much.
        """
        logsnr = self.process.schedule.logsnr(self.times)
        scale = 1 + logsnr.exp()
        return dataclasses.replace(
            self,
            error=neighbours(self.error * scale, logsnr, WIDTH) / scale,
            decoder=neighbours(self.decoder, logsnr, DECODER_WIDTH),
        )

    def optimal(self) -> Optimal:
        """The best scalar variance of every pair."""
        return Optimal(self.times, self.error.mean(0))

    def values(self, variance: Variance, kept: Tensor) -> Tensor:
        """(m,) nats: the bound of the chain of `kept` places, by example of the curve.

        Arguments:
            variance: a rule that depends on times alone. kept: (K,) increasing, the last N−1.
        """
        pair = _pairs(self.process, variance, self.times[kept[:-1]], self.times[kept[1:]])
        diffusion = pair.excess.sum() + self.error[:, kept[1:]] @ pair.slope
        return self.prior + self.offset + self._decoder(kept) + self.dims * diffusion

    def predicted(self, variance: Variance, kept: Tensor) -> Estimate:
        """The mean of `values`; se is that of the examples of the curve and their noise."""
        return Estimate.of(self.values(variance, kept))

    def continuous(self) -> Tensor:
        """(m,) nats: the limit of refined grids between the first and the last time."""
        return self._ends() + self._integral(torch.arange(len(self.times)))

    def resolution(self) -> float:
        """How far `continuous` may be off, nats: a third of what half of its trapezoids change."""
        every = torch.arange(len(self.times))
        half = even(len(every), max(len(every) // 2, 2))
        both = (self._integral(k).mean() for k in (every, half))
        fine, coarse = (float(v) for v in both)
        return abs(fine - coarse) / 3

    def richardson(self, variance: Variance) -> tuple[Tensor, Tensor]:
        """(m,) L_∞ by extrapolation from the grid and its half, and how far the grid is above it.

        The gap falls like 1/(N−1), so the two bounds tell it. The result is no bound.
        """
        count = len(self.times)
        half = even(count, (count + 1) // 2)
        fine, coarse = (self.values(variance, k) for k in (torch.arange(count), half))
        ratio = (count - 1) / (len(half) - 1)
        gap = (coarse - fine) / (ratio - 1)
        return fine - gap, gap

    def costs(self, variance: Variance) -> Tensor:
        """(N, N) nats: the expected divergence of every pair s < t, infinite elsewhere."""
        count, mean = len(self.times), self.error.mean(0)
        table = torch.full((count, count), torch.inf, dtype=torch.float64)
        for i in range(count - 1):
            later = self.times[i + 1 :]
            pair = _pairs(self.process, variance, self.times[i].expand_as(later), later)
            table[i, i + 1 :] = self.dims * (pair.excess + pair.slope * mean[i + 1 :])
        return table

    def first(self) -> Tensor:
        """(N,) nats: the decoder term at every time; (N, N) where it depends on the second one."""
        mean = self.decoder.mean(0)
        if mean.dim() == 1:
            return mean
        count = len(self.times)
        table = torch.full((count, count), torch.inf, dtype=torch.float64)
        for i in range(count - 1):
            table[i, i + 1 :] = self._basis(i, torch.arange(i + 1, count)) @ mean[i]
        return table

    def subsets(self, variance: Variance, most: int) -> Subsets:
        """The best grids of all sizes up to `most`."""
        return best_subsets(self.costs(variance), self.first(), most)

    def _decoder(self, kept: Tensor) -> Tensor:
        """(m,) nats, at the first of the kept times."""
        i = int(kept[0])
        if self.decoder.dim() == 2:
            return self.decoder[:, i]
        assert len(kept) > 1
        return self.decoder[:, i] @ self._basis(i, kept[1:2])[0]

    def _ends(self) -> Tensor:
        return self.prior + self.offset + self._decoder(torch.arange(len(self.times)))

    def _integral(self, kept: Tensor) -> Tensor:
        """(m,) nats: ½ ∫ ‖ε − ε̂‖² dλ by trapezoids over the kept times."""
        schedule = self.process.schedule
        logsnr = schedule.logsnr(self.times[kept])
        snr, error = logsnr.exp(), self.error[:, kept]
        noise = snr * error
        over_logsnr = (logsnr[:-1] - logsnr[1:]) * (noise[:, :-1] + noise[:, 1:])
        over_snr = (snr[:-1] - snr[1:]) * (error[:, :-1] + error[:, 1:])
        # a last step that erases everything has no width in λ, but one in the snr
        parts = torch.where(logsnr[1:].isfinite(), over_logsnr, over_snr)
        return 0.25 * self.dims * parts.sum(1)

    def _basis(self, i: int, seconds: Tensor) -> Tensor:
        """(P, W) weights of the W measured variances for first pairs (i, second)."""
        low, high = _range(self.process, self.times, i)
        s = self.times[i].expand(len(seconds))
        log_variance = self.process.pair(s, self.times[seconds]).log_posterior
        width = self.decoder.shape[2]
        place = (2 * log_variance - low - high) / max(high - low, 1e-12)
        # the ends of the range may come out beside it by a rounding
        return lagrange(place.clamp(-1, 1), width)


class _Pairs(NamedTuple):
    """Nats per dimension of a pair: excess + slope M_t, (P,) each."""

    excess: Tensor
    slope: Tensor


def _pairs(process: Gaussian, variance: Variance, s: Tensor, t: Tensor) -> _Pairs:
    assert not variance.learned
    pair = process.pair(s, t)
    log_variance = variance.between(pair, None, pair.log_posterior)
    excess = 0.5 * expm1_minus(pair.log_posterior - log_variance)
    return _Pairs(excess, 0.5 * (2 * pair.from_data.log() - log_variance).exp())


# --- a decoder that follows the first pair -------------------------------------------------------


def follows(decoder: Decoder) -> bool:
    """Whether the decoder's variance depends on the first pair of a grid."""
    return isinstance(decoder, Density | Discretized) and isinstance(decoder.edge, Following)


def _range(process: Gaussian, times: Tensor, i: int) -> tuple[float, float]:
    """log β̃ of the pairs (i, i+1) and (i, N−1), between which all first pairs of i lie."""
    ends = torch.stack([times[i + 1], times[-1]])
    low, high = process.pair(times[i].expand(2), ends).log_posterior.tolist()
    return low, high


def _decoder_terms(at: Prediction, x_0: Tensor, times: Tensor, i: int) -> Tensor:
    """(B,) or (B, W) nats: the decoder term at the time i, under its rule or at W variances."""
    rule = at.model.decoder_rule
    if not follows(rule):
        return decoder_term(at, x_0)
    assert isinstance(rule, Density | Discretized)
    if i == len(times) - 1:
        return torch.full((len(x_0), NODES), math.nan, dtype=torch.float64)
    process = gaussian_process(at.model.process, "the error curve")
    low, high = _range(process, times, i)
    found = []
    for node in chebyshev(NODES).tolist():
        edge = Constant(0.5 * (low + high + node * (high - low)))
        found.append(-per_example(rule.with_edge(edge).distribution(at).log_prob(x_0)))
    return torch.stack(found, 1)


# --- measuring -----------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    model: Reverse,
    data: Tensor,
    times: Tensor,
    *,
    encode: Callable[[Tensor], Tensor] = lambda y: y,
    batch: int = 512,
    seed: int = 0,
    offset: float = 0.0,
    device: str | torch.device = "cpu",
    track: Callable[[int, int], None] = lambda done, total: None,
) -> Curve:
    """Measure the error curve: N calls per example, one draw at every time.

    Arguments:
        data: (m, *shape) stored training examples, m ≥ 2; `encode` turns them into the model's
            scale. The other arguments are those of `evaluation.evaluate`.
    Raises:
        ValueError: the process is not Gaussian.
        NumericalFailure: an error of the network is not finite.
    """
    gaussian_process(model.process, "the error curve")
    was_training = model.training
    model.eval()
    try:
        drawer = Drawer(model, data, encode, times, batch, seed, device, track)
        parts = [_batch(drawer, rows, x_0) for rows, x_0 in drawer.batches()]
    finally:
        model.train(was_training)
    count = len(times)
    wide = (count, NODES) if follows(model.decoder_rule) else (count,)
    widths: list[tuple[int, ...]] = [(count,), wide, ()]
    error, decoder, prior = (drawer.collect([p[k] for p in parts], widths[k]) for k in range(3))
    bad = (~error.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise NumericalFailure(
            f"the network's error at {len(bad)} examples is not finite, the first ones {bad[:8]}"
        )
    process = on_cpu(gaussian_process(model.process, "the error curve"))
    return Curve(times.cpu(), process, error, prior, decoder, data[0].numel(), offset)


def on_cpu(process: Gaussian) -> Gaussian:
    """A copy of the process as it is now, on the CPU, where curves live."""
    return copy.deepcopy(process).cpu().requires_grad_(False)


def _batch(drawer: Drawer, rows: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    times, error, decoder = drawer.times, [], []
    for i, t in enumerate(times):
        x_t = drawer.latent(x_0, rows, t, "curve", i)
        at = drawer.model.at(x_t, t)
        square = per_example((x_0 - at.x_0).double() ** 2) / x_0[0].numel()
        error.append(square.cpu())
        decoder.append(_decoder_terms(at, x_0, times, i).cpu())
        drawer.done += len(rows)
        drawer.tick(len(times))
    prior = prior_term(drawer.model, x_0, times).cpu()
    return torch.stack(error, 1), torch.stack(decoder, 1), prior
