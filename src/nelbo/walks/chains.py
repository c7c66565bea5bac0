"""Drawing from a chain exactly as its bound describes it: its own grid, its decoder included."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo import console
from nelbo.distributed import gather, in_order, rank, world_size
from nelbo.distributions import DiagonalNormal
from nelbo.randomness import seeded
from nelbo.recipes.recipe import Subject
from nelbo.reverse import Reverse
from nelbo.samplers import Ancestral, Sampler, State, sample

CHUNK, BLOCK = 1024, 512


def draws(subject: Subject, way: Sampler, device: str, quiet: bool) -> Callable[[int], Tensor]:
    """n -> stored rows drawn by walking the subject's model over its grid, decoder included.

    A chunk of 1024 rows is a function of the caller's seed and its number: ranks draw in turn, and
    all have the rows of all.
    """
    dataset, times = subject.dataset, subject.times

    def draw(count: int) -> Tensor:
        seed = int(torch.randint(2**62, ()))
        out: list[Tensor] = [dataset.decode(torch.zeros(1, *dataset.shape()))[:0]]
        sizes = [min(CHUNK, count - done) for done in range(0, count, CHUNK)]
        model = subject.model.to(device)
        with console.Meter("sample", len(sizes) * (len(times) + 1), "steps", quiet) as meter:
            for number in range(rank(), len(sizes), world_size()):
                with seeded(seed, "chain", number):
                    walk = sample(model, way, times, (sizes[number], *dataset.shape()), device)
                    for k, (_, now) in enumerate(walk):
                        meter.update(number * (len(times) + 1) + k + 1)
                        x_t = now
                out.append(dataset.decode(x_t.cpu()))
        return in_order(torch.cat(out), sizes)

    return draw


@dataclass(frozen=True)
class Means:
    """A law that is that of some points, blurred: N(centre, std^2 I) around each.

    Arguments:
        centres: (n, D) stored units. std: of the normal decoder around its mean.
    """

    centres: Tensor
    std: float

    def log_prob(self, points: Tensor) -> Tensor:
        """(B, D) -> (B,) nats: log of the mean of the normal densities around all centres."""
        scale = self.std * math.sqrt(2 * math.pi)
        constant = math.log(len(self.centres)) + self.centres.shape[1] * math.log(scale)
        parts = [
            (-0.5 * (torch.cdist(some, self.centres) / self.std) ** 2).logsumexp(1)
            for some in points.double().split(BLOCK)
        ]
        return torch.cat(parts) - constant


class _Last(Sampler):
    """The ancestral walk, up to the decoder's mean; remembers the decoder's deviation."""

    def __init__(self) -> None:
        self.spreads: set[float] = set()

    def step(
        self, model: Reverse, x_t: Tensor, t: Tensor, s: Tensor, state: State
    ) -> tuple[Tensor, State]:
        return Ancestral().step(model, x_t, t, s, state)

    def finish(self, model: Reverse, x_1: Tensor, t_1: Tensor, state: State) -> Tensor:
        law = model.decoder(x_1, t_1)
        if not isinstance(law, DiagonalNormal):
            drawn: Tensor = law.sample()
            return drawn
        self.spreads |= set(law.logvar.double().exp().sqrt().unique().tolist())
        return law.mean


def centres(subject: Subject, device: str, quiet: bool) -> Callable[[int], Means | None]:
    """n -> the decoder's means of n walks; None if it is not one normal law everywhere."""

    def draw(count: int) -> Means | None:
        way, scale = _Last(), torch.as_tensor(subject.dataset.scale)
        if subject.dataset.levels is not None or scale.numel() > 1:
            return None
        points = draws(subject, way, device, quiet)(count)
        own = torch.tensor(sorted(way.spreads), dtype=torch.float64)
        spreads = set(torch.cat(gather(own)).tolist())
        if len(spreads) != 1:
            return None
        return Means(points.double(), spreads.pop() * float(scale))

    return draw
