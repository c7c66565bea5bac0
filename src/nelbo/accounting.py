r"""From residuals of a few-call design to a mean with its two errors.

Every example x of a set of n has a part H(x) that is known, and a residual effect A(x) of which a
draw e_r = A(x) + noise was seen, in replicate r for n_r of them at k_r nodes. With V_r = Var e_r,
I_r the part of it that is noise, C the variance of A, f_r = n_r/n, and ω_r the share of the calls,

    mean     = mean H + ω_1 mean e_1 + ω_2 mean e_2,
    se_mc²   = Σ_r ω_r² [(1 − f_r) V_r + f_r I_r]/n_r + 2 ω_1 ω_2 C (1 − f_1)/n_1,
    se²      = se_mc² + [Var H + 2 Cov(H, e_1) + C]/n.

Where all examples are measured (f = 1) the effect of the example drops out of se_mc. The noise is
read off the examples that both replicates saw, E (e_1 − e_2)² = s/k_1 + s/k_2, I_r = s/k_r, for
the first replicate in proportion to its variance on all that it saw. In the variances the trend of
e along the nodes is taken out, since a Latin design has none of it.

References:
    Cochran 1977, ch. 2 (finite populations), 10, 12 (two phases); Stein 1987 (Latin hypercubes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.design import Design
from nelbo.surrogate import hats

PER_HAT, MOST_HATS = 40, 48


@dataclass(frozen=True)
class Account:
    """Values of n examples whose mean is the estimate, and its errors; nats.

    Arguments:
        values: (n,) H(x) + (n/n_r) ω_r e_r summed over the replicates that saw x.
        se_mc: of noise, times and the choice of examples. se: of the population as well.
        freedom: with how many degrees of freedom se_mc is known: 2 m/(κ − 1) for m residuals of
            kurtosis κ. A few large residuals say less of their variance than many equal ones.
    """

    values: Tensor
    se_mc: float
    se: float
    freedom: float

    @property
    def mean(self) -> float:
        """Of the values."""
        return math.fsum(self.values.tolist()) / len(self.values)


def account(base: Tensor, residuals: Tensor, design: Design, latin: bool = True) -> Account:
    """The mean of base + E residual over a set, with errors.

    Arguments:
        base: (n,) H. residuals: (n, k + k') e at the nodes of the design, nan where none was.
        latin: whether the nodes of the design were a Latin hypercube.
    """
    n = len(base)
    level = detrended(residuals, design.both) if latin else residuals
    k = design.first.shape[1]
    share = [int(t.isfinite().sum()) / design.calls for t in (design.first, design.second)]
    first, second = _part(residuals[:, :k]), _part(residuals[:, k:])
    weights = [share[r] * _weight(part, design.folds) for r, part in enumerate((first, second))]
    seen = [torch.where(part.isfinite(), part, 0.0) for part in (first, second)]
    values = base + weights[0] * seen[0] + weights[1] * seen[1]
    raw = [_part(t) for t in (level[:, :k], level[:, k:])]
    parts = [_centred(part, design.folds) for part in raw]
    # both residuals of an example have the same mean, so that their gap needs no centring
    gap = float((raw[0] - raw[1]).square().nanmean())
    mc, effect = _monte_carlo(parts, gap, design, share)
    known = float(base.var()) if n > 1 else math.nan
    both = _covariance(parts[0], _centred(base, design.folds), design.folds)
    # a sum of estimates, one of which may be below 0
    population = max(known + 2 * both + effect, 0.0) / n
    return Account(values, math.sqrt(mc), math.sqrt(mc + population), _freedom(parts[0]))


def _monte_carlo(
    parts: list[Tensor], gap: float, design: Design, share: list[float]
) -> tuple[float, float]:
    """se_mc² and C from the centred parts of both replicates, and the mean of (e_1 − e_2)²."""
    n, folds = len(design.folds), design.folds
    k = [design.first.shape[1], design.second.shape[1]]
    seen = [int(part.isfinite().sum()) for part in parts]
    variance = [_covariance(part, part, folds) for part in parts]
    noise = gap * k[0] * k[1] / (k[0] + k[1])
    there = torch.where(parts[1].isfinite(), parts[0], math.nan)
    common = _covariance(there, there, folds)
    own = [noise / k[0] * (variance[0] / common if common > 0 else 1.0), noise / k[1]]
    if min(seen) > int(folds.max()) + 1:  # noise is part of a variance that was measured
        own = [min(i, v) for i, v in zip(own, variance, strict=True)]
    effect = max(sum(v - i for v, i in zip(variance, own, strict=True)) / 2, 0.0)
    mc = 2 * share[0] * share[1] * effect * (1 - seen[0] / n) / seen[0]
    for w, m, v, i in zip(share, seen, variance, own, strict=True):
        mc += w**2 * ((1 - m / n) * v + m / n * i) / m
    return mc, effect


def _freedom(part: Tensor) -> float:
    """2 m/(κ − 1) of centred residuals; infinite where there are none to speak of."""
    e = part[part.isfinite()]
    square = float(e.square().mean())
    if square == 0:
        return math.inf
    kurtosis = float((e**4).mean()) / square**2
    return 2 * len(e) / max(kurtosis - 1, 1.0)


def _part(table: Tensor) -> Tensor:
    """(n,) the mean over the nodes of a replicate, nan where it did not look."""
    return table.mean(1)


def _weight(part: Tensor, folds: Tensor) -> Tensor:
    """(n,) what one residual stands for: the examples of its fold per example seen, or 0."""
    out = torch.zeros_like(part)
    for f in range(int(folds.max()) + 1):
        here = folds == f
        seen = here & part.isfinite()
        out[seen] = int(here.sum()) / int(seen.sum())
    return out


def _centred(part: Tensor, folds: Tensor) -> Tensor:
    """The part less its mean in every fold."""
    out = part.clone()
    for f in range(int(folds.max()) + 1):
        here = folds == f
        out[here] -= part[here].nanmean()
    return out


def _covariance(a: Tensor, b: Tensor, folds: Tensor) -> float:
    """Of centred parts over the examples that both saw, within folds; 0 where too few did."""
    seen = a.isfinite() & b.isfinite()
    freedom = int(seen.sum()) - (int(folds.max()) + 1)
    return float((a[seen] * b[seen]).sum()) / freedom if freedom > 0 else 0.0


def detrended(residuals: Tensor, v: Tensor) -> Tensor:
    """Residuals less their smooth trend along the nodes v, scaled for what the trend took."""
    seen = v.isfinite()
    count = max(1, min(MOST_HATS, int(seen.sum()) // PER_HAT))
    x, e = v[seen], residuals[seen]
    phi = hats(x, count)
    square = phi.T @ phi + 1e-9 * torch.eye(count, dtype=torch.float64)
    left = e - phi @ torch.linalg.solve(square, phi.T @ e)
    out = residuals.clone()
    out[seen] = left * math.sqrt(len(e) / max(len(e) - count, 1))
    return out
