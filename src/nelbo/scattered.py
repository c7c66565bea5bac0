"""Where the bits are along log-SNR, from the scattered terms of a few-call evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from nelbo.drawing import Integrand
from nelbo.fewcalls import FewCalls

MOST = 40


def scattered(few: FewCalls, weights: Tensor) -> Integrand | None:
    """The integrand in bins of the grid, mean and error: a picture, not an estimate to add up.

    Within a bin terms are weighted by 1/p; None if no bin has two of them.
    """
    pair = torch.cat([r.nodes.index for r in few.rounds]) - 1
    terms = torch.cat([r.values(weights) for r in few.rounds])
    p = torch.cat([r.probability() for r in few.rounds])
    drawer = few.drawers[0]
    logsnr = drawer.model.process.schedule.logsnr(drawer.times).cpu()
    # a last step that erases everything ends at log-SNR −∞ and has no density
    drawn = (pair >= 0) & logsnr[1:].isfinite()[pair.clamp(min=0)]
    logsnr = logsnr[logsnr.isfinite()]
    width, centre = logsnr[:-1] - logsnr[1:], 0.5 * (logsnr[:-1] + logsnr[1:])
    if len(width) == 0:
        return None
    place, weight = pair[drawn], 1 / p[drawn]
    bins = min(MOST, len(width))
    of = place * bins // len(width)
    zero = torch.zeros(bins, dtype=torch.float64)
    whole = zero.index_add(0, of, weight)
    mean = zero.index_add(0, of, weight * terms[drawn] / width[place]) / whole
    left = weight * (terms[drawn] / width[place] - mean[of])
    se = zero.index_add(0, of, left**2).sqrt() / whole
    where = zero.index_add(0, of, weight * centre[place]) / whole
    seen = torch.bincount(of, minlength=bins) > 1
    return Integrand(where[seen], mean[seen], se[seen]) if bool(seen.any()) else None
