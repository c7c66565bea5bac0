r"""The pilot of a few-call evaluation: how probable each term should be.

At up to 32 places of the grid, dense in index and in log-SNR, and at the decoder, terms of
training examples are drawn. A stand-in (`surrogate`) is fitted to them, and the root mean square
s_i of what it leaves, smoothed and interpolated, is what a term is drawn in proportion to:
p_i ∝ s_i is the allocation of least variance. It is mixed with 5 % of its mean, and the decoder is
never below 2 %, so that no term is left out and none weighs too much.

References:
    Neyman 1934 (optimal allocation); Cochran 1977, ch. 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.controls import Control
from nelbo.drawing import Drawer
from nelbo.surrogate import Basis, Gram, Nodes, columns, groups, hat_count, unaffordable

PLACES = 32
FLOOR, DECODER = 0.05, 0.02


@dataclass(frozen=True)
class Draws:
    """Terms of training examples, all (M,): what the design is fixed on.

    Arguments:
        nodes: what is known without the network. terms: (M, models) nats.
        most: (N−1, Q) the largest E[G_i|x_0] seen, up to which the stand-in is trusted.
    """

    nodes: Nodes
    terms: Tensor
    most: Tensor

    def gram(self, basis: Basis, y: Tensor, p: Tensor) -> Gram:
        """Second moments for least squares with other hats and probabilities."""
        return Gram.of(columns(basis, self.nodes), y, p[self.nodes.index])


def draw(
    drawers: list[Drawer],
    examples: Tensor,
    features: Tensor,
    controls: Sequence[Control],
    calls: int,
) -> Draws:
    """Draw about `calls` terms of training examples; the models share every x_t.

    Arguments:
        examples: (m, *shape) stored; the places take turns with them. features: (m, L).
    """
    drawer = drawers[0]
    at = torch.cat([torch.zeros(1, dtype=torch.int64), places(drawer)])
    each = max(4, calls // len(at))
    x_0 = drawer.encode(examples).to(drawer.device)
    expected = expectation(controls, x_0, drawer.times)
    most = expected.max(0).values
    parts = []
    for j, index in enumerate(at):
        rows = (torch.arange(each) + j * each) % len(examples)
        x = x_0[rows.to(x_0.device)]
        x_t = drawer.latent(x, torch.arange(each), drawer.times[index], "pilot", j)
        terms = torch.stack([d.value(x_t, x, index) for d in drawers], 1)
        pair = (index - 1).clamp(min=0)
        stand_in = expected[rows, pair] * float(index > 0)
        moved = fluctuation(controls, x, x_t, drawer.times, index.expand(each))
        parts.append((index.expand(each), stand_in, moved, features[rows], terms))
        drawer.tick(each * len(at) / max(len(drawer.data), 1))
    index, stand_in, moved, known, terms = (torch.cat(v) for v in zip(*parts, strict=True))
    return Draws(Nodes(index, stand_in, moved, known), terms, most)


def places(drawer: Drawer) -> Tensor:
    """Terms at which the pilot draws, 1..N−1."""
    pairs = len(drawer.times) - 1
    wanted = torch.linspace(0, 1, min(PLACES, pairs), dtype=torch.float64)
    at = torch.searchsorted(coordinate(drawer), wanted).clamp(max=pairs - 1)
    found: Tensor = torch.unique(at + 1)
    return found


def coordinate(drawer: Drawer) -> Tensor:
    """(N−1,) in [0, 1]: half even in the number of the pair, half in its log-SNR."""
    pairs = len(drawer.times) - 1
    if pairs == 1:
        return torch.zeros(1, dtype=torch.float64)
    even = torch.linspace(0, 1, pairs, dtype=torch.float64)
    logsnr = drawer.model.process.schedule.logsnr(drawer.times).detach().cpu()
    # a last step that erases everything ends at log-SNR −∞
    low = logsnr[logsnr.isfinite()].min() - 1
    fall = 0.5 * (logsnr[:-1] + logsnr[1:]).clamp(min=float(low))
    span = float(fall[0] - fall[-1])
    if span <= 0:
        return even
    mixed: Tensor = 0.5 * even + 0.5 * (fall[0] - fall) / span
    return mixed


def probabilities(drawer: Drawer, draws: Draws, targets: list[Tensor]) -> Tensor:
    """(N,) p, decoder first, summing to one.

    Arguments:
        targets: (M,) values whose sums are wanted (the terms of a model, or the difference of
            two); p is the mean of what is best for each.
    """
    best = [_best(drawer, draws, y) for y in targets]
    return torch.stack(best).mean(0)


def _best(drawer: Drawer, draws: Draws, y: Tensor) -> Tensor:
    index, place = draws.nodes.index, coordinate(drawer)
    at = index.unique()
    basis = Basis.of(place, hat_count(len(y), draws.nodes, len(at) - 1))
    z, y = columns(basis, draws.nodes), y.clone()
    size = torch.ones(len(place) + 1, dtype=torch.float64)
    # a few hats cannot follow the mean along the grid: what is fitted is the spread at a place
    for i in at:
        here = index == i
        size[i] = y[here].square().mean().sqrt() + torch.finfo(torch.float64).tiny
        z[here] -= z[here].mean(0)
        y[here] -= y[here].mean()
    # every place weighs the same in the fit, whatever the size of its terms
    kinds = groups(basis, draws.nodes.stand_in.shape[1], draws.nodes.features.shape[1])
    keep = torch.ones(z.shape[1], dtype=torch.bool)
    for name in unaffordable(len(y), int((index == 0).sum()), draws.nodes):
        keep &= ~kinds[name]
    left = y - z @ Gram.of(z, y, size[index]).solve(keep)
    freedom = (len(y) / max(len(y) - int(keep.sum()) - len(at), len(y) / 3)) ** 0.5
    spread = torch.stack([left[index == i].square().mean().sqrt() for i in at]) * freedom
    between = _interpolated(place[at[1:] - 1], _smoothed(spread[1:]), place)
    between = between + FLOOR * between.mean() + torch.finfo(torch.float64).tiny
    decoder = torch.maximum(spread[0], DECODER * between.sum())
    p = torch.cat([decoder[None], between])
    return p / p.sum()


def _smoothed(spread: Tensor) -> Tensor:
    """Each with its neighbours, in the mean of squares: a place alone is noisy."""
    square = torch.cat([spread[:1], spread, spread[-1:]]) ** 2
    return (0.25 * square[:-2] + 0.5 * square[1:-1] + 0.25 * square[2:]).sqrt()


def _interpolated(at: Tensor, values: Tensor, where: Tensor) -> Tensor:
    """Linear interpolation of values at increasing `at`, constant outside."""
    right = torch.searchsorted(at, where).clamp(1, max(len(at) - 1, 1))
    if len(at) == 1:
        return values.expand(len(where))
    left = right - 1
    share = ((where - at[left]) / (at[right] - at[left])).clamp(0, 1)
    return values[left] + share * (values[right] - values[left])


def expectation(controls: Sequence[Control], x_0: Tensor, times: Tensor) -> Tensor:
    """E[G_qi|x_0] (B, N−1, Q) on the CPU."""
    if not controls:
        return torch.zeros(len(x_0), len(times) - 1, 0, dtype=torch.float64)
    return torch.stack([control.expected(x_0, times).cpu() for control in controls], 2)


def fluctuation(
    controls: Sequence[Control], x_0: Tensor, x_t: Tensor, times: Tensor, index: Tensor
) -> Tensor:
    """G_q − E[G_q|x_0] (B, Q) at terms index (B,), on the CPU; 0 for the decoder."""
    out = torch.zeros(len(x_0), len(controls), dtype=torch.float64)
    pair = (index > 0).nonzero()[:, 0]
    if len(pair):
        here = pair.to(x_0.device)
        s, t = times[index[pair] - 1], times[index[pair]]
        for q, control in enumerate(controls):
            out[pair, q] = control.fluctuation(x_0[here], x_t[here], s, t).cpu()
    return out
