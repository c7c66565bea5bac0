r"""Every term of every example, each with its own draw: N network calls per example.

One replicate of a long grid is enough: its noise is read off the roughness of neighbouring terms.
The decoder term is drawn twice at least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.bound import prior_term
from nelbo.drawing import Drawer, Integrand
from nelbo.estimate import Estimate

SHORT = 64
"""Grids up to this length are measured twice by default: their terms bend too much to tell noise
from their roughness."""


@dataclass(frozen=True)
class Terms:
    """The terms of n examples, nats, float64.

    Arguments:
        prior: (n, models). pairs: (n, N−1, R, models). decoder: (n, R', models), R' ≥ 2.
        logsnr: (N,) of the grid.
    """

    prior: Tensor
    pairs: Tensor
    decoder: Tensor
    logsnr: Tensor

    def combined(self, weights: Tensor) -> Terms:
        """A linear combination of the models, as if it were one."""
        parts = (self.prior, self.pairs, self.decoder)
        prior, pairs, decoder = ((part @ weights)[..., None] for part in parts)
        return Terms(prior, pairs, decoder, self.logsnr)

    def values(self, offset: float) -> dict[str, Tensor]:
        """(n,) by term, of the first model; the offset belongs to the reconstruction."""
        table = {
            "prior": self.prior[:, 0],
            "diffusion": self.pairs[..., 0].sum(1).mean(1),
            "reconstruction": self.decoder[..., 0].mean(1) + offset,
        }
        table["total"] = table["prior"] + table["diffusion"] + table["reconstruction"]
        return table

    def estimates(self, offset: float) -> dict[str, Estimate]:
        """By term, of the first model, with se and se_mc."""
        diffusion, decoder = self.pairs[..., 0].sum(1), self.decoder[..., 0] + offset
        prior = self.prior[:, 0]
        known = total_known = None
        if diffusion.shape[1] == 1:
            noise = roughness(self.pairs[:, :, 0, 0])
            known = _error_of(noise)
            total_known = _error_of(noise + decoder.var(1) / decoder.shape[1])
        total = prior[:, None] + diffusion + decoder
        return {
            "prior": Estimate.of(prior, exact=True),
            "diffusion": Estimate.of(diffusion, se_mc_known=known),
            "reconstruction": Estimate.of(decoder),
            "total": Estimate.of(total, se_mc_known=total_known),
        }

    def integrand(self, most: int = 200) -> Integrand | None:
        """Neighbouring pairs averaged to at most `most` points (their noise is independent)."""
        pairs, logsnr = self.pairs[..., 0].mean(2), self.logsnr
        # a last step that erases everything ends at log-SNR −∞ and has no density
        pairs, logsnr = pairs[:, logsnr[1:].isfinite()], logsnr[logsnr.isfinite()]
        if pairs.shape[1] == 0:
            return None
        density = pairs / (logsnr[:-1] - logsnr[1:])
        centre = 0.5 * (logsnr[:-1] + logsnr[1:])
        size = math.ceil(len(centre) / most)
        grouped = [density[:, a : a + size].mean(1) for a in range(0, len(centre), size)]
        values = torch.stack(grouped, 1)
        where = torch.stack([centre[a : a + size].mean() for a in range(0, len(centre), size)])
        spread = values.std(0) if len(values) > 1 else torch.full_like(where, math.nan)
        return Integrand(where, values.mean(0), spread / math.sqrt(len(values)))


def _error_of(variances: Tensor) -> float:
    """Standard error of a mean from the variance of each of its members."""
    return float(variances.sum().sqrt() / len(variances))


def every_term(drawers: list[Drawer], replicates: int) -> Terms:
    """All N terms, `replicates` times; with one replicate the decoder is drawn twice."""
    drawer = drawers[0]
    n, models = len(drawer.times), len(drawers)
    calls = float(max(replicates * n, n + 1))
    parts = [_batch(drawers, x_0, rows, replicates, calls) for rows, x_0 in drawer.batches()]
    widths: list[tuple[int, ...]] = [
        (models,),
        (n - 1, replicates, models),
        (max(replicates, 2), models),
    ]
    prior, pairs, decoder = (drawer.collect([p[k] for p in parts], widths[k]) for k in range(3))
    logsnr = drawer.model.process.schedule.logsnr(drawer.times).cpu()
    return Terms(prior, pairs, decoder, logsnr)


def _batch(
    drawers: list[Drawer], x_0: Tensor, rows: Tensor, replicates: int, calls: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, models = len(drawers[0].times), len(drawers)
    pairs = torch.empty(len(rows), n - 1, replicates, models, dtype=torch.float64)
    decoder = torch.empty(len(rows), max(replicates, 2), models, dtype=torch.float64)
    for r in range(decoder.shape[1]):
        decoder[:, r] = _drawn(drawers, x_0, rows, 0, r)
    for r in range(replicates):
        for i in range(1, n):
            pairs[:, i - 1, r] = _drawn(drawers, x_0, rows, i, r)
            drawers[0].tick(calls)
    prior = torch.stack([prior_term(d.model, x_0, d.times).cpu() for d in drawers], 1)
    return prior, pairs, decoder


def _drawn(drawers: list[Drawer], x_0: Tensor, rows: Tensor, i: int, r: int) -> Tensor:
    """(B, models) term i, all models at one x_t."""
    index = torch.tensor(i)
    x_t = drawers[0].latent(x_0, rows, drawers[0].times[index], "full", r, i)
    return torch.stack([d.value(x_t, x_0, index) for d in drawers], 1)


def roughness(pairs: Tensor) -> Tensor:
    """(n,) Monte-Carlo variance of Σ_i term_i from one independent draw of each.

    Second differences (a − 2b + c)²/6 of neighbouring terms have the variance of one of them as
    their mean, plus a little where the expected terms bend: on the safe side.

    Arguments:
        pairs: (n, N−1); nan with fewer than three pairs.
    """
    if pairs.shape[1] < 3:
        return torch.full((len(pairs),), math.nan, dtype=torch.float64)
    second = pairs[:, :-2] - 2 * pairs[:, 1:-1] + pairs[:, 2:]
    return (second**2).mean(1) / 6 * pairs.shape[1]
