r"""Normalisation and attention in C, and a convolution with less to do, for processors.

**Normalisation.** torch's own is slow on channels-last images, its gradient most of all, and every
further function is one more walk over an array that the cache has lost by then. `c/norm.c` takes
one example at a time, which stays in the cache of its core. With r = 1/√(v + ε), d = h − μ,
a = γ r, z = a d + β and dz = dy σ(z)(1 + z (1 − σ(z))),

    dx = a dz − mean(a dz) − d r² mean(a dz d),
    dγ = Σ r dz d,   dβ = Σ dz,   dshift = Σ_positions dx,

means over a group. d and z are computed again for the gradient: x alone is kept, where torch keeps
x + shift and z. The bias of a convolution joins the shift.

**Attention.** `c/attention.c` lets some queries see all keys: p = softmax(q kᵀ/√width). With
p computed again

    dv = pᵀ g,   ds_ij = p_ij (g_i·v_j − Σ_l p_il g_i·v_l),
    dq = ds k/√width,   dk = dsᵀ q/√width.

Its products of matrices are our own, and serve the linear maps around it too.

**Doubling.** A row of conv(repeated x) sees two rows of x through three rows of weights: w_0 and
w_1 + w_2, or w_0 + w_1 and w_2. With these sums of weights it is the transpose of a 4x4
convolution of stride 2: 16 products where there were 36.

bfloat16 arrays are computed in float32 and rounded: torch's own normalisation of them is slower.
`obstacle` says what stands in the way where C cannot be compiled; nothing is chosen in silence.
All of it differentiates once: `Plain` is its twin, and the way to second derivatives.

References:
    Wu, He 2018, Group normalization, eq. 1-4. Vaswani et al. 2017, eq. 1.
    Rabe, Staats 2021, Self-attention does not need O(n²) memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nelbo.errors import InputRefused
from nelbo.networks.c_library import call, library
from nelbo.networks.kernels import Act, Kernels


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, channels: int) -> Tensor:
    shape = len(like), channels, *like.shape[2:]
    return torch.empty(shape, dtype=like.dtype, memory_format=torch.channels_last)


def _sizes(x: Tensor, *more: int) -> tuple[int, ...]:
    return x.shape[0], x.shape[2] * x.shape[3], *more


class Norm(torch.autograd.Function):
    """SiLU(γ (h − μ)/√(v + ε) + β), h = x + shift, float32; `silu` False leaves SiLU out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor | None,
        gain: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        """x (B, C, H, W), shift (B, C), gain and bias (C,) -> (B, C, H, W), channels-last."""
        x, shift = _last(x), None if shift is None else shift.contiguous()
        y = torch.empty_like(x)
        mean, root = x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])
        sizes = _sizes(x, x.shape[1], groups)
        call("norm_forward", x, shift, gain, bias, y, mean, root, *sizes, eps, silu)
        ctx.save_for_backward(x, gain, bias, mean, root)
        ctx.sizes, ctx.silu, ctx.shifted = sizes, silu, shift is not None
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """From dy (B, C, H, W) the gradients of x, shift, gain and bias."""
        saved = ctx.saved_tensors
        dx, rows = torch.empty_like(saved[0]), [torch.empty_like(saved[-1]) for _ in range(3)]
        call("norm_backward", _last(dy), *saved, dx, *rows, *ctx.sizes, ctx.silu)
        shift, gain, bias = rows
        return dx, shift if ctx.shifted else None, gain.sum(0), bias.sum(0), None, None, None


class Attend(torch.autograd.Function):
    """softmax(q kᵀ/√width) v of every head, float32."""

    @staticmethod
    def forward(ctx: Any, every: Tensor, heads: int) -> Tensor:
        """(B, 3 C, H, W), queries, keys and values -> (B, C, H, W), channels-last."""
        every = _last(every)
        channels = every.shape[1] // 3
        out = _empty(every, channels)
        ctx.sizes = _sizes(every, heads, channels // heads)
        call("attention_forward", every, out, *ctx.sizes)
        ctx.save_for_backward(every)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """From dy (B, C, H, W) the gradient of the argument."""
        (every,) = ctx.saved_tensors
        found = torch.empty_like(every)
        call("attention_backward", _last(dy), every, found, *ctx.sizes)
        return found, None


class Map(torch.autograd.Function):
    """A linear map of the channels at every position, float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x (B, C, H, W), weight (C', C), bias (C',) -> (B, C', H, W), channels-last."""
        x, weight = _last(x), weight.contiguous()
        y = _empty(x, len(weight))
        ctx.sizes = _sizes(x, x.shape[1], len(weight))
        call("map_forward", x, weight, bias, y, *ctx.sizes)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From dy (B, C', H, W) the gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), weight.new_empty(len(x), *weight.shape)
        dbias = dweight.new_empty(dweight.shape[:2])
        call("map_backward", _last(dy), x, weight, dx, dweight, dbias, *ctx.sizes)
        return dx, dweight.sum(0), dbias.sum(0)


class Native(Kernels):
    """C for float32 and bfloat16 on a processor; all else goes to torch's functions, by rule."""

    name = "native"

    def normalised(self, x: Tensor, norm: nn.GroupNorm, act: Act) -> Tensor:
        return _normed(x, None, norm, act) if _able(x, act) else super().normalised(x, norm, act)

    def timed(
        self, x: Tensor, conv: nn.Conv2d, time: Tensor, norm: nn.GroupNorm, act: Act
    ) -> Tensor:
        if not _able(x, act):
            return super().timed(x, conv, time, norm, act)
        assert conv.bias is not None
        h = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
        return _normed(h, time + conv.bias, norm, act)

    def attended(self, every: Tensor, heads: int) -> Tensor:
        if not _able(every):
            return super().attended(every, heads)
        out: Tensor = Attend.apply(every.float(), heads)
        return out.to(every.dtype)

    def mapped(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # in bfloat16 torch's products are the faster ones
        if not _able(x) or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().mapped(x, weight, bias)
        y: Tensor = Map.apply(x, weight, bias)
        return y

    def doubled(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        if not _able(x):
            return super().doubled(x, conv)
        weight = F.pad(conv.weight, (1, 1, 1, 1))
        weight = weight[:, :, 1:] + weight[:, :, :-1]
        weight = weight[:, :, :, 1:] + weight[:, :, :, :-1]
        turned = weight.flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(x, turned, conv.bias, stride=2, padding=1)


def _able(x: Tensor, act: Act = F.silu) -> bool:
    here = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return here and (act is F.silu or isinstance(act, nn.SiLU | nn.Identity))


def _normed(x: Tensor, shift: Tensor | None, norm: nn.GroupNorm, act: Act) -> Tensor:
    silu = not isinstance(act, nn.Identity)
    there = None if shift is None else shift.float()
    gain, bias = norm.weight.float(), norm.bias.float()
    y: Tensor = Norm.apply(x.float(), there, gain, bias, norm.num_groups, norm.eps, silu)
    return y.to(x.dtype)


NATIVE = Native()


def obstacle(device: str | torch.device) -> str | None:
    """What stands in the way of the kernels in C on a device; None if nothing does."""
    if torch.device(device).type != "cpu":
        return f"they run on processors, not on {torch.device(device).type}"
    return library()[1] or None


def fuse(network: nn.Module, device: str | torch.device) -> int:
    """Put the kernels in C into every part of a network that has kernels; how many there were.

    Raises:
        InputRefused: they cannot be compiled, or do not run on the device.
    """
    reason = obstacle(device)
    if reason is not None:
        raise InputRefused(f"kernels in C were asked for: {reason}")
    parts = [m for m in network.modules() if isinstance(getattr(m, "kernels", None), Kernels)]
    for part in parts:
        part.kernels = NATIVE  # type: ignore[assignment]
    return len(parts)
