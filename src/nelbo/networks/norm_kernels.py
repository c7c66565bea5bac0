r"""The kernels of SiLU(γ (h − μ)/√(v + ε) + β), h = x + shift, and of its gradient, in triton.

For images in channels-last order. One program has one example and some whole groups of channels.
Where their positions fit into its registers it reads them once, takes the mean, then the variance
of what is left, and writes; else it walks over the positions twice. With x̂ the normalised array,
z = γ x̂ + β and dz = dy σ(z)(1 + z (1 − σ(z))), over the n elements of a group

    dx = r [γ dz − mean(γ dz) − x̂ mean(γ dz x̂)],   r = 1/√(v + ε),
    dγ = Σ dz x̂,   dβ = Σ dz,   dshift = Σ_positions dx.

Sums are float32, whatever the array is. A program that walks sums what is left after the mean of
the first position, so that squares do not cancel. A group is padded to a power of two, so that its
sum is a reshape. The channels of an example that lie side by side belong to neighbouring programs:
what one of them reads of a line of memory the next one finds in the cache.

triton comes with CUDA builds of torch only, and is imported here alone. With TRITON_INTERPRET=1 in
the environment it computes on a CPU, with NumPy: slow, and what the tests of a machine without a
GPU run.

References:
    Wu, He 2018, Group normalization, eq. 1-4.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from nelbo.networks.norm_plans import Plan, padded, plan

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INSTALLED = triton is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels are computed on the CPU."""


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _spread(sums, G: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums by channel (G W,) -> the sum over its group, by channel."""
    groups = tl.sum(tl.reshape(sums, (G, W)), axis=1)
    return tl.reshape(tl.broadcast_to(groups[:, None], (G, W)), (G * W,))


@_jit
def _lanes(block, WIDTH: tl.constexpr, G: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Channels of a program, and which lanes are one."""
    lane = tl.arange(0, G * W)
    # written without a remainder where a group fills its lanes, so that lines are seen as such
    if W == WIDTH:  # noqa: SIM108
        c = block * (G * W) + lane
    else:
        c = (block * G + lane // W) * WIDTH + lane % W
    return c, lane % W < WIDTH


@_jit
def _read(array, place, mask, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    if FULL:  # noqa: SIM108
        value = tl.load(array + place)
    else:
        value = tl.load(array + place, mask=mask, other=0.0)
    return value.to(tl.float32)


@_jit
def _write(array, place, value, mask, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    if FULL:
        tl.store(array + place, value.to(array.dtype.element_ty))
    else:
        tl.store(array + place, value.to(array.dtype.element_ty), mask=mask)


@_jit
def _forward(  # type: ignore[no-untyped-def]
    x, shift, gain, bias, y, means, roots, eps,
    SHIFTED: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr, G: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    FULL: tl.constexpr = (POSITIONS % P == 0) and (W == WIDTH)
    count = POSITIONS * WIDTH
    c, inside = _lanes(block, WIDTH, G, W)
    start, line = row * (POSITIONS * CHANNELS), row * CHANNELS + c
    extra = tl.zeros([G * W], tl.float32)
    if SHIFTED:
        extra = tl.load(shift + line, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(gain + c, mask=inside, other=0.0).to(tl.float32)
    level = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if P >= POSITIONS:
        at = tl.arange(0, P)
        mask = (at < POSITIONS)[:, None] & inside[None, :]
        place = start + at[:, None] * CHANNELS + c[None, :]
        h = _read(x, place, mask, FULL) + extra[None, :]
        if not FULL:
            h = tl.where(mask, h, 0.0)
        mean = _spread(tl.sum(h, axis=0), G, W) / count
        d = h - mean[None, :]
        if not FULL:
            d = tl.where(mask, d, 0.0)
        root = 1 / tl.sqrt(_spread(tl.sum(d * d, axis=0), G, W) / count + eps)
        z = d * (slope * root)[None, :] + level[None, :]
        _write(y, place, z * tl.sigmoid(z), mask, FULL)
    else:
        # sums of what is left after a number close to the mean, so that squares do not cancel
        near = tl.load(x + start + c, mask=inside, other=0.0).to(tl.float32) + extra
        near = _spread(tl.where(inside, near, 0.0), G, W) / WIDTH
        total, square = tl.zeros([G * W], tl.float32), tl.zeros([G * W], tl.float32)
        for p in range(0, POSITIONS, P):
            at = p + tl.arange(0, P)
            mask = (at < POSITIONS)[:, None] & inside[None, :]
            place = start + at[:, None] * CHANNELS + c[None, :]
            d = _read(x, place, mask, FULL) + (extra - near)[None, :]
            if not FULL:
                d = tl.where(mask, d, 0.0)
            total += tl.sum(d, axis=0)
            square += tl.sum(d * d, axis=0)
        rest = _spread(total, G, W) / count
        mean = near + rest
        variance = tl.maximum(_spread(square, G, W) / count - rest * rest, 0.0)
        root = 1 / tl.sqrt(variance + eps)
        for p in range(0, POSITIONS, P):
            at = p + tl.arange(0, P)
            mask = (at < POSITIONS)[:, None] & inside[None, :]
            place = start + at[:, None] * CHANNELS + c[None, :]
            d = _read(x, place, mask, FULL) + (extra - mean)[None, :]
            z = d * (slope * root)[None, :] + level[None, :]
            _write(y, place, z * tl.sigmoid(z), mask, FULL)
    tl.store(means + line, mean, mask=inside)
    tl.store(roots + line, root, mask=inside)


@_jit
def _inner(x, dy, place, mask, mean, root, gamma, beta, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    """x̂ and dz of a tile."""
    unit = (_read(x, place, mask, FULL) - mean[None, :]) * root[None, :]
    z = unit * gamma[None, :] + beta[None, :]
    s = tl.sigmoid(z)
    return unit, _read(dy, place, mask, FULL) * (s * (1 + z * (1 - s)))


@_jit
def _backward(  # type: ignore[no-untyped-def]
    x, shift, gain, bias, means, roots, dy, dx, d_shift, d_gain, d_bias,
    SHIFTED: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr, G: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row, block = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    FULL: tl.constexpr = (POSITIONS % P == 0) and (W == WIDTH)
    count = POSITIONS * WIDTH
    c, inside = _lanes(block, WIDTH, G, W)
    start, line = row * (POSITIONS * CHANNELS), row * CHANNELS + c
    mean = tl.load(means + line, mask=inside, other=0.0)
    root = tl.load(roots + line, mask=inside, other=0.0)
    if SHIFTED:
        mean -= tl.load(shift + line, mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(gain + c, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if P >= POSITIONS:
        at = tl.arange(0, P)
        mask = (at < POSITIONS)[:, None] & inside[None, :]
        place = start + at[:, None] * CHANNELS + c[None, :]
        unit, d = _inner(x, dy, place, mask, mean, root, gamma, beta, FULL)
        first, second = tl.sum(d, axis=0), tl.sum(d * unit, axis=0)
        flat = _spread(first * gamma, G, W) / count
        tilt = _spread(second * gamma, G, W) / count
        out = (d * gamma[None, :] - flat[None, :] - unit * tilt[None, :]) * root[None, :]
        _write(dx, place, out, mask, FULL)
        if not FULL:
            out = tl.where(mask, out, 0.0)
        along = tl.sum(out, axis=0)
    else:
        first, second = tl.zeros([G * W], tl.float32), tl.zeros([G * W], tl.float32)
        for p in range(0, POSITIONS, P):
            at = p + tl.arange(0, P)
            mask = (at < POSITIONS)[:, None] & inside[None, :]
            place = start + at[:, None] * CHANNELS + c[None, :]
            unit, d = _inner(x, dy, place, mask, mean, root, gamma, beta, FULL)
            first += tl.sum(d, axis=0)
            second += tl.sum(d * unit, axis=0)
        flat = _spread(first * gamma, G, W) / count
        tilt = _spread(second * gamma, G, W) / count
        along = tl.zeros([G * W], tl.float32)
        for p in range(0, POSITIONS, P):
            at = p + tl.arange(0, P)
            mask = (at < POSITIONS)[:, None] & inside[None, :]
            place = start + at[:, None] * CHANNELS + c[None, :]
            unit, d = _inner(x, dy, place, mask, mean, root, gamma, beta, FULL)
            out = (d * gamma[None, :] - flat[None, :] - unit * tilt[None, :]) * root[None, :]
            _write(dx, place, out, mask, FULL)
            if not FULL:
                out = tl.where(mask, out, 0.0)
            along += tl.sum(out, axis=0)
    tl.store(d_bias + line, first, mask=inside)
    tl.store(d_gain + line, second, mask=inside)
    if SHIFTED:
        tl.store(d_shift + line, along, mask=inside)


def _launch(
    x: Tensor, groups: int, chosen: Plan | None, arrays: int
) -> tuple[tuple[int], dict[str, int]]:
    """Programs of a launch, and its constants."""
    batch, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    width = channels // groups
    rule = plan(channels, groups, positions, x.element_size(), arrays)
    taken = rule if chosen is None else chosen
    blocks = groups // taken.groups
    sizes = {"POSITIONS": positions, "CHANNELS": channels, "BLOCKS": blocks, "WIDTH": width}
    lanes = {"G": taken.groups, "W": padded(width), "P": taken.tile}
    return (batch * blocks,), sizes | lanes | {"num_warps": taken.warps}


def last(x: Tensor) -> Tensor:
    """The same images, channels-last."""
    return x.contiguous(memory_format=torch.channels_last)


def forward(
    x: Tensor,
    shift: Tensor | None,
    gain: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    chosen: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, C, H, W), and by channel the mean and 1/√(v + ε) (B, C) of its group, float32.

    Arguments:
        x: (B, C, H, W). shift: (B, C) or None. gain, bias: (C,).
        chosen: a plan of one's own.
    """
    x = last(x)
    y, means = torch.empty_like(x), x.new_empty(x.shape[:2], dtype=torch.float32)
    roots = torch.empty_like(means)
    grid, sizes = _launch(x, groups, chosen, 1)
    moved = x if shift is None else shift.contiguous()
    _forward[grid](x, moved, gain, bias, y, means, roots, eps, SHIFTED=shift is not None, **sizes)
    return y, means, roots


def backward(
    dy: Tensor,
    x: Tensor,
    shift: Tensor | None,
    gain: Tensor,
    bias: Tensor,
    means: Tensor,
    roots: Tensor,
    groups: int,
    chosen: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (B, C, H, W), dshift (B, C), and dγ and dβ of every example (2, B, C), float32.

    Arguments:
        as of `forward`; means, roots: what it gave. dy: (B, C, H, W).
    """
    x, dy = last(x), last(dy)
    dx, d_shift = torch.empty_like(x), torch.empty_like(means)
    slopes = means.new_empty(2, *means.shape)
    grid, sizes = _launch(x, groups, chosen, 2)
    moved = x if shift is None else shift.contiguous()
    _backward[grid](
        x, moved, gain, bias, means, roots, dy, dx, d_shift, slopes[0], slopes[1],
        SHIFTED=shift is not None, **sizes,
    )  # fmt: skip
    return dx, d_shift, slopes
