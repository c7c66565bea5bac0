r"""Normalisation and activation by one kernel, and one for the gradient, in a network.

The kernels are in `norm_kernels`, their eager twin is `kernels.activated`. Here they become an
operation with a gradient, which torch.compile takes as it is. `Triton` is never chosen in silence:
`fuse` puts it into a network, and says what stands in the way where it cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nelbo.errors import InputRefused
from nelbo.networks import norm_kernels
from nelbo.networks.kernels import PLAIN, Act, Kernels

DEVICES = ("cuda", "cpu") if norm_kernels.INTERPRETED else ("cuda",)
"""Where the kernels can run."""


@torch.library.custom_op("nelbo::norm_silu", mutates_args=(), device_types=DEVICES)
def norm_silu(
    x: Tensor, shift: Tensor | None, gain: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, C, H, W), and by channel the mean and 1/√(v + ε) (B, C) of its group."""
    return norm_kernels.forward(x, shift, gain, bias, groups, eps)


@norm_silu.register_fake
def _(x: Tensor, shift: Tensor | None, gain: Tensor, bias: Tensor, groups: int, eps: float) -> Any:
    by_channel = x.new_empty(x.shape[:2], dtype=torch.float32)
    return torch.empty_like(norm_kernels.last(x)), by_channel, torch.empty_like(by_channel)


@torch.library.custom_op("nelbo::norm_silu_backward", mutates_args=(), device_types=DEVICES)
def norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    shift: Tensor | None,
    gain: Tensor,
    bias: Tensor,
    means: Tensor,
    roots: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (B, C, H, W), dshift (B, C), and dγ and dβ of every example (2, B, C), float32."""
    return norm_kernels.backward(dy, x, shift, gain, bias, means, roots, groups)


@norm_silu_backward.register_fake
def _(dy: Tensor, x: Tensor, shift: Tensor | None, gain: Tensor, bias: Tensor, means: Tensor,
      roots: Tensor, groups: int) -> Any:  # fmt: skip
    slopes = means.new_empty(2, *means.shape)
    return torch.empty_like(norm_kernels.last(x)), torch.empty_like(means), slopes


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    x, shift, gain, bias, groups, _ = inputs
    ctx.save_for_backward(x, shift, gain, bias, *output[1:])
    ctx.groups = groups


def _gradient(ctx: Any, dy: Tensor, _: Any, __: Any) -> Any:
    x, shift, gain, bias, means, roots = ctx.saved_tensors
    found = norm_silu_backward(dy, x, shift, gain, bias, means, roots, ctx.groups)
    dx, d_shift, slopes = found
    moved = None if shift is None else d_shift.to(shift.dtype)
    d_gain, d_bias = slopes.sum(1)
    return dx, moved, d_gain.to(gain.dtype), d_bias.to(bias.dtype), None, None


norm_silu.register_autograd(_gradient, setup_context=_remember)


class Triton(Kernels):
    """The fused kernel for float32, bfloat16 and float16 arrays; float64 goes to `Plain`, by rule.

    The bias of the convolution joins the shift: the kernel adds both while it reads.
    """

    name = "triton"

    def normalised(self, x: Tensor, norm: nn.GroupNorm, act: Act) -> Tensor:
        if x.dtype == torch.float64:
            return PLAIN.normalised(x, norm, act)
        y: Tensor = norm_silu(x, None, norm.weight, norm.bias, norm.num_groups, norm.eps)[0]
        return y

    def timed(
        self, x: Tensor, conv: nn.Conv2d, time: Tensor, norm: nn.GroupNorm, act: Act
    ) -> Tensor:
        if x.dtype == torch.float64:
            return PLAIN.timed(x, conv, time, norm, act)
        assert conv.bias is not None
        h = nn.functional.conv2d(x, conv.weight, None, conv.stride, conv.padding)
        shift = time + conv.bias
        y: Tensor = norm_silu(h, shift, norm.weight, norm.bias, norm.num_groups, norm.eps)[0]
        return y


TRITON = Triton()


def obstacle(device: str | torch.device) -> str | None:
    """What stands in the way of the fused kernel on a device; None if nothing does."""
    if torch.device(device).type not in DEVICES:
        return f"it runs on CUDA devices, not on {torch.device(device).type}"
    return None if norm_kernels.INSTALLED else "triton is not installed"


def fuse(network: nn.Module, device: str | torch.device) -> int:
    """Put the fused kernel into every part of a network that can use it; how many there were.

    Raises:
        InputRefused: it cannot run on the device.
    """
    reason = obstacle(device)
    if reason is not None:
        raise InputRefused(f"the fused normalisation was asked for: {reason}")
    parts = [m for m in network.modules() if isinstance(getattr(m, "kernels", None), Kernels)]
    able = [m for m in parts if isinstance(m.act, nn.SiLU)]
    for part in able:
        part.kernels = TRITON  # type: ignore[assignment]
    return len(able)
