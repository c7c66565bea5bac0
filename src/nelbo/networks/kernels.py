r"""Normalisation and activation in one step, y = act(γ (h − μ)/√(v + ε) + β), h = x + shift.

Per example, μ and v are taken over a group of channels and all positions (Wu and He, 2018). A
U-Net does this before nearly every convolution, and it moves more memory than any other part of
it: written out it reads x for μ and v, reads it again, writes the normalised array, reads that and
writes the activated one. `Plain` is written in torch's own functions, works everywhere, and is
what every other implementation is tested to equal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Act = Callable[[Tensor], Tensor]


class Kernels(ABC):
    """How the blocks of a network are computed; no tensors, and no name in a state dict."""

    name: str
    """What a run says of it."""

    @abstractmethod
    def normalised(self, x: Tensor, norm: nn.GroupNorm, act: Act) -> Tensor:
        """act(norm(x)), (B, C, H, W)."""

    @abstractmethod
    def timed(
        self, x: Tensor, conv: nn.Conv2d, time: Tensor, norm: nn.GroupNorm, act: Act
    ) -> Tensor:
        """act(norm(conv(x) + time)), x (B, C, H, W), time (B, C')."""


class Plain(Kernels):
    """torch's own functions, in any dtype, on any device."""

    name = "plain"

    def normalised(self, x: Tensor, norm: nn.GroupNorm, act: Act) -> Tensor:
        return act(norm(x))

    def timed(
        self, x: Tensor, conv: nn.Conv2d, time: Tensor, norm: nn.GroupNorm, act: Act
    ) -> Tensor:
        return act(norm(conv(x) + time[:, :, None, None]))


PLAIN = Plain()


def activated(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None) -> Tensor:
    """The eager twin of the fused kernel: SiLU(norm(x + shift)), in the dtype of x.

    Arguments:
        x: (B, C, H, W). shift: (B, C) or None.
    """
    h = x.float() if shift is None else x.float() + shift.float()[:, :, None, None]
    normed = F.group_norm(h, norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
    return F.silu(normed).to(x.dtype)
