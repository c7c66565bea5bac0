"""Exponential moving averages of weights, kept in float32 beside a model.

The decay is a rule of the update number: `Warming` for diffusion, `Halving` by examples for games.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nelbo.sharding import copy_into

Decay = Callable[[int], float]
"""Decay of an average at the update with a 0-based number."""


@dataclass(frozen=True)
class Warming:
    """min(d, (1 + k)/(10 + k)) at update k, so that early weights are forgotten quickly.

    Arguments:
        decay: d; 0 follows the weights exactly.
    """

    decay: float

    def __call__(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Halving:
    """.5^(batch/n): a weight counts half after n examples, n = min(most, ramp * examples so far).

    Arguments:
        most: n after the beginning. batch: examples of an update. ramp: share of the past.
    References:
        Karras et al. 2020, Analyzing and improving the image quality of StyleGAN (their code).
    """

    most: float
    batch: int
    ramp: float = 0.05

    def __call__(self, step: int) -> float:
        half = min(self.most, self.ramp * self.batch * (step + 1))
        return 0.5 ** (self.batch / half) if half > 0 else 0.0


class EMA:
    """A float32 moving average of a module's floating tensors, as a module of its own.

    Arguments:
        module: what is averaged.
        decay: by update.
        dealt: a copy of a module that is dealt to ranks, dealt as well, and a whole one beside it.
    """

    def __init__(
        self, module: nn.Module, decay: Decay, dealt: tuple[nn.Module, nn.Module] | None = None
    ) -> None:
        self.decay = decay
        self._whole: nn.Module | None = None if dealt is None else dealt[1]
        shadow = copy.deepcopy(module) if dealt is None else dealt[0]
        self.module = shadow.eval().requires_grad_(False)
        for parameter in self.module.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()

    def whole(self) -> nn.Module:
        """The average as a module to compute with; all ranks come here."""
        if self._whole is None:
            return self.module
        copy_into(self._whole, self.module)
        return self._whole.eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards `module` after the update with 0-based number `step`."""
        shadow, current = self._pairs(module)
        torch._foreach_lerp_(shadow, current, 1 - self.decay(step))

    @torch.no_grad()
    def follow(self, module: nn.Module, weight: Tensor) -> None:
        """Move towards `module` by a weight () that lies on its device and is 1 − decay, or 0."""
        shadow, current = self._pairs(module)
        difference = torch._foreach_sub(current, shadow)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(shadow, difference)

    def _pairs(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Averages and what they average; buffers are copied."""
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)
        shadow: list[Tensor] = list(self.module.parameters())
        pairs = zip(module.parameters(), shadow, strict=True)
        return shadow, [theirs.detach().to(mine.dtype) for theirs, mine in pairs]
