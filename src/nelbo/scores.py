r"""Scores of two sets of features: how far apart, how much of each is covered by the other.

With real rows x_1..x_n and fake rows y_1..y_m in R^k, everything in float64:

    KID    (mean over i != j of κ(x_i, x_j)) + (the same of y) - 2 (mean of κ(x_i, y_j)),
           κ(a, b) = (a.b/k + 1)^3: unbiased, so that it may be negative
    FID    |m_x - m_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^1/2
    SW     the mean over directions u of W_2^2 between the projections u.x and u.y
    MMD    KID's form with a Gaussian kernel through random frequencies

Scores of nearest neighbours are in `nelbo.neighbours`.

Except for KID and MMD every score is biased at finite n, and FID strongly so: two samples of one
law never score zero. A figure means something beside the same figure between two halves of the
real data at the same n, which `nelbo.companions` prints. None of them bounds a divergence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.errors import InputRefused
from nelbo.randomness import generator

BLOCK = 2048
TIE = 1e-12
SCALES = 4
"""Statistics of permutations this close count as equal: the sums are rounded in another order."""


@dataclass(frozen=True)
class Permuted:
    """A squared discrepancy and the p-value of "both sets come from one law"."""

    mmd2: float
    p: float
    permutations: int


def kid(real: Tensor, fake: Tensor) -> float:
    """Unbiased squared MMD of the cubic kernel, over all pairs: no subsets, no draws.

    Arguments:
        real, fake: (n, k) and (m, k), at least two rows each.
    Raises:
        InputRefused: the rows are not two finite tables of one width.
    References:
        Bińkowski, Sutherland, Arbel, Gretton 2018, eq. 4 and section 4. Their code averages over
        random subsets of 1000, which has the same mean and a larger variance.
    """
    x, y = pair(real, fake, 2)
    within = sum(_cubes(rows, rows, True) / (len(rows) * (len(rows) - 1)) for rows in (x, y))
    return within - 2 * _cubes(x, y, False) / (len(x) * len(y))


def _cubes(x: Tensor, y: Tensor, same: bool) -> float:
    """Sum of (a.b/k + 1)^3 over all pairs, without a = b where the sets are the same."""
    blocks = torch.split(x / x.shape[1], BLOCK)
    total = math.fsum(float(_cube(rows @ y.T).sum()) for rows in blocks)
    own = float(_cube(x.square().sum(1) / x.shape[1]).sum()) if same else 0.0
    return total - own


def _cube(products: Tensor) -> Tensor:
    # Products, because pow(3) goes through logarithms and takes five times as long.
    base = products + 1
    return base * base * base


def fid(real: Tensor, fake: Tensor) -> float:
    r"""Fréchet distance of the Gaussians with the sets' means and covariances (1/(n-1)).

    With the centred rows A/sqrt(n-1) = Q_A R_A, S_x = R_A^T R_A, and B likewise: tr (S_x S_y)^1/2
    is the sum of the singular values of R_A R_B^T, the square roots of the eigenvalues of the
    symmetric R_A S_y R_A^T. No ridge is added and nothing is clipped.

    Biased: samples of the same N(0, I_64) score 4.43 on average at n = 500, and .22 at 10,000.

    Arguments:
        real, fake: (n, k) and (m, k), both with more rows than columns.
    Raises:
        InputRefused: as `kid`, or too few rows: the covariances would be singular by construction.
    References:
        Dowson, Landau 1982; Heusel et al. 2017, eq. 6; Chong, Forsyth 2020 for the bias.
    """
    x, y = pair(real, fake, 2)
    fewest, width = min(len(x), len(y)), x.shape[1]
    if fewest <= width:
        raise InputRefused(
            f"FID of {fewest} examples in {width} dimensions: both covariances would be singular. "
            f"Take more than {width} examples on either side, or features of fewer dimensions "
            "(PCA), or read KID, which needs no covariance"
        )
    means = x.mean(0), y.mean(0)
    first, second = (
        torch.linalg.qr((rows - mean) / math.sqrt(len(rows) - 1), mode="r")[1]
        for rows, mean in zip((x, y), means, strict=True)
    )
    apart = (means[0] - means[1]).square().sum()
    cross = torch.linalg.svdvals(first @ second.T).sum()
    return float(apart + first.square().sum() + second.square().sum() - 2 * cross)


def sliced_wasserstein(
    real: Tensor, fake: Tensor, *, projections: int = 256, seed: int = 0
) -> float:
    """The mean of W_2^2 over random directions: squared units of the features, no root taken.

    In one dimension W_2^2 is the mean squared difference of the sorted values, so that both sets
    need the same size. The directions depend on (seed, k, projections) alone.

    Arguments:
        real, fake: (n, k) both.
        projections: directions, uniform on the sphere; in one dimension there is only one.
    Raises:
        InputRefused: as `kid`, or of unequal size.
    References:
        Rabin, Peyré, Delon, Bernot 2011; Bonneel, Rabin, Peyré, Pfister 2015, section 3.
    """
    x, y = pair(real, fake, 1)
    if len(x) != len(y):
        raise InputRefused(
            f"sliced Wasserstein of {len(x)} against {len(y)} examples: take the same number"
        )
    draws = generator(seed, "sliced wasserstein", x.shape[1], projections)
    ways = torch.randn(x.shape[1], projections, dtype=torch.float64, generator=draws)
    ways = ways / ways.norm(dim=0)
    apart = (x @ ways).sort(0).values - (y @ ways).sort(0).values
    return float(apart.square().mean())


def mmd_test(
    real: Tensor,
    fake: Tensor,
    *,
    frequencies: int = 256,
    permutations: int = 199,
    seed: int = 0,
) -> Permuted:
    """Unbiased squared MMD through random Fourier features, with an exact permutation p-value.

    κ(a, b) = mean over frequencies w of cos w.(a - b), w ~ N(0, I/h^2), is itself a kernel, near
    exp(-|a - b|^2/(2 h^2)). The bandwidth h^2 is the pooled total variance, half the mean squared
    distance of two rows: it does not depend on which row is real. So if both sets come from one
    law, the statistic is exchangeable over relabellings, and p = (1 + #{permuted >= found})/(1 +
    permutations) satisfies P(p <= a) <= a at any n.

    Arguments:
        real, fake: (n, k) and (m, k), at least two rows each.
        seed: of frequencies and permutations; it must not have been chosen by looking at p.
    Raises:
        InputRefused: as `kid`, or no permutations.
    References:
        Rahimi, Recht 2007; Gretton et al. 2012, lemma 6; Phipson, Smyth 2010 for the 1 +.
    """
    x, y = pair(real, fake, 2)
    if permutations < 1:
        raise InputRefused("a permutation p-value needs at least one permutation")
    pooled = torch.cat((x, y))
    waves = _waves(pooled, frequencies, seed)
    draws = generator(seed, "relabellings")
    chosen = torch.zeros(permutations + 1, len(pooled), dtype=torch.float64)
    chosen[0, : len(x)] = 1
    for row in chosen[1:]:
        row[torch.randperm(len(pooled), generator=draws)[: len(x)]] = 1
    found = _unbiased(waves, chosen)
    above = int((found[1:] >= found[0] - TIE).sum())
    return Permuted(float(found[0]), (1 + above) / (1 + permutations), permutations)


def _waves(pooled: Tensor, frequencies: int, seed: int) -> Tensor:
    """(N, 2 frequencies): rows whose products are the kernel; each has length one."""
    spread = float(pooled.var(0).sum())
    # Where all rows are equal the kernel is 1 whatever the bandwidth.
    width = math.sqrt(spread) if spread > 0 else 1.0
    draws = generator(seed, "frequencies", pooled.shape[1], frequencies)
    shape = (pooled.shape[1], frequencies)
    ways = torch.randn(shape, dtype=torch.float64, generator=draws) / width
    angles = (pooled - pooled.mean(0)) @ ways
    return torch.cat((angles.cos(), angles.sin()), 1) / math.sqrt(frequencies)


def _unbiased(waves: Tensor, chosen: Tensor) -> Tensor:
    """(P,) squared MMD for each labelling (P, N) of ones and zeros; κ(a, a) = 1 is left out."""
    n = chosen[0].sum()
    m = len(waves) - n
    first = chosen @ waves
    second = waves.sum(0) - first
    within = [(s.square().sum(1) - c) / (c * (c - 1)) for s, c in ((first, n), (second, m))]
    return within[0] + within[1] - 2 * (first * second).sum(1) / (n * m)


def pair(real: Tensor, fake: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both tables in float64, after the checks that every score needs.

    Arguments:
        real, fake: (n, k) and (m, k). least: rows that either must have.
    Raises:
        InputRefused: another shape, too few rows, values that are not finite, other widths.
    """
    for name, rows in (("real", real), ("fake", fake)):
        if rows.dim() != 2 or len(rows) < least or rows.shape[1] < 1:
            raise InputRefused(
                f"{name} features are {tuple(rows.shape)}: this score needs a table (n, k) of at "
                f"least {least} rows"
            )
        if not bool(torch.isfinite(rows).all()):
            raise InputRefused(f"{name} features hold NaN or infinite values")
    if real.shape[1] != fake.shape[1]:
        raise InputRefused(
            f"real features have {real.shape[1]} columns and fake ones {fake.shape[1]}: take both "
            "from one extractor"
        )
    return real.double(), fake.double()


def multiscale_mmd2(real: Tensor, fake: Tensor, widest: float) -> float:
    """Unbiased squared mean discrepancy under a sum of Gaussian kernels; it may be negative.

    Arguments:
        real, fake: (n, k) and (m, k).
        widest: standard deviation of the widest of the kernel's SCALES Gaussians; each other is a
            quarter of the one before.
    References:
        Gretton et al. 2012, A kernel two-sample test, eq. 3.
    """
    x, y = pair(real, fake, 2)
    within = [torch.cdist(rows, rows) for rows in (x, y)]
    scales = [widest / 4**k for k in range(SCALES)]

    def total(distance: Tensor) -> float:
        return math.fsum(float((-((distance / h) ** 2) / 2).exp().sum()) for h in scales)

    pairs = [(total(d) - SCALES * len(d)) / (len(d) * (len(d) - 1)) for d in within]
    across = torch.cdist(x, y)
    return sum(pairs) - 2 * total(across) / across.numel()
