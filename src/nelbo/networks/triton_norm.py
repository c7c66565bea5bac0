r"""One kernel for SiLU(γ (h − μ)/√(v + ε) + β), h = x + shift, and one for its gradient.

For images in channels-last order on a CUDA device. One program has one example and some whole
groups of channels; it walks over the positions twice, once for the sums and once for the result,
and the second time the array is still in the cache. With x̂ the normalised array, z = γ x̂ + β and
dz = dy σ(z)(1 + z (1 − σ(z))), over the n elements of a group

    dx = r [γ dz − mean(γ dz) − x̂ mean(γ dz x̂)],   r = 1/√(v + ε),
    dγ = Σ dz x̂,   dβ = Σ dz,   dshift = Σ_positions dx.

Sums are float32, whatever the array is, of what is left after the mean of the first position, so
that squares do not cancel; the eager twin is `kernels.activated`. triton comes with CUDA builds of
torch only, and is imported here alone. `Triton` is never chosen in silence: `fuse` puts it into a
network, and says what stands in the way where it cannot.

References:
    Wu, He 2018, Group normalization, eq. 1-4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nelbo.errors import InputRefused
from nelbo.networks.kernels import PLAIN, Act, Kernels

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

PROGRAM_CHANNELS = 64
"""Channels that one program aims at: 128 bytes of bfloat16, one line of the cache."""
TILE = 4096
"""Elements that a program reads at once."""


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _spread(sums, member):  # type: ignore[no-untyped-def]
    """Sums by channel (C,) -> the sum over its group, by channel."""
    groups = tl.sum(member * sums[:, None], axis=0)
    return tl.sum(member * groups[None, :], axis=1)


@_jit
def _forward(  # type: ignore[no-untyped-def]
    x, shift, gain, bias, y, means, roots, positions, channels, count, eps,
    HAS_SHIFT: tl.constexpr, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, C)
    inside = lane < GROUPS * PER_GROUP
    c = block * GROUPS * PER_GROUP + lane
    member = ((lane // PER_GROUP)[:, None] == tl.arange(0, G)[None, :]).to(tl.float32)
    start = row * positions * channels
    extra = tl.zeros([C], tl.float32)
    if HAS_SHIFT:
        extra = tl.load(shift + row * channels + c, mask=inside, other=0.0).to(tl.float32)
    # sums of what is left after a number close to the mean, so that squares do not cancel
    near = tl.load(x + start + c, mask=inside, other=0.0).to(tl.float32) + extra
    near = _spread(near, member) / PER_GROUP
    total, square = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for p in range(0, positions, P):
        at = p + tl.arange(0, P)
        mask = (at < positions)[:, None] & inside[None, :]
        h = tl.load(x + start + at[:, None] * channels + c[None, :], mask=mask, other=0.0)
        d = tl.where(mask, h.to(tl.float32) + (extra - near)[None, :], 0.0)
        total += tl.sum(d, axis=0)
        square += tl.sum(d * d, axis=0)
    rest = _spread(total, member) / count
    mean = near + rest
    variance = tl.maximum(_spread(square, member) / count - rest * rest, 0.0)
    root = 1 / tl.sqrt(variance + eps)
    tl.store(means + row * channels + c, mean, mask=inside)
    tl.store(roots + row * channels + c, root, mask=inside)
    slope = tl.load(gain + c, mask=inside, other=0.0).to(tl.float32) * root
    level = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32) + (extra - mean) * slope
    for p in range(0, positions, P):
        at = p + tl.arange(0, P)
        mask = (at < positions)[:, None] & inside[None, :]
        place = start + at[:, None] * channels + c[None, :]
        z = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * slope[None, :]
        z += level[None, :]
        tl.store(y + place, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=mask)


@_jit
def _backward(  # type: ignore[no-untyped-def]
    x, shift, gain, bias, means, roots, dy, dx, d_shift, d_gain, d_bias,
    positions, channels, count,
    HAS_SHIFT: tl.constexpr, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr,
    C: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, C)
    inside = lane < GROUPS * PER_GROUP
    c = block * GROUPS * PER_GROUP + lane
    member = ((lane // PER_GROUP)[:, None] == tl.arange(0, G)[None, :]).to(tl.float32)
    start, line = row * positions * channels, row * channels + c
    mean = tl.load(means + line, mask=inside, other=0.0)
    root = tl.load(roots + line, mask=inside, other=0.0)
    if HAS_SHIFT:
        mean -= tl.load(shift + line, mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(gain + c, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    first, second = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for p in range(0, positions, P):
        at = p + tl.arange(0, P)
        mask = (at < positions)[:, None] & inside[None, :]
        place = start + at[:, None] * channels + c[None, :]
        unit = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        unit = unit * root[None, :]
        z = unit * gamma[None, :] + beta[None, :]
        s = tl.sigmoid(z)
        d = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32) * s * (1 + z * (1 - s))
        first += tl.sum(d, axis=0)
        second += tl.sum(d * unit, axis=0)
    tl.store(d_bias + line, first, mask=inside)
    tl.store(d_gain + line, second, mask=inside)
    flat = _spread(first * gamma, member) / count
    tilt = _spread(second * gamma, member) / count
    along = tl.zeros([C], tl.float32)
    for p in range(0, positions, P):
        at = p + tl.arange(0, P)
        mask = (at < positions)[:, None] & inside[None, :]
        place = start + at[:, None] * channels + c[None, :]
        unit = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        unit = unit * root[None, :]
        z = unit * gamma[None, :] + beta[None, :]
        s = tl.sigmoid(z)
        d = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32) * s * (1 + z * (1 - s))
        out = (d * gamma[None, :] - flat[None, :] - unit * tilt[None, :]) * root[None, :]
        along += tl.sum(tl.where(mask, out, 0.0), axis=0)
        tl.store(dx + place, out.to(dx.dtype.element_ty), mask=mask)
    if HAS_SHIFT:
        tl.store(d_shift + line, along, mask=inside)


def _plan(channels: int, groups: int, positions: int) -> tuple[int, dict[str, int]]:
    """Programs for an example, and the constants of a launch."""
    width = channels // groups
    held = 1
    while groups % (2 * held) == 0 and 2 * held * width <= PROGRAM_CHANNELS:
        held *= 2
    lanes = triton.next_power_of_2(held * width)
    tile = max(1, min(TILE // lanes, triton.next_power_of_2(positions)))
    sizes = {"PER_GROUP": width, "GROUPS": held, "C": lanes, "P": tile}
    return groups // held, sizes | {"G": triton.next_power_of_2(held)}


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("nelbo::norm_silu", mutates_args=(), device_types="cuda")
def norm_silu(
    x: Tensor, shift: Tensor | None, gain: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, C, H, W), and by channel the mean and 1/√(v + ε) (B, C) of its group."""
    x = _last(x)
    batch, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    y = torch.empty_like(x)
    means, roots = (x.new_empty(batch, channels, dtype=torch.float32) for _ in range(2))
    blocks, sizes = _plan(channels, groups, positions)
    _forward[(batch, blocks)](
        x, x if shift is None else shift.contiguous(), gain, bias, y, means, roots,
        positions, channels, positions * channels // groups, eps,
        HAS_SHIFT=shift is not None, **sizes, num_warps=4,
    )  # fmt: skip
    return y, means, roots


@norm_silu.register_fake
def _(x: Tensor, shift: Tensor | None, gain: Tensor, bias: Tensor, groups: int, eps: float) -> Any:
    by_channel = x.new_empty(x.shape[:2], dtype=torch.float32)
    return torch.empty_like(_last(x)), by_channel, torch.empty_like(by_channel)


@torch.library.custom_op("nelbo::norm_silu_backward", mutates_args=(), device_types="cuda")
def norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    shift: Tensor | None,
    gain: Tensor,
    bias: Tensor,
    means: Tensor,
    roots: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (B, C, H, W); then dshift, and dγ and dβ of every example, (B, C) float32."""
    x, dy = _last(x), _last(dy)
    batch, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    dx = torch.empty_like(x)
    d_shift, d_gain, d_bias = (torch.empty_like(means) for _ in range(3))
    blocks, sizes = _plan(channels, groups, positions)
    _backward[(batch, blocks)](
        x, x if shift is None else shift.contiguous(), gain, bias, means, roots, dy, dx,
        d_shift, d_gain, d_bias, positions, channels, positions * channels // groups,
        HAS_SHIFT=shift is not None, **sizes, num_warps=4,
    )  # fmt: skip
    return dx, d_shift, d_gain, d_bias


@norm_silu_backward.register_fake
def _(dy: Tensor, x: Tensor, shift: Tensor | None, gain: Tensor, bias: Tensor, means: Tensor,
      roots: Tensor, groups: int) -> Any:  # fmt: skip
    rows = [torch.empty_like(means) for _ in range(3)]
    return torch.empty_like(_last(x)), *rows


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    x, shift, gain, bias, groups, _ = inputs
    ctx.save_for_backward(x, shift, gain, bias, *output[1:])
    ctx.groups = groups


def _gradient(ctx: Any, dy: Tensor, _: Any, __: Any) -> Any:
    x, shift, gain, bias, means, roots = ctx.saved_tensors
    found = norm_silu_backward(dy, x, shift, gain, bias, means, roots, ctx.groups)
    dx, d_shift, d_gain, d_bias = found
    moved = None if shift is None else d_shift.to(shift.dtype)
    return dx, moved, d_gain.sum(0).to(gain.dtype), d_bias.sum(0).to(bias.dtype), None, None


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
    if torch.device(device).type != "cuda":
        return f"it runs on CUDA devices, not on {torch.device(device).type}"
    return "triton is not installed" if triton is None else None


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
