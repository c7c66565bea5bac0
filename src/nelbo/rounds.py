r"""What was drawn in one design of a few-call evaluation, and what is left of it.

For a linear combination y of the models' terms, the stand-in h is fitted for every fold on the
other folds and the pilot, and the round splits into what is known of every example and what a draw
adds to it:

    base(x) = prior(x) + Σ_i E h_i(x),     residual = (y − h)/p.

The same draws can be looked at again with fewer columns in h, or under other probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.design import Design
from nelbo.surrogate import Basis, Gram, Nodes, columns, crossfit, groups, totals, unaffordable


@dataclass(frozen=True)
class Round:
    """What was drawn in one design.

    Arguments:
        p: (N,) probabilities of the terms. basis: hats of the stand-in.
        prior: (n, models). sums: (n, K, Q) Σ_i φ_k(i) G̅_qi of every example.
        index: (n, k) terms drawn, −1 where none. terms: (n, k, models).
        nodes: of the draws, in the order of `index >= 0`.
    """

    design: Design
    p: Tensor
    basis: Basis
    prior: Tensor
    sums: Tensor
    index: Tensor
    terms: Tensor
    nodes: Nodes
    features: Tensor

    @property
    def drawn(self) -> Tensor:
        """(n, k) where there is a draw."""
        return self.index >= 0

    def values(self, weights: Tensor) -> Tensor:
        """(M,) the combination of the models' terms at the draws."""
        y: Tensor = self.terms[self.drawn] @ weights
        return y

    def probability(self) -> Tensor:
        """(M,) with which each draw was made."""
        return self.p[self.nodes.index]

    def residuals(
        self,
        component: str,
        weights: Tensor,
        elsewhere: Gram,
        *,
        without: tuple[str, ...] = (),
        fit: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """(n,) what is known of every example, (n, k) what a draw adds, nan where none was.

        Arguments:
            component: "diffusion", "reconstruction" or "total".
            weights: (models,) of the linear combination.
            elsewhere: second moments of the pilot for the same combination.
            without: groups of columns that the stand-in does not use.
            fit: on the other folds as well; otherwise on the pilot alone.
        """
        kinds = groups(self.basis, self.sums.shape[2], self.features.shape[1])
        count = len(self.nodes.index)
        left_out = [*without, *unaffordable(count, count * float(self.p[0]), self.nodes)]
        keep = ~sum((kinds[name] for name in left_out), torch.zeros_like(kinds["decoder"]))
        z, y, p = columns(self.basis, self.nodes), self.values(weights), self.probability()
        fold = self.design.folds[self.drawn.nonzero()[:, 0]]
        if fit:
            beta = crossfit(z, y, p, fold, elsewhere, keep)
        else:
            beta = elsewhere.solve(keep).expand(int(fold.max()) + 1, -1)
        mask = _of(component, kinds["decoder"]).double()
        whole = totals(self.basis, self.sums, self.features) * mask
        base = (whole * beta[self.design.folds]).sum(1)
        left = (y - (z * beta[fold]).sum(1)) / p * _of(component, self.nodes.index == 0)
        table = torch.full(self.index.shape, math.nan, dtype=torch.float64)
        table[self.drawn] = left
        return base + (self.prior @ weights if component == "total" else 0.0), table


def _of(component: str, decoder: Tensor) -> Tensor:
    """Mask of a component, given that of the decoder."""
    if component == "total":
        return torch.ones_like(decoder)
    return decoder if component == "reconstruction" else ~decoder
