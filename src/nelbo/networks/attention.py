"""Self-attention over the positions of an image.

Each position is a vector of C channels. After a group normalisation, queries, keys and values are
linear maps of it; each head mixes the values with softmax(q k^T / sqrt(head_dim)) over all
positions, and a linear map of the heads is added to the input (Vaswani et al., 2017; as an image
layer: Ho et al., 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nelbo.errors import InputRefused
from nelbo.networks.kernels import PLAIN, Kernels


class Attention(nn.Module):
    """x + attention(x) over the positions, both divided by `rescale`.

    Arguments:
        channels: C.
        head_dim: channels of a head; there are C // head_dim heads.
        groups: of the group normalisation; None leaves it out.
        eps: of the group normalisation.
        rescale: divides the sum.

    Raises:
        InputRefused: a head is wider than the input.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int,
        *,
        groups: int | None,
        eps: float = 1e-5,
        rescale: float = 1.0,
    ) -> None:
        super().__init__()
        self.heads = channels // head_dim
        if self.heads == 0:
            raise InputRefused(
                f"attention_head_dim={head_dim} is wider than a layer of {channels} channels: "
                f"choose at most {channels}"
            )
        self.rescale = rescale
        self.act = nn.Identity()
        self.kernels: Kernels = PLAIN
        inner = self.heads * head_dim
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        # A list of one, so that the tensors are named to_out.0 as in published checkpoints.
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of x, (B, C, H, W)."""
        normed = x
        if self.group_norm is not None:
            normed = self.kernels.normalised(x, self.group_norm, self.act)
        maps, last = (self.to_q, self.to_k, self.to_v), self.to_out[0]
        assert isinstance(last, nn.Linear)
        # one product of matrices instead of three
        weight, bias = torch.cat([m.weight for m in maps]), torch.cat([m.bias for m in maps])
        every = self.kernels.mapped(normed, weight, bias)
        mixed = self.kernels.attended(every, self.heads)
        sum_: Tensor = x + self.kernels.mapped(mixed, last.weight, last.bias)
        return sum_ if self.rescale == 1 else sum_ / self.rescale
