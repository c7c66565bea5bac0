"""What every contestant does: update on a batch, call the network, sample.

All get the same images, already on the device and in [-1, 1], the same batch, the same number of
network calls in sampling (DDIM, eta 0). Each trains to predict the noise by its own code, with
its own optimiser, clipping and average of the weights where its training loop has them. None is
charged for loading data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

RATE = 2e-4
STEPS = 1000
"""T of the linear schedule of betas that all train on."""


class Absent(Exception):
    """A project that cannot take part, and why."""


@dataclass(frozen=True)
class Setting:
    """The network of Ho et al. (2020) in some size, and how much of it is done at once."""

    name: str
    size: int
    channels: int
    multipliers: tuple[int, ...]
    layers: int
    attention: int
    """The resolution with attention; the middle of the network has it as well."""
    batch: int
    calls: int
    """Network calls of one drawn batch."""
    draws: int
    """Images that are drawn at once."""

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def attends(self) -> tuple[bool, ...]:
        """By level, finest first."""
        return tuple(self.size >> i == self.attention for i in range(len(self.multipliers)))

    def with_batch(self, batch: int | None) -> Setting:
        return self if batch is None else replace(self, batch=batch, draws=batch)


BIG = Setting("ddpm-cifar10", 32, 128, (1, 2, 2, 2), 2, 16, batch=256, calls=20, draws=256)
SMALL = Setting("small", 32, 32, (1, 2, 2), 1, 16, batch=16, calls=4, draws=16)


@dataclass(frozen=True)
class Tuning:
    """How a contestant is run."""

    name: str
    bf16: bool = False
    channels_last: bool = False
    compiled: bool = False

    def prepare(self, network: nn.Module) -> None:
        """Change a network in place."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compiled:
            network.compile()

    def context(self, device: str) -> Any:
        return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.bf16)

    def images(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


SHIPPED = Tuning("as shipped")
WANTED: str | None = None
"""The name of the only tuning that is built; None for all."""


def tunings(device: str, compiled: bool) -> list[Tuning]:
    """As shipped, and what a user who cares for speed would do on this device."""
    found = [SHIPPED]
    if device == "cpu":
        found += [Tuning("channels-last", channels_last=True)]
        found += [Tuning("bf16", bf16=True, channels_last=True)]
        tuned = Tuning("compiled", channels_last=True, compiled=True)
    else:
        found += [Tuning("bf16", bf16=True)]
        tuned = Tuning("tuned", bf16=True, channels_last=True, compiled=True)
    every = [*found, tuned] if compiled else found
    return [tuning for tuning in every if WANTED in (None, tuning.name)]


@dataclass(frozen=True)
class Contestant:
    """One project in one tuning; every call does the work of one batch."""

    project: str
    tuning: Tuning
    network: nn.Module
    update: Callable[[], Any]
    predict: Callable[[], Tensor]
    sample: Callable[[], Tensor]
    evaluate: Callable[[int | None], float] | None = None
    """Network calls per image, or None for every term on `calls` times; None: it has no bound."""

    @property
    def name(self) -> str:
        return f"{self.project}, {self.tuning.name}"


def images(setting: Setting, device: str, batches: int = 4) -> Tensor:
    """(batches, B, 3, size, size) uint8 noise: what it shows does not matter to a clock."""
    draw = torch.Generator().manual_seed(0)
    shape = (batches, setting.batch, 3, setting.size, setting.size)
    return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8).to(device)


def scaled(levels: Tensor) -> Tensor:
    """Levels 0..255 on [-1, 1]."""
    return levels.float() / 127.5 - 1
