r"""Logistic regression on fixed features, fitted to its optimum by Newton's method in float64.

The features of a row are its standardised coordinates x, their products x_i x_j (squares alone in
many dimensions), and random Fourier features cos(w^T x + b) at several widths: differences in
mean, in covariance, and in anything smooth. Long rows are first turned to the leading principal
axes of the pooled rows. The loss is balanced, half for each side whatever their numbers, so the
logit needs no correction by log(n1/n0):

    min_w  1/2 mean sp(-s(x)) + 1/2 mean sp(s(y)) + (l/2) |w|^2,

strictly convex; the penalty l is the one with the least loss on a part of the rows that was held
out.

References:
    Rahimi, Recht 2007 (random Fourier features).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from nelbo.randomness import generator, seeded

AXES = 48
"""Principal axes kept of rows with more dimensions."""
PRODUCTS = 16
"""Most dimensions of which all products are features."""
FAR = 8.0
TONES = (0.5, 1.0, 2.0, 4.0)
WIDTHS = (0.1, 0.2, 0.4, 0.8)
"""Of the Fourier features, in median distances between rows."""
PENALTIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
NEWTON, CLOSE = 30, 1e-9
HELD = 4
MOST_ROWS, MOST_VALUES, WIDE = 20_000, 2**24, 1024
"""Of one side: rows, and numbers, that a fit reads; dimensions from which axes are approximate."""
PAIRS = 1000


class Features(nn.Module):
    """Rows (B, *shape) -> features (B, k) float64.

    Arguments:
        pooled: (n, *shape) rows of both sides that set the scale.
        fourier: number of random Fourier features at each width; 0 for none.
        seed: of their frequencies.
    """

    shift: Tensor
    turn: Tensor
    frequencies: Tensor
    phases: Tensor

    def __init__(self, pooled: Tensor, fourier: int, seed: int) -> None:
        super().__init__()
        flat = pooled.flatten(1).double()
        shift = flat.mean(0)
        self.register_buffer("shift", shift)
        with seeded(seed, "axes"):
            self.register_buffer("turn", _axes(flat - shift))
        x = self._coordinates(pooled)
        draws = generator(seed, "fourier")
        width = _median_distance(x[torch.randperm(len(x), generator=draws)])
        shape = (x.shape[1], fourier)
        waves = [torch.randn(shape, generator=draws, dtype=torch.float64) / w for w in WIDTHS]
        self.register_buffer("frequencies", torch.cat(waves, 1) / width)
        phases = torch.rand(len(WIDTHS) * fourier, generator=draws, dtype=torch.float64)
        self.register_buffer("phases", 2 * math.pi * phases)

    def forward(self, rows: Tensor) -> Tensor:
        x = self._coordinates(rows)
        waves = torch.cos(x @ self.frequencies + self.phases) * math.sqrt(2)
        return torch.cat([x, _products(x), waves], 1)

    def _coordinates(self, rows: Tensor) -> Tensor:
        # Outliers are moved in, row by row, lest one product outweigh all others.
        return ((rows.flatten(1).double() - self.shift) @ self.turn).clamp(-FAR, FAR)


class Textures(nn.Module):
    """Images (B, C, H, W) -> (B, k) float64: the laws of pixels and of their differences.

    Means over the image of cos(w u) and sin(w u), which are the characteristic function of u at a
    few w, u being the values of a channel and its steps along rows and along columns.

    Arguments:
        pooled: (n, C, H, W) images of both sides that set the scale.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, pooled: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", pooled.double().mean((0, 2, 3))[:, None, None])
        self.register_buffer("scale", _safe(pooled.double().std((0, 2, 3)))[:, None, None])

    def forward(self, rows: Tensor) -> Tensor:
        x = (rows.double() - self.shift) / self.scale
        fields = (x, x.diff(dim=2), x.diff(dim=3))
        waves = [
            f(w * u).mean((2, 3)) for u in fields for w in TONES for f in (torch.cos, torch.sin)
        ]
        return torch.cat(waves, 1)


class Summaries(nn.Module):
    """Rows (B, *shape) -> (B, 7) float64: size, spread and tails of a row's standardised values.

    In many dimensions these tell a wrong scale or wrong tails that no single coordinate shows.

    Arguments:
        pooled: (n, *shape) rows of both sides that set the scale.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, pooled: Tensor) -> None:
        super().__init__()
        flat = pooled.flatten(1).double()
        self.register_buffer("shift", flat.mean(0))
        self.register_buffer("scale", _safe(flat.std(0)))

    def forward(self, rows: Tensor) -> Tensor:
        u = (rows.flatten(1).double() - self.shift) / self.scale
        size = u.square().mean(1)
        steps = u.diff(dim=1).square().mean(1)
        found = [u.mean(1), size, size.sqrt(), u.abs().mean(1), u.abs().amax(1), steps]
        return torch.stack([*found, u.square().square().mean(1).clamp(max=FAR**4)], 1)


class Logistic(nn.Module):
    """Logits (B,) linear in the standardised features: s = w^T (f(x) - mean)/scale + b."""

    mean: Tensor
    scale: Tensor
    weights: Tensor

    def __init__(self, features: nn.Module, mean: Tensor, scale: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("weights", weights)

    def forward(self, rows: Tensor) -> Tensor:
        found = (self.features(rows) - self.mean) / self.scale
        logits: Tensor = found @ self.weights[:-1] + self.weights[-1]
        return logits


def fit_logistic(
    make: Callable[[Tensor], nn.Module], real: Tensor, fake: Tensor, seed: int
) -> Logistic:
    """The regression of "real" on the features.

    Arguments:
        make: makes the features, (B, *shape) -> (B, k) float64, for the scale of pooled rows.
        real: (n, *shape) and fake: (m, *shape) rows, in any order.
        seed: of the rows that are read, and of the part held out to choose the penalty.
    """
    most = min(MOST_ROWS, max(1000, MOST_VALUES // math.prod(real.shape[1:])))
    draws = generator(seed, "rows")
    real, fake = (x[torch.randperm(len(x), generator=draws)[:most]] for x in (real, fake))
    features = make(torch.cat([real, fake]))
    f, g = features(real), features(fake)
    both = torch.cat([f, g])
    mean, scale = both.mean(0), _safe(both.std(0))
    f, g = ((x - mean) / scale for x in (f, g))
    f, g = (_with_one(x) for x in (f, g))
    draws = generator(seed, "penalty")
    f, g = (x[torch.randperm(len(x), generator=draws)] for x in (f, g))
    penalty = _penalty(f, g)
    start = torch.zeros(f.shape[1], dtype=torch.float64)
    return Logistic(features, mean, scale, newton(f, g, penalty, start))


def _penalty(f: Tensor, g: Tensor) -> float:
    """The penalty with the least balanced loss on the quarter held out."""
    (a, b), (c, d) = ((x[len(x) // HELD :], x[: len(x) // HELD]) for x in (f, g))
    weights = torch.zeros(f.shape[1], dtype=torch.float64)
    best, least = PENALTIES[0], math.inf
    for penalty in PENALTIES:
        weights = newton(a, c, penalty, weights)
        loss = float(softplus(-(b @ weights)).mean() + softplus(d @ weights).mean())
        if loss >= least:
            break  # smaller penalties only fit the noise better
        best, least = penalty, loss
    return best


def newton(f: Tensor, g: Tensor, penalty: float, start: Tensor) -> Tensor:
    """Minimise the balanced, penalised loss; the last weight, of the constant, is free.

    Arguments:
        f: (n, k), g: (m, k) features of reals and fakes, the last one constant 1.
        penalty: l > 0. start: (k,).
    """
    x = torch.cat([f, g])
    sign = torch.cat([torch.ones(len(f)), -torch.ones(len(g))]).double()
    share = torch.cat([torch.full((len(y),), 0.5 / len(y)) for y in (f, g)]).double()
    ridge = torch.full((x.shape[1],), penalty, dtype=torch.float64)
    ridge[-1] = 1e-9

    def loss(w: Tensor) -> float:
        return float((share * softplus(-sign * (x @ w))).sum() + (ridge * w.square()).sum() / 2)

    w, value = start, loss(start)
    for _ in range(NEWTON):
        wrong = torch.sigmoid(-sign * (x @ w))
        slope = -(x.T @ (share * sign * wrong)) + ridge * w
        bend = (x * (share * wrong * (1 - wrong))[:, None]).T @ x + torch.diag(ridge)
        step = torch.linalg.solve(bend + 1e-12 * torch.eye(len(bend), dtype=bend.dtype), slope)
        gain = float(step @ slope)
        length = 1.0
        while loss(w - length * step) > value and length > 1e-6:
            length /= 2
        if length <= 1e-6:
            break
        w = w - length * step
        value = loss(w)
        if gain < CLOSE:
            break
    return w


def _axes(flat: Tensor) -> Tensor:
    """(D, k): standardises, or turns to the leading principal axes of unit variance."""
    if flat.shape[1] <= AXES:
        return torch.diag(1 / _safe(flat.std(0)))
    if flat.shape[1] > WIDE:
        _, sizes, vectors = torch.svd_lowrank(flat, q=AXES, niter=4)
        values = sizes.square() / len(flat)
    else:
        values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
        values, vectors = values.flip(0)[:AXES], vectors.flip(1)[:, :AXES]
    turned: Tensor = vectors / values.clamp(min=1e-9 * float(values[0]) + 1e-300).sqrt()
    return turned


def _safe(scale: Tensor) -> Tensor:
    """Constant dimensions keep their scale."""
    return torch.where(scale > 1e-9, scale, torch.ones_like(scale))


def _products(x: Tensor) -> Tensor:
    if x.shape[1] > PRODUCTS:
        return x.square()
    i, j = torch.triu_indices(x.shape[1], x.shape[1])
    return x[:, i] * x[:, j]


def _median_distance(x: Tensor) -> float:
    half = min(PAIRS, len(x) // 2)
    return max(float((x[:half] - x[half : 2 * half]).square().sum(1).sqrt().median()), 1e-6)


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
