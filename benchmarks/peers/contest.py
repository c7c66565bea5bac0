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
    terms: int = 16
    """Times of a full bound: all of its terms are computed for a batch."""

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def attends(self) -> tuple[bool, ...]:
        """By level, finest first."""
        return tuple(self.size >> i == self.attention for i in range(len(self.multipliers)))

    def with_batch(self, batch: int | None) -> Setting:
        return self if batch is None else replace(self, batch=batch, draws=batch)


BIG = Setting(
    "ddpm-cifar10", 32, 128, (1, 2, 2, 2), 2, 16, batch=256, calls=20, draws=256, terms=100
)
SMALL = Setting("small", 32, 32, (1, 2, 2), 1, 16, batch=16, calls=4, draws=16)


@dataclass(frozen=True)
class Tuning:
    """How a contestant is run."""

    name: str
    bf16: bool = False
    channels_last: bool = False
    compiled: bool = False
    batch: int | None = None
    """Images at once, where it is not the setting's."""

    def of(self, setting: Setting) -> Setting:
        """The setting with this batch."""
        return setting.with_batch(self.batch)

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
MANY = 512
"""A larger batch, by which some gain on a GPU."""
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
    if device != "cpu":
        every += [replace(every[-1], name=f"{every[-1].name}, batch {MANY}", batch=MANY)]
    return [tuning for tuning in every if WANTED in (None, tuning.name)]


@dataclass(frozen=True)
class Contestant:
    """One project in one tuning; every call does the work of one batch."""

    project: str
    tuning: Tuning
    setting: Setting
    network: nn.Module
    through: Callable[[], Tensor]
    """The network alone, with a gradient."""
    update: Callable[[], Any]
    sample: Callable[[], Tensor]
    evaluate: Callable[[int | None], float] | None = None
    """Calls per image, or None for every term on `terms` times -> network calls in all; None: it
    has no bound."""
    resident: int = 0
    """Bytes of the device that it takes once it is built."""

    @property
    def name(self) -> str:
        return f"{self.project}, {self.tuning.name}"

    @torch.no_grad()
    def predict(self) -> Tensor:
        """A forward call."""
        return self.through()

    def backward(self) -> None:
        """A forward and a backward call of the network, and nothing else of an update."""
        self.network.train()
        self.network.zero_grad(set_to_none=True)
        self.through().float().square().mean().backward()


def each(
    project: str,
    setting: Setting,
    found: list[Tuning],
    make: Callable[[Setting, Tuning], Contestant],
) -> list[Contestant]:
    """One contestant for each tuning; one that cannot be built fails at every work.

    Raises:
        Absent: the project cannot take part at all.
    """
    made = []
    for tuning in found:
        here, before = tuning.of(setting), torch.cuda.memory_allocated()
        try:
            one = make(here, tuning)
            made.append(replace(one, resident=torch.cuda.memory_allocated() - before))
        except Absent:
            raise
        except Exception as error:  # what cannot be built is a result
            made.append(_broken(project, here, tuning, error))
    return made


def _broken(project: str, setting: Setting, tuning: Tuning, error: Exception) -> Contestant:
    def fails() -> Any:
        raise error

    return Contestant(project, tuning, setting, nn.Identity(), fails, fails, fails)


def configuration(setting: Setting) -> dict[str, Any]:
    """Keys of `UNet2DModel` for the network of Ho et al. (2020)."""
    kinds = ["AttnDownBlock2D" if a else "DownBlock2D" for a in setting.attends]
    return {
        "sample_size": setting.size,
        "block_out_channels": list(setting.widths),
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in kinds[::-1]],
        "layers_per_block": setting.layers,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    }


def images(setting: Setting, device: str, batches: int = 4) -> Tensor:
    """(batches, B, 3, size, size) uint8 noise: what it shows does not matter to a clock."""
    draw = torch.Generator().manual_seed(0)
    shape = (batches, setting.batch, 3, setting.size, setting.size)
    return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8).to(device)


def scaled(levels: Tensor) -> Tensor:
    """Levels 0..255 on [-1, 1]."""
    return levels.float() / 127.5 - 1
