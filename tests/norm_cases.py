"""The fused normalisation on one shape, and how far from float64 it may be.

Two numbers that lie close together have a variance that a rounding of them changes much, and the
gradient at a group of two is the small rest of large parts. So the bound is four roundings of all
that is computed on the way (`parts`), and, of arrays that are stored in bfloat16, the last bit of
the result.

As a program, under TRITON_INTERPRET=1, it prints what the kernel does on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nelbo.networks import norm_kernels
from nelbo.networks.kernels import activated
from nelbo.networks.triton_norm import fuse, norm_silu
from nelbo.networks.unet import UNet

SHAPES = ((2, 128, 32, 32, 32), (2, 384, 16, 16, 32), (2, 32, 8, 8, 8), (2, 24, 5, 7, 3),
          (2, 64, 1, 1, 32), (1, 512, 4, 4, 32), (2, 8, 3, 3, 8), (1, 64, 33, 65, 8),
          (1, 4, 200, 200, 2))  # fmt: skip
"""(B, C, H, W, groups): 1 to 24 channels in a group, all positions at once and not."""
NAMES = ("y", "dx", "dshift", "dgain", "dbias")
UNIT = 2.0**-24
EPS = 1e-5


class Case(NamedTuple):
    """Inputs, and what the loss weighs the result with."""

    x: Tensor
    shift: Tensor | None
    gain: Tensor
    bias: Tensor
    over: Tensor
    groups: int


def case(
    shape: tuple[int, ...], shifted: bool, dtype: torch.dtype, device: str = "cpu", seed: int = 1
) -> Case:
    """Numbers around 3, so that squares without care would cancel."""
    batch, channels, height, width, groups = shape
    stream = torch.Generator().manual_seed(seed)
    x = 3 + torch.randn(batch, channels, height, width, generator=stream)
    shift = torch.randn(batch, channels, generator=stream)
    over = torch.randn(x.shape, generator=stream)
    gain, bias = (torch.randn(channels, generator=stream) for _ in range(2))
    last = {"memory_format": torch.channels_last}
    x, over = (v.to(dtype).contiguous(**last) for v in (x, over))  # type: ignore[arg-type]
    moved = shift.to(device) if shifted else None
    return Case(x.to(device), moved, gain.to(device), bias.to(device), over.to(device), groups)


def _grown(one: Case) -> list[Tensor]:
    """Inputs that a gradient is wanted of."""
    found = [v for v in (one.x, one.shift, one.gain, one.bias) if v is not None]
    return [v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for v in found]


def _named(one: Case, found: list[Tensor]) -> dict[str, Tensor]:
    names = NAMES if one.shift is not None else tuple(n for n in NAMES if n != "dshift")
    return {n: v.detach().double() for n, v in zip(names, found, strict=True)}


def fused(one: Case, eps: float = EPS) -> dict[str, Tensor]:
    """Value and gradients of the kernel."""
    wrt = _grown(one)
    shift = wrt[1] if one.shift is not None else None
    y = norm_silu(wrt[0], shift, wrt[-2], wrt[-1], one.groups, eps)[0]
    return _named(one, [y, *torch.autograd.grad(y, wrt, one.over)])


def twin(one: Case) -> dict[str, Tensor]:
    """The same of the eager twin."""
    wrt = _grown(one)
    norm = nn.GroupNorm(one.groups, len(one.gain), EPS)
    norm.weight, norm.bias = (nn.Parameter(v) for v in wrt[-2:])
    wrt[-2:] = [norm.weight, norm.bias]
    y = activated(wrt[0], norm, wrt[1] if one.shift is not None else None)
    return _named(one, [y, *torch.autograd.grad(y, wrt, one.over)])


def _float64(one: Case) -> Case:
    grown = [None if v is None else v.double() for v in one[:5]]
    return Case(*grown, one.groups)  # type: ignore[arg-type]


def exact(one: Case) -> dict[str, Tensor]:
    """The same in float64, by torch."""
    one = _float64(one)
    wrt = _grown(one)
    h = wrt[0] if one.shift is None else wrt[0] + wrt[1][:, :, None, None]
    normed = nn.functional.group_norm(h, one.groups, wrt[-2], wrt[-1], EPS)
    y = nn.functional.silu(normed)
    return _named(one, [y, *torch.autograd.grad(y, wrt, one.over)])


def parts(one: Case) -> dict[str, Tensor]:
    """What a rounding of 1 in everything that is computed would do to each result, at first order.

    A rounding of h, or of the mean, moves x̂ by (|x| + |shift|)/√(v + ε), `loose`, and through it
    dz by |dy γ| times as much; the size of every summand is added to that.
    """
    one = _float64(one)
    h, size = one.x, one.x.abs()
    if one.shift is not None:
        h, size = h + one.shift[:, :, None, None], size + one.shift.abs()[:, :, None, None]

    def by_group(values: Tensor) -> Tensor:
        return values.reshape(len(h), one.groups, -1)

    g = by_group(h)
    root = 1 / (g.var(2, unbiased=False, keepdim=True) + EPS).sqrt()
    unit = ((g - g.mean(2, keepdim=True)) * root).reshape(h.shape)
    loose = (by_group(size).amax(2, keepdim=True) * root).expand_as(g).reshape(h.shape)
    gain, bias = one.gain[:, None, None], one.bias[:, None, None]
    z = unit * gain + bias
    s = torch.sigmoid(z)
    dz = (one.over * s * (1 + z * (1 - s))).abs()
    moved = one.over.abs() * gain.abs() * loose
    # each part of dx: its own, and the two means that are taken off
    own = by_group(gain.abs() * (dz * (1 + loose) + moved)) * root
    dx = (own + own.mean(2, keepdim=True) * (1 + by_group(unit).abs())).reshape(h.shape)
    dgain = dz * (unit.abs() + loose) + moved * unit.abs()
    return {
        "y": gain.abs() * (unit.abs() + loose) + bias.abs(),
        "dx": dx,
        "dshift": dx.sum((2, 3)),
        "dgain": dgain.sum((0, 2, 3)),
        "dbias": (dz + moved).sum((0, 2, 3)),
    }


def bounds(one: Case) -> dict[str, float]:
    """‖found − exact‖ at most, by result."""
    size, true = parts(one), exact(one)
    # triton's interpreter cuts off what does not fit into bfloat16, a GPU rounds
    stored = 2.0**-7 if one.x.dtype == torch.bfloat16 else 0.0
    return {
        n: 4 * UNIT * float(size[n].norm())
        + (stored * float(true[n].norm()) if n in ("y", "dx") else 0.0)
        for n in true
    }  # fmt: skip


def distances(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """‖found − exact‖ by result."""
    return {n: float((found[n] - true[n]).norm()) for n in true}


def cases() -> Iterator[tuple[tuple[int, ...], bool, torch.dtype]]:
    """All that is compared."""
    for shape in SHAPES:
        for shifted in (True, False):
            for dtype in (torch.float32, torch.bfloat16):
                yield shape, shifted, dtype


def assembly(channels: int, groups: int, positions: int, *, backward: bool) -> str:
    """PTX of a kernel for bfloat16, with a shift, for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    arrays, kernel = (2, norm_kernels._backward) if backward else (1, norm_kernels._forward)
    x = torch.empty(1, channels, positions, 1, dtype=torch.bfloat16, device="meta")
    _, sizes = norm_kernels._launch(x, groups, None, arrays)
    warps = sizes.pop("num_warps")
    names: list[str] = kernel.arg_names
    fixed = {"SHIFTED": True, **sizes}
    kinds = {"eps": "fp32"} | dict.fromkeys(("x", "y", "dy", "dx"), "*bf16")
    signature = {n: "constexpr" if n in fixed else kinds.get(n, "*fp32") for n in names}
    aligned = {
        (k,): [["tt.divisibility", 16]] for k, n in enumerate(names) if signature[n][0] == "*"
    }
    constants = {(names.index(n),): value for n, value in fixed.items()}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    return str(made.asm["ptx"])


def shares(one: Case, eps: float = EPS) -> dict[str, float]:
    """How much of what is allowed the kernel is off from float64, and from its twin; 1: too far.

    The twin is allowed four times as much: torch takes the variance from squares.
    """
    allowed, true, found = bounds(one), exact(one), fused(one, eps)
    near, other = distances(found, true), distances(found, twin(one))
    worst = {n: near[n] / allowed[n] for n in near}
    return worst | {f"{n} of twin": other[n] / (4 * allowed[n]) for n in other}


def network() -> UNet:
    """Two resolutions, with attention."""
    torch.manual_seed(0)
    return UNet(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )


def far(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖/‖expected‖."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def network_off() -> dict[str, float]:
    """A whole network with the kernel against float64: places, value, the worst gradient."""
    fused_one, true = network(), network().double()
    places = fuse(fused_one, "cpu")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 500.0])
    y, expected = fused_one(x, t), true(x.double(), t)
    y.square().mean().backward()
    expected.square().mean().backward()
    pairs = zip(fused_one.parameters(), true.parameters(), strict=True)
    # the gradient of what a normalisation takes out again is rounding alone
    seen = [(p.grad, q.grad) for p, q in pairs if q.grad is not None and q.grad.norm() > 1e-6]
    worst = max(far(p, q) for p, q in seen if p is not None and q is not None)
    return {"places": places, "value": far(y.detach(), expected.detach()), "gradient": worst}


def main() -> None:
    """Print the shares of every case, and of a kernel that is wrong on purpose."""
    rows = []
    for shape, shifted, dtype in cases():
        one = case(shape, shifted, dtype)
        rows.append({"case": f"{shape} {shifted} {dtype}", "shares": shares(one)})
    wrong = shares(case(SHAPES[2], True, torch.float32), 10 * EPS)
    sick = case(SHAPES[2], True, torch.float32)
    sick.x[0, 0, 0, 0] = torch.nan
    bad = fused(sick)["y"].isnan().flatten(2).all(2)
    interpreted = norm_kernels.INTERPRETED
    print(json.dumps({"interpreted": interpreted, "rows": rows, "wrong": wrong,
                      "nan": bad.tolist(), "network": network_off()}))  # fmt: skip


if __name__ == "__main__":
    main()
