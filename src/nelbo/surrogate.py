r"""A stand-in for the terms of the bound, fitted on other examples, whose sum over a set is known.

    h_i = Σ_k φ_k(i) [a_k + Σ_q e_kq G̅_qi(x_0) + Σ_q b_kq (G_qi(x_t) − E[G_qi|x_0])]
        + Σ_k ψ_k(i) Σ_l c_kl z_l(x_0)

φ_k and ψ_k are hats along the grid, ψ half as many, G_q control variates with known expectation
(`nelbo.controls`), G̅_q that expectation limited to what was seen in training, z_l features that
need no network (`nelbo.data.features`); the decoder term has a constant and features of its own.
Summed over all terms and averaged over noise, h is known for every example without a network call,
so that

    Σ_i term_i = Σ_i E h_i + E (term_i − h_i)/p_i,  i drawn with probability p_i,

whatever the coefficients are, as long as they were not fitted on the draws that they weigh. They
are fitted by least squares on the other folds: the variance of (term − h)/p is what is left.

References:
    Cochran 1977, ch. 7 (regression estimates); Chernozhukov et al. 2018 (cross-fitting).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-4
"""Of the mean square of a column: keeps collinear columns apart, biases nothing."""
PER_COLUMN = 12
"""Draws for which one more coefficient is worth its own error."""
MOST_HATS = 16
LEAST = 6
"""Draws per column below which a group of columns is left out."""


@dataclass(frozen=True)
class Nodes:
    """What is known of M draws without the network.

    Arguments:
        index: (M,) int64 terms, 0 the decoder. stand_in: (M, Q) G̅ at that term.
        fluctuation: (M, Q) G − E[G|x_0] at the draw. features: (M, L).
    """

    index: Tensor
    stand_in: Tensor
    fluctuation: Tensor
    features: Tensor


@dataclass(frozen=True)
class Basis:
    """φ (N, K) and ψ (N, K'): hats that sum to one on the pairs; row 0, the decoder, is zero."""

    fine: Tensor
    coarse: Tensor

    @classmethod
    def of(cls, position: Tensor, count: int) -> Basis:
        """Hats along positions (N−1,) of the pairs, non-decreasing in [0, 1]."""
        none = torch.zeros(1, 1, dtype=torch.float64)
        fine, coarse = hats(position, count), hats(position, max(1, count // 2))
        return cls(
            torch.cat([none.expand(1, fine.shape[1]), fine]),
            torch.cat([none.expand(1, coarse.shape[1]), coarse]),
        )


def hats(position: Tensor, count: int) -> Tensor:
    """(M, K) piecewise linear functions of positions (M,) in [0, 1] that sum to one."""
    if count == 1:
        return torch.ones(len(position), 1, dtype=torch.float64)
    knots = torch.linspace(0, 1, count, dtype=torch.float64)
    return (1 - (position[:, None] - knots).abs() * (count - 1)).clamp(min=0)


def hat_count(draws: int, nodes: Nodes, pairs: int) -> int:
    """How many hats K so many draws can bear."""
    width = 1 + 2 * nodes.stand_in.shape[1] + nodes.features.shape[1] / 2
    return max(1, min(MOST_HATS, pairs, int(draws / (PER_COLUMN * width))))


def columns(basis: Basis, nodes: Nodes) -> Tensor:
    """(M, C) regressors at the draws, in the order of `groups`."""
    fine, coarse = basis.fine[nodes.index], basis.coarse[nodes.index]
    decoder = (nodes.index == 0).double()[:, None]
    known = ((fine, nodes.stand_in), (fine, nodes.fluctuation), (coarse, nodes.features))
    parts = [(here[:, :, None] * value[:, None, :]).flatten(1) for here, value in known]
    return torch.cat([fine, *parts, decoder, decoder * nodes.features], 1)


def totals(basis: Basis, stand_in: Tensor, features: Tensor) -> Tensor:
    """(n, C) regressors summed over all terms of every example, in expectation over noise.

    Arguments:
        stand_in: (n, K, Q) Σ_i φ_k(i) G̅_qi. features: (n, L).
    """
    n, known = len(stand_in), stand_in.flatten(1)
    whole = basis.coarse.sum(0)
    by_feature = (whole[None, :, None] * features[:, None, :]).flatten(1)
    one = torch.ones(n, 1, dtype=torch.float64)
    parts = [basis.fine.sum(0).expand(n, -1), known, torch.zeros_like(known), by_feature]
    return torch.cat([*parts, one, features], 1)


def groups(basis: Basis, controls: int, features: int) -> dict[str, Tensor]:
    """(C,) masks of the columns: by what they use ("control", "features"), and the "decoder"."""
    count = basis.fine.shape[1]
    kinds = ["level"] * count + ["control"] * (2 * count * controls)
    kinds += ["features"] * (basis.coarse.shape[1] * features)
    kinds += ["decoder"] + ["decoder features"] * features
    return {
        "control": torch.tensor([kind == "control" for kind in kinds]),
        "features": torch.tensor(["features" in kind for kind in kinds]),
        "decoder": torch.tensor(["decoder" in kind for kind in kinds]),
        "decoder features": torch.tensor([kind == "decoder features" for kind in kinds]),
    }


def unaffordable(draws: int, decoder: float, nodes: Nodes) -> list[str]:
    """Groups of columns for which there are too few draws, even with one hat.

    Arguments:
        draws: M. decoder: how many of them are of the decoder, as planned: what was drawn must not
            choose the columns that it is weighed by.
        nodes: any, for the numbers of controls and features.
    """
    width, features = 1 + 2 * nodes.stand_in.shape[1], nodes.features.shape[1]
    found = ["decoder features"] if decoder < LEAST * (1 + features) else []
    pairs = draws - decoder
    if pairs < LEAST * (width + features):
        found += ["features"]
    return found + (["control"] if pairs < LEAST * width else [])


@dataclass(frozen=True)
class Gram:
    """Second moments of weighted rows (z, y)/p: all that least squares needs of them."""

    square: Tensor
    product: Tensor
    rows: int

    @classmethod
    def of(cls, z: Tensor, y: Tensor, p: Tensor) -> Gram:
        """Of M rows: z (M, C), y (M,), p (M,) the probabilities with which they were drawn."""
        weighted = z / p[:, None]
        return cls(weighted.T @ weighted, weighted.T @ (y / p), len(z))

    def __add__(self, other: Gram) -> Gram:
        return Gram(
            self.square + other.square, self.product + other.product, self.rows + other.rows
        )

    def __sub__(self, other: Gram) -> Gram:
        return Gram(
            self.square - other.square, self.product - other.product, self.rows - other.rows
        )

    def solve(self, keep: Tensor) -> Tensor:
        """(C,) ridge coefficients, zero outside `keep`."""
        rms = (self.square.diagonal() / max(self.rows, 1)).clamp(min=0).sqrt()
        used = (keep & (rms > 1e-12 * rms.max())).nonzero()[:, 0]
        out = torch.zeros_like(self.product)
        if len(used) == 0:
            return out
        scale = rms[used] * max(self.rows, 1) ** 0.5
        matrix = self.square[used][:, used] / scale / scale[:, None]
        matrix += RIDGE * torch.eye(len(used), dtype=torch.float64)
        out[used] = torch.linalg.solve(matrix, self.product[used] / scale) / scale
        return out


def crossfit(
    z: Tensor, y: Tensor, p: Tensor, fold: Tensor, elsewhere: Gram, keep: Tensor
) -> Tensor:
    """(F, C) coefficients, those of a fold fitted on all other folds and `elsewhere`.

    Arguments:
        z (M, C), y (M,), p (M,), fold (M,) of the draws. elsewhere: of the pilot.
        keep: (C,) bool, the columns that may be used.
    """
    count = int(fold.max()) + 1
    grams = [Gram.of(*(v[fold == f] for v in (z, y, p))) for f in range(count)]
    whole = elsewhere
    for gram in grams:
        whole = whole + gram
    return torch.stack([(whole - gram).solve(keep) for gram in grams])
