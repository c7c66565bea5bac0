r"""Tighter than the bound: importance weights of whole trajectories.

    p_θ(x_0) = E w,   log w = log p(x_N) − log q(x_N|x_0)
                            + Σ_pairs [log p_θ(x_s|x_t) − log q(x_s|x_t, x_0)] + log p_θ(x_0|x_1),

with x_N ~ q(x_N|x_0) and then x_s ~ q(x_s|x_t, x_0) downwards: one joint trajectory per weight.
With M of them,

    L_M(x_0) = −log (1/M) Σ_m w_m,   −log p_θ(x_0) ≤ E L_{M+1} ≤ E L_M ≤ E L_1 = L(x_0).

Neither the divergences of the bound nor independent draws of x_t can stand in for these
log-ratios: their sum has the right mean, but its exponential does not.

L_M is an upper bound of −log p_θ(x_0) in expectation, near it only where the effective sample size
(Σw)²/Σw² is well above one. So no figure of this module goes without M and that size beside it.
Latents are float64, whatever the network computes in: the weights then are exact for the p_θ whose
network sees rounded latents.

References:
    Burda, Grosse, Salakhutdinov 2016, Importance weighted autoencoders;
    Sohl-Dickstein et al. 2015, section 2.3 (the ratio over trajectories).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from nelbo.distributed import rank, total, world_size
from nelbo.distributions import per_example
from nelbo.errors import InputRefused, NumericalFailure, UsageError
from nelbo.estimate import Estimate
from nelbo.randomness import key, seeded
from nelbo.reverse import Prediction, Reverse

EXAMPLES, CELL = 32, 512
"""Most examples, and most trajectories, of a cell, which shares a random stream."""
FEW = 2.0
"""Below this effective sample size a single trajectory carries most of the weight."""


@dataclass(frozen=True)
class ImportanceWeighted:
    """The log weights of M joint trajectories of every example, and what follows from them.

    Arguments:
        log_w: (n, M) float64, nats.
        offset: nats per example of a density's units (Dataset.offset).
    """

    log_w: Tensor
    offset: float = 0.0

    @property
    def draws(self) -> int:
        """M."""
        return self.log_w.shape[1]

    @property
    def values(self) -> Tensor:
        """(n,) L_M, nats: above −log p_θ(x_0) in expectation."""
        return self.table(self.draws)[:, 0]

    @property
    def ess(self) -> Tensor:
        """(n,) effective sample size (Σw)²/Σw², from 1 to M; nan where all weights are zero."""
        size: Tensor = (2 * self.log_w.logsumexp(1) - (2 * self.log_w).logsumexp(1)).exp()
        return size

    def table(self, draws: int) -> Tensor:
        """L_m of disjoint groups of m trajectories.

        Arguments:
            draws: m, at most M.
        Returns:
            (n, ⌊M/m⌋) nats: independent replicates.
        """
        if not 1 <= draws <= self.draws:
            raise UsageError(f"{draws} trajectories are asked for, and {self.draws} were drawn")
        groups = self.draws // draws
        log_w = self.log_w[:, : groups * draws].unflatten(1, (groups, draws))
        values: Tensor = math.log(draws) - log_w.logsumexp(2) + self.offset
        return values

    def estimate(self, draws: int | None = None) -> Estimate:
        """The mean of L_m over the examples, nats per example.

        Arguments:
            draws: m; M by default. m = 1 is the bound itself.
        Returns:
            se_mc from the replicates where there are several, otherwise from the spread of the
            weights (delta method): sound only where the effective sample size is large.
        """
        draws = self.draws if draws is None else draws
        table = self.table(draws)
        if table.shape[1] > 1 or self.draws == 1:
            return Estimate.of(table)
        variance = (1 / self.ess - 1 / self.draws) * (self.draws / (self.draws - 1))
        error = float(variance.clamp(min=0).sum().sqrt()) / len(table)
        return Estimate.of(table[:, 0], se_mc_known=error)

    def bits_per_dim(self, dims: int, draws: int | None = None) -> Estimate:
        """`estimate` in bits per dimension."""
        return self.estimate(draws).bits_per_dim(dims)

    def curve(self) -> list[tuple[int, Estimate]]:
        """(m, L_m) for m = 1, 2, 4, … up to M: never rising, but for noise."""
        counts = [2**k for k in range(self.draws.bit_length())]
        return [(m, self.estimate(m)) for m in counts]

    def describe(self, dims: int | None = None) -> str:
        """One line with the figure, M and the effective sample sizes; bits/dim with `dims`."""
        figure = self.estimate() if dims is None else self.bits_per_dim(dims)
        median, least = float(self.ess.median()), float(self.ess.min())
        line = (
            f"-log p <= {figure} in expectation, from M = {self.draws} joint trajectories; "
            f"effective sample size {median:.1f} (median), {least:.1f} (least)"
        )
        if not median >= FEW:
            line += ": few trajectories carry the weights, and -log p may lie far below"
        return line

    def __str__(self) -> str:
        return self.describe()


def importance_weighted(
    model: Reverse,
    x_0: Tensor,
    times: Tensor,
    draws: int = 32,
    *,
    seed: int = 0,
    batch: int = 512,
    offset: float = 0.0,
    device: str | torch.device = "cpu",
    track: Callable[[int, int], None] = lambda done, total: None,
) -> ImportanceWeighted:
    """Draw M joint trajectories of every example and weigh them, N M network calls per example.

    Arguments:
        x_0: (n, *shape) examples on the model's scale, in the dtype of the network.
        times: (N,) increasing, float64: the grid of the model.
        draws: M.
        seed: the weights are a function of it, of n and M.
        batch: trajectories per network call, in whole cells of at most 512; changes only rounding.
        offset: nats per example of a density's units (Dataset.offset).
        track: told the number of calls done and planned, in trajectories.
    Raises:
        UsageError: draws is below 1. InputRefused: there are no examples.
        NumericalFailure: a weight is not a number.
    References:
        Burda, Grosse, Salakhutdinov 2016, eq. 8.
    """
    if draws < 1:
        raise UsageError(f"{draws} trajectories per example: at least one is needed")
    if len(x_0) == 0:
        raise InputRefused("no examples: an importance weight needs at least one")
    walker = _Walker(model, x_0, times, seed, device)
    log_w = torch.zeros(len(x_0), draws, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), seeded(seed, "importance"):
            for number, (done, cells) in enumerate(_batches(len(x_0), draws, batch)):
                if number % world_size() != rank():
                    continue  # whole groups are dealt to ranks
                for cell, values in zip(cells, walker.weights(cells), strict=True):
                    log_w[cell.examples, cell.draws] = values
                track(done * len(times), len(x_0) * draws * len(times))
    finally:
        model.train(was_training)
    total(log_w)  # of every weight one rank has the value, the others zero
    _refuse_nan(log_w)
    return ImportanceWeighted(log_w, offset)


class _Cell(NamedTuple):
    """A block of examples times a block of trajectories: one random stream."""

    examples: slice
    draws: slice

    @property
    def shape(self) -> tuple[int, int]:
        counts = [part.stop - part.start for part in self]
        return counts[0], counts[1]

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


def _batches(n: int, draws: int, batch: int) -> Iterator[tuple[int, list[_Cell]]]:
    """Groups of cells of about `batch` trajectories, and how many are done after each."""
    group: list[_Cell] = []
    done = 0
    each = CELL // min(n, EXAMPLES)
    for a in range(0, n, EXAMPLES):
        for b in range(0, draws, each):
            cell = _Cell(slice(a, min(a + EXAMPLES, n)), slice(b, min(b + each, draws)))
            if group and sum(c.size for c in group) + cell.size > batch:
                yield done, group
                group = []
            group.append(cell)
            done += cell.size
    if group:
        yield done, group


class _Walker:
    """Joint trajectories of one model, in float64."""

    def __init__(
        self,
        model: Reverse,
        x_0: Tensor,
        times: Tensor,
        seed: int,
        device: str | torch.device,
    ) -> None:
        self.model, self.times, self.seed = model, times, seed
        self.dtype = x_0.dtype
        self.x_0, self.device = x_0, device

    def weights(self, cells: list[_Cell]) -> list[Tensor]:
        """log w of each cell, (examples, draws)."""
        parts = [self.x_0[c.examples].repeat_interleave(c.shape[1], 0) for c in cells]
        x_0 = torch.cat(parts).to(self.device, torch.float64)
        values = self.walk(x_0, cells).cpu().split([cell.size for cell in cells])
        return [v.view(cell.shape) for v, cell in zip(values, cells, strict=True)]

    def walk(self, x_0: Tensor, cells: list[_Cell]) -> Tensor:
        """log w of every row, float64."""
        process, times = self.model.process, self.times
        top = len(times) - 1
        x_t = self.sample(cells, top, lambda rows: process.marginal(x_0[rows], times[top]))
        ratio = process.prior(x_t).log_prob(x_t)
        log_w = per_example(ratio - process.marginal(x_0, times[top]).log_prob(x_t))
        for i in range(top, 0, -1):
            x_s, gain = self.pair(x_0, x_t, i, cells)
            log_w, x_t = log_w + gain, x_s
        return log_w + per_example(self.at(x_t, times[0]).decoder().log_prob(x_0))

    def pair(self, x_0: Tensor, x_t: Tensor, i: int, cells: list[_Cell]) -> tuple[Tensor, Tensor]:
        """x_s ~ q(x_s|x_t, x_0), and log p_θ(x_s|x_t) − log q(x_s|x_t, x_0)."""
        t, s = self.times[i], self.times[i - 1]
        posterior = self.model.process.posterior
        x_s = self.sample(cells, i - 1, lambda rows: posterior(x_t[rows], x_0[rows], t, s))
        kernel = self.at(x_t, t).kernel(s)
        ratio = kernel.log_prob(x_s) - posterior(x_t, x_0, t, s).log_prob(x_s)
        return x_s, per_example(ratio)

    def at(self, x_t: Tensor, t: Tensor) -> Prediction:
        """A network call in the network's dtype; kernels from it are float64."""
        output = self.model.network(x_t.to(self.dtype), t, None)
        return Prediction(self.model, x_t, t, output.double())

    def sample(
        self, cells: list[_Cell], step: int, law: Callable[[slice], Distribution]
    ) -> Tensor:
        """A draw for all rows, each cell from its own stream (inside `seeded`)."""
        parts, start = [], 0
        for cell in cells:
            block = (cell.examples.start, cell.draws.start)
            torch.manual_seed(key(self.seed, "importance", *block, step))
            parts.append(law(slice(start, start + cell.size)).sample())
            start += cell.size
        return torch.cat(parts)


def _refuse_nan(log_w: Tensor) -> None:
    bad = log_w.isnan().any(1).nonzero().flatten().tolist()
    if bad:
        raise NumericalFailure(
            f"{len(bad)} of {len(log_w)} examples have a trajectory whose weight is not a number, "
            f"the first ones {bad[:8]}: the model's output is not finite there"
        )
