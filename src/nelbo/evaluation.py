r"""The bound over a data set: every term, or a few network calls per example, with measured errors.

*Full*: all N terms of every example, each with its own draw. *Few calls*: K network calls per
example, in two independent replicates. Each replicate measures the decoder term once and spends
its other k calls on the pair terms: a number v ∈ (0, 1) picks the pair i = F⁻¹(v) under a
probability p_i proportional to the spread of term_i (found beforehand on training examples), and

    diffusion ≈ (1/k) Σ_j term_{i_j}/p_{i_j},   v_j = (u + j)/m and (1 − u + j)/m,  j < m = k/2,

two mirrored nodes in each of m strata (and one node in a stratum of half the width if k is odd).
Every node is uniform on its stratum, so the estimate is unbiased; where term/p is linear within a
stratum the placing of the nodes costs nothing. The prior term is exact.

Randomness belongs to blocks of examples numbered by their place in the data set, never to batches:
the batch size changes nothing but float rounding, and whole batches are dealt to ranks.

References:
    Neyman 1934 (allocation to strata); Hammersley, Morton 1956 (antithetic, mirrored nodes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nelbo.bound import prior_term, term_of
from nelbo.distributed import gather, rank, world_size
from nelbo.errors import NumericalFailure, UsageError
from nelbo.estimate import Estimate
from nelbo.randomness import seeded
from nelbo.reverse import Reverse

BLOCK = 64
"""Examples that share a random stream."""
TERMS = ("prior", "diffusion", "reconstruction", "total")


@dataclass(frozen=True)
class Integrand:
    """The diffusion term as a density over log-SNR, nats per unit of log-SNR per example."""

    logsnr: Tensor
    mean: Tensor
    se: Tensor


@dataclass(frozen=True)
class Evaluation:
    """The bound of every example by term, nats, float64.

    Arguments:
        prior: (n,). diffusion, reconstruction: (n, R), R replicates.
        noise: (n,) Monte-Carlo variance of an example's total, where one replicate was measured
            from the roughness of its terms; None where replicates tell.
        calls: network calls per example. pilot_calls: calls on training examples, in all.
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    calls: float
    noise: Tensor | None = None
    pilot_calls: int = 0
    integrand: Integrand | None = None
    offset: float = field(default=0.0)
    """Nats per example added to the reconstruction: the units of a density (Dataset.offset)."""

    def values(self) -> dict[str, Tensor]:
        """(n,) nats per example by term, the mean over replicates."""
        table = {
            "prior": self.prior,
            "diffusion": self.diffusion.mean(1),
            "reconstruction": self.reconstruction.mean(1) + self.offset,
        }
        table["total"] = table["prior"] + table["diffusion"] + table["reconstruction"]
        return table

    def estimates(self) -> dict[str, Estimate]:
        """Nats per example by term, with se (examples and noise) and se_mc (noise alone)."""
        total = self.prior[:, None] + self.diffusion + self.reconstruction + self.offset
        known = None if self.noise is None else float(self.noise.sum().sqrt() / len(self.noise))
        return {
            "prior": Estimate.of(self.prior, exact=True),
            "diffusion": Estimate.of(self.diffusion, se_mc_known=known),
            "reconstruction": Estimate.of(self.reconstruction + self.offset),
            "total": Estimate.of(total, se_mc_known=known),
        }


def evaluate(
    model: Reverse,
    data: Tensor,
    times: Tensor,
    *,
    encode: Callable[[Tensor], Tensor] = lambda y: y,
    calls: int | None = None,
    pilot: Tensor | None = None,
    replicates: int | None = None,
    batch: int = 512,
    seed: int = 0,
    offset: float = 0.0,
    device: str | torch.device = "cpu",
    track: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure the bound of every example.

    Arguments:
        data: (n, *shape) stored examples; `encode` turns rows into the model's scale.
        times: (N,) the grid of the bound.
        calls: network calls per example, at least 4; None for the full bound.
        pilot: (m, *shape) stored training examples on which the strata are fixed (few calls).
        replicates: of the full bound; by default 2 up to 64 latents, above that 1, whose noise is
            read off the roughness of neighbouring terms.
        batch: examples per network call; any value gives the same figures up to rounding.
        track: told the number of calls done and planned, in examples.
    Raises:
        UsageError: too few calls, or no training examples for the strata.
        NumericalFailure: an example has no finite bound.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            worker = _Worker(model, data, encode, times, batch, seed, device, track)
            if calls is None or calls >= len(times):
                result = worker.full(replicates or (2 if len(times) <= 64 else 1))
            else:
                result = worker.few(calls, pilot)
    finally:
        model.train(was_training)
    _check_finite(result)
    return Evaluation(**{**result.__dict__, "offset": offset})


def _check_finite(result: Evaluation) -> None:
    bad = (~torch.isfinite(result.values()["total"])).nonzero().flatten().tolist()
    if bad:
        raise NumericalFailure(
            f"the bound of {len(bad)} examples is not finite, the first ones {bad[:8]}: the model "
            "gives them zero probability or its output is not a number"
        )


@dataclass
class _Worker:
    """One evaluation: what stays fixed while it walks over batches."""

    model: Reverse
    data: Tensor
    encode: Callable[[Tensor], Tensor]
    times: Tensor
    batch: int
    seed: int
    device: str | torch.device
    track: Callable[[int, int], None]
    done: int = 0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, x_0) of the batches of this rank; whole blocks, fixed by place in the data."""
        size = max(self.batch // BLOCK, 1) * BLOCK
        for number, rows in enumerate(torch.arange(len(self.data)).split(size)):
            if number % world_size() == rank():
                yield rows, self.encode(self.data[rows]).to(self.device)

    def latent(self, x_0: Tensor, rows: Tensor, t: Tensor, *purpose: str | int) -> Tensor:
        """x_t ~ q(x_t|x_0), each block of examples from its own stream."""
        parts = []
        for start in range(0, len(rows), BLOCK):
            part = slice(start, start + BLOCK)
            block = int(rows[start]) // BLOCK
            here = t if t.dim() == 0 else t[part]
            with seeded(self.seed, "evaluation", *purpose, block):
                parts.append(self.model.process.marginal(x_0[part], here).sample())
        return torch.cat(parts)

    def one(self, x_0: Tensor, rows: Tensor, index: Tensor, *purpose: str | int) -> Tensor:
        """(B,) one term per example: one network call each."""
        t = self.times[index]
        x_t = self.latent(x_0, rows, t, *purpose)
        value = term_of(self.model.at(x_t, t), x_0, self.times, index)
        self.done += len(rows)
        return value.cpu()

    def tick(self, per_example: float) -> None:
        self.track(self.done, round(per_example * len(self.data) / world_size()))

    # --- every term --------------------------------------------------------------------------

    def full(self, replicates: int) -> Evaluation:
        """All N terms, `replicates` times; with one replicate the decoder is drawn twice."""
        n = len(self.times)
        calls = float(max(replicates * n, n + 1))
        columns = [self._full_batch(x_0, rows, replicates, calls) for rows, x_0 in self.batches()]
        prior, terms, decoder = (self._collect([c[k] for c in columns]) for k in range(3))
        pairs = terms.mean(2)
        noise = None
        if replicates == 1:
            noise = _roughness(pairs) + decoder.var(1) / decoder.shape[1]
        return Evaluation(
            prior, terms.sum(1), decoder, calls, noise, integrand=self._integrand(pairs)
        )

    def _full_batch(
        self, x_0: Tensor, rows: Tensor, replicates: int, calls: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = len(self.times)
        terms = torch.empty(len(rows), n - 1, replicates, dtype=torch.float64)
        decoder = torch.empty(len(rows), max(replicates, 2), dtype=torch.float64)
        for r in range(decoder.shape[1]):
            decoder[:, r] = self.one(x_0, rows, torch.tensor(0), "full", r, 0)
        for r in range(replicates):
            for i in range(1, n):
                terms[:, i - 1, r] = self.one(x_0, rows, torch.tensor(i), "full", r, i)
                self.tick(calls)
        return prior_term(self.model, x_0, self.times).cpu(), terms, decoder

    def _collect(self, parts: list[Tensor]) -> Tensor:
        """Batches of all ranks in the order of the data set."""
        mine = parts[0].new_empty(0, *parts[0].shape[1:]) if not parts else torch.cat(parts)
        if world_size() == 1:
            return mine
        shares = [list(share.split(self._sizes(r))) for r, share in enumerate(gather(mine))]
        total = sum(len(share) for share in shares)
        return torch.cat([shares[b % world_size()][b // world_size()] for b in range(total)])

    def _sizes(self, of_rank: int) -> list[int]:
        size = max(self.batch // BLOCK, 1) * BLOCK
        lengths = [len(rows) for rows in torch.arange(len(self.data)).split(size)]
        return lengths[of_rank :: world_size()]

    def _integrand(self, pairs: Tensor) -> Integrand:
        logsnr = self.model.process.schedule.logsnr(self.times).cpu()
        width = logsnr[:-1] - logsnr[1:]
        n = len(pairs)
        density = pairs / width
        centre = 0.5 * (logsnr[:-1] + logsnr[1:])
        return _binned(centre, density.mean(0), density.std(0) / math.sqrt(max(n, 1)), 200)

    # --- few calls ---------------------------------------------------------------------------

    def few(self, calls: int, pilot: Tensor | None) -> Evaluation:
        """`calls` network calls per example in two independent replicates."""
        if calls < 4:
            raise UsageError(
                f"--calls {calls}: at least 4 are needed (two replicates of the decoder term and "
                "one pair term each), or leave it out for the full bound"
            )
        if pilot is None or len(pilot) == 0:
            raise UsageError("few calls need training examples to fix the strata on")
        probability = self.profile(pilot)
        pilot_calls, self.done = self.done, 0
        out: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        for rows, x_0 in self.batches():
            out.append(self._few_batch(x_0, rows, calls, probability))
        prior, diffusion, decoder, index, terms = (
            self._collect([o[k] for o in out]) for k in range(5)
        )
        return Evaluation(
            prior,
            diffusion,
            decoder,
            float(calls),
            pilot_calls=pilot_calls,
            integrand=self._scattered(index, terms),
        )

    def _few_batch(
        self, x_0: Tensor, rows: Tensor, calls: int, probability: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        cdf = probability.cumsum(0)
        decoder, diffusion, indices, terms = [], [], [], []
        for r in range(2):
            decoder.append(self.one(x_0, rows, torch.tensor(0), "few", r, "decoder"))
            k = calls // 2 - 1 + (calls % 2 if r == 0 else 0)
            estimate = torch.zeros(len(rows), dtype=torch.float64)
            for j, v in enumerate(self._nodes(rows, k, r)):
                index = torch.searchsorted(cdf, v * cdf[-1], right=True).clamp(max=len(cdf) - 1)
                value = self.one(x_0, rows, index + 1, "few", r, j)
                estimate += value / probability[index] / k
                indices.append(index)
                terms.append(value)
                self.tick(calls)
            diffusion.append(estimate)
        return (
            prior_term(self.model, x_0, self.times).cpu(),
            torch.stack(diffusion, 1),
            torch.stack(decoder, 1),
            torch.stack(indices, 1),
            torch.stack(terms, 1),
        )

    def _nodes(self, rows: Tensor, k: int, replicate: int) -> list[Tensor]:
        """k numbers per example, (B,) each, mirrored within strata of width 2/k."""
        u = self._uniform(rows, k, replicate)
        nodes = []
        for j in range(k // 2):
            nodes += [(2 * j + 2 * u[:, 0]) / k, (2 * j + 2 - 2 * u[:, 0]) / k]
        if k % 2:
            nodes.append((k - 1 + u[:, 1]) / k)
        return nodes

    def _uniform(self, rows: Tensor, k: int, replicate: int) -> Tensor:
        parts = []
        for start in range(0, len(rows), BLOCK):
            size = min(BLOCK, len(rows) - start)
            with seeded(self.seed, "nodes", k, replicate, int(rows[start]) // BLOCK):
                parts.append(torch.rand(size, 2, dtype=torch.float64))
        return torch.cat(parts)

    def profile(self, pilot: Tensor, points: int = 48) -> Tensor:
        """(N−1,) probabilities of the pairs, proportional to the spread of their terms.

        The spread of the noise within an example, averaged over pilot examples, is measured at
        `points` pairs with two draws each, interpolated, and mixed with 5 % of its own mean, so
        that no pair is left out.
        """
        pairs = len(self.times) - 1
        x_0 = self.encode(pilot).to(self.device)
        rows = torch.arange(len(pilot))
        at = torch.linspace(0, pairs - 1, min(points, pairs)).round().long().unique()
        spread = torch.empty(len(at), dtype=torch.float64)
        for j, i in enumerate(at):
            a, b = (self.one(x_0, rows, i + 1, "pilot", r, j) for r in range(2))
            spread[j] = (0.5 * (a - b) ** 2).mean().sqrt()
        return _interpolated(at, spread, pairs)

    def _scattered(self, index: Tensor, terms: Tensor) -> Integrand:
        """The integrand from scattered terms: their mean and error in bins of log-SNR (to plot)."""
        logsnr = self.model.process.schedule.logsnr(self.times).cpu()
        width, centre = logsnr[:-1] - logsnr[1:], 0.5 * (logsnr[:-1] + logsnr[1:])
        density, place = (terms / width[index]).flatten(), index.flatten()
        bins = min(40, len(width))
        of = (place * bins // len(width)).long()
        count = torch.bincount(of, minlength=bins).double()
        mean = torch.zeros(bins, dtype=torch.float64).index_add(0, of, density) / count
        square = torch.zeros(bins, dtype=torch.float64).index_add(0, of, (density - mean[of]) ** 2)
        where = torch.zeros(bins, dtype=torch.float64).index_add(0, of, centre[place]) / count
        seen = count > 1
        se = (square / (count - 1) / count).sqrt()
        return Integrand(where[seen], mean[seen], se[seen])


def _interpolated(at: Tensor, spread: Tensor, pairs: int) -> Tensor:
    i = torch.arange(pairs)
    right = torch.searchsorted(at, i).clamp(max=len(at) - 1)
    left = (right - 1).clamp(min=0)
    gap = (at[right] - at[left]).clamp(min=1)
    share = ((i - at[left]).double() / gap).clamp(0, 1)
    profile = spread[left] + share * (spread[right] - spread[left])
    profile = profile + 0.05 * profile.mean() + torch.finfo(torch.float64).tiny
    return profile / profile.sum()


def _roughness(pairs: Tensor) -> Tensor:
    """(n,) Monte-Carlo variance of Σ_i term_i from one draw each.

    Second differences (a − 2b + c)²/6 of neighbouring terms have the variance of one of them as
    their mean, plus a little where the expected terms bend: on the safe side.
    """
    if pairs.shape[1] < 3:
        return torch.full((len(pairs),), math.nan, dtype=torch.float64)
    second = pairs[:, :-2] - 2 * pairs[:, 1:-1] + pairs[:, 2:]
    return (second**2).mean(1) / 6 * pairs.shape[1]


def _binned(x: Tensor, mean: Tensor, se: Tensor, most: int) -> Integrand:
    """At most `most` points: neighbouring pairs averaged (their noise is independent)."""
    size = math.ceil(len(x) / most)
    chunks = [slice(a, a + size) for a in range(0, len(x), size)]
    return Integrand(
        torch.stack([x[c].mean() for c in chunks]),
        torch.stack([mean[c].mean() for c in chunks]),
        torch.stack([se[c].mean() for c in chunks]),
    )
