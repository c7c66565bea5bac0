r"""How the parts of a U-Net are computed that cost time, and normalisation most of all.

Normalisation and activation are one step, y = act(γ (h − μ)/√(v + ε) + β), h = x + shift.

Per example, μ and v are taken over a group of channels and all positions (Wu and He, 2018). A
U-Net does this before nearly every convolution, and it moves more memory than any other part of
it: written out it reads x for μ and v, reads it again, writes the normalised array, reads that and
writes the activated one. `Plain` is written in torch's own functions, works everywhere, and is
what every other implementation is tested to equal. Attention and the doubling of the resolution
can be replaced in the same way.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Act = Callable[[Tensor], Tensor]


class Kernels(ABC):
    """How the blocks of a network are computed; no tensors, and no name in a state dict.

    Everything here is torch's own, and a subclass replaces what it has.
    """

    name: str
    """What a run says of it."""

    def normalised(self, x: Tensor, norm: nn.GroupNorm, act: Act) -> Tensor:
        """act(norm(x)), (B, C, H, W)."""
        return act(norm(x))

    def timed(
        self, x: Tensor, conv: nn.Conv2d, time: Tensor, norm: nn.GroupNorm, act: Act
    ) -> Tensor:
        """act(norm(conv(x) + time)), x (B, C, H, W), time (B, C')."""
        return act(norm(conv(x) + time[:, :, None, None]))

    def attended(self, every: Tensor, heads: int) -> Tensor:
        """softmax(q k^T / √width) v of every head, over all positions.

        Arguments:
            every: (B, 3 C, H, W), the queries, keys and values of all heads, in this order.
        Returns:
            (B, C, H, W).
        """
        batch, _, height, width = every.shape
        q, k, v = every.view(batch, 3, heads, -1, height * width).permute(1, 0, 2, 4, 3)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return mixed.reshape(batch, -1, height, width)

    def mapped(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A linear map of the channels at every position, (B, C, H, W) to (B, C', H, W)."""
        return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)

    def doubled(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """conv(each pixel of x repeated 2x2), conv 3x3 with padding 1."""
        out: Tensor = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Plain(Kernels):
    """torch's own functions, in any dtype, on any device."""

    name = "plain"


PLAIN = Plain()


def activated(x: Tensor, norm: nn.GroupNorm, shift: Tensor | None) -> Tensor:
    """The eager twin of the fused kernel: SiLU(norm(x + shift)), in the dtype of x.

    Arguments:
        x: (B, C, H, W). shift: (B, C) or None.
    """
    h = x.float() if shift is None else x.float() + shift.float()[:, :, None, None]
    normed = F.group_norm(h, norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
    return F.silu(normed).to(x.dtype)
