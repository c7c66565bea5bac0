r"""Terms of the bound for many examples, with noise that belongs to the examples.

Randomness is keyed by blocks of examples, numbered by their place in the data set, and by the
purpose of the draw; never by batches. The batch size therefore changes nothing but float rounding,
and whole batches are dealt to ranks: the values of an example are the same at any world size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.bound import term_of
from nelbo.distributed import in_order, rank, world_size
from nelbo.errors import NumericalFailure
from nelbo.randomness import seeded
from nelbo.reverse import Reverse

BLOCK = 64
"""Examples that share a random stream."""


@dataclass(frozen=True)
class Integrand:
    """The diffusion term as a density over log-SNR, nats per unit of log-SNR per example."""

    logsnr: Tensor
    mean: Tensor
    se: Tensor


@dataclass
class Drawer:
    """Draws terms of one model on one data set.

    Arguments:
        data: (n, *shape) stored examples; `encode` turns rows into the model's scale.
        times: (N,) the grid. batch: examples per network call, rounded to whole blocks.
        track: told the number of network calls done and planned on this rank, in examples.
    """

    model: Reverse
    data: Tensor
    encode: Callable[[Tensor], Tensor]
    times: Tensor
    batch: int
    seed: int
    device: str | torch.device
    track: Callable[[int, int], None]
    done: int = 0

    @property
    def _size(self) -> int:
        return max(self.batch // BLOCK, 1) * BLOCK

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, x_0) of the batches of this rank: whole blocks, in the order of the data set."""
        for number, rows in enumerate(torch.arange(len(self.data)).split(self._size)):
            if number % world_size() == rank():
                yield rows, self.encode(self.data[rows]).to(self.device)

    def latent(self, x_0: Tensor, rows: Tensor, t: Tensor, *purpose: str | int) -> Tensor:
        """x_t ~ q(x_t|x_0), each block of examples from its own stream; t () or (B,)."""
        parts = []
        for part, block in _blocks(rows):
            with seeded(self.seed, "evaluation", *purpose, block):
                here = t if t.dim() == 0 else t[part]
                parts.append(self.model.process.marginal(x_0[part], here).sample())
        return torch.cat(parts)

    def uniform(self, rows: Tensor, count: int, *purpose: str | int) -> Tensor:
        """(B, count) float64 in [0, 1), each block of examples from its own stream."""
        parts = []
        for part, block in _blocks(rows):
            with seeded(self.seed, "evaluation", *purpose, block):
                parts.append(torch.rand(len(rows[part]), count, dtype=torch.float64))
        return torch.cat(parts)

    def term(
        self, x_0: Tensor, rows: Tensor, index: Tensor, *purpose: str | int
    ) -> tuple[Tensor, Tensor]:
        """One term per example by one network call each, index () or (B,).

        Returns:
            the terms (B,) float64 on the CPU, and the x_t (B, *shape) that they were drawn at.
        """
        x_t = self.latent(x_0, rows, self.times[index], *purpose)
        return self.value(x_t, x_0, index), x_t

    def value(self, x_t: Tensor, x_0: Tensor, index: Tensor) -> Tensor:
        """(B,) float64 on the CPU: the terms at given latents, one network call each."""
        t = self.times[index]
        self.done += len(x_0)
        return term_of(self.model.at(x_t, t), x_0, self.times, index).cpu()

    def tick(self, calls: float) -> None:
        """Report progress towards `calls` per example."""
        self.track(self.done, round(calls * len(self.data) / world_size()))

    def collect(self, parts: list[Tensor], width: tuple[int, ...]) -> Tensor:
        """Values of all batches, (n, *width) in the order of the data set, on every rank."""
        mine = torch.cat(parts) if parts else torch.empty(0, *width, dtype=torch.float64)
        sizes = [len(rows) for rows in torch.arange(len(self.data)).split(self._size)]
        return in_order(mine, sizes)


def _blocks(rows: Tensor) -> Iterator[tuple[slice, int]]:
    for start in range(0, len(rows), BLOCK):
        yield slice(start, start + BLOCK), int(rows[start]) // BLOCK


def check_finite(values: Tensor) -> None:
    """Refuse examples (n,) without a finite value."""
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        raise NumericalFailure(
            f"the bound of {len(bad)} examples is not finite, the first ones {bad[:8]}: the model "
            "gives them zero probability or its output is not a number"
        )
