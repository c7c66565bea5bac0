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

The source is compiled by the machine's own compiler (`cc`, or what CC names), for this very
processor, when it is first asked for, and kept in the user's cache; its threads are torch's.
`obstacle` says what stands in the way where it cannot be; nothing is chosen in silence. It
differentiates once: `Plain` is its twin, and the way to second derivatives.

References:
    Wu, He 2018, Group normalization, eq. 1-4. Vaswani et al. 2017, eq. 1.
    Rabe, Staats 2021, Self-attention does not need O(n²) memory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nelbo.errors import InputRefused
from nelbo.networks.kernels import Act, Kernels

FOLDER = Path(__file__).with_name("c")
PARTS = ("norm", "attention")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
SECONDS = 120
"""How long the compiler may take."""


def _made(compiler: str, folder: Path) -> Path:
    objects = [str(folder / f"{part}.o") for part in PARTS]
    commands = [
        [compiler, *FLAGS, "-c", str(FOLDER / f"{part}.c"), "-o", made]
        for part, made in zip(PARTS, objects, strict=True)
    ]
    library = folder / "native.so"
    # linked without -fopenmp, so that the threads are those of the OpenMP that torch has loaded
    commands.append([compiler, "-shared", *objects, "-lm", "-o", str(library)])
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
    return library


def _place(compiler: str) -> Path:
    """Where the library of this source, compiler and processor is kept."""
    told = hashlib.sha256()
    for path in sorted(FOLDER.iterdir()):
        told.update(path.read_bytes())
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kinds = sorted(
        {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    )
    told.update("\n".join([compiler, *FLAGS, platform.machine(), *kinds]).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nelbo" / f"native-{told.hexdigest()[:16]}.so"


def _processor() -> list[str]:
    """What the machine says of its processors, each thing once."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})


def _compiled(compiler: str) -> ctypes.CDLL:
    place = _place(compiler)
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            os.replace(_made(compiler, Path(folder)), place)
    found = ctypes.CDLL(str(place))
    long, pointer, number = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
    found.norm_forward.argtypes = [pointer] * 7 + [long] * 4 + [ctypes.c_double, number]
    found.norm_backward.argtypes = [pointer] * 10 + [long] * 4 + [number]
    found.attention_forward.argtypes = [pointer] * 2 + [long] * 4
    found.attention_backward.argtypes = [pointer] * 3 + [long] * 4
    found.map_forward.argtypes = [pointer] * 4 + [long] * 4
    found.map_backward.argtypes = [pointer] * 6 + [long] * 4
    for part in ("norm", "attention", "map"):
        for way in ("forward", "backward"):
            getattr(found, f"{part}_{way}").restype = None
    return found


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and what stands in the way."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or compiler is None:
        return None, "it needs Linux and a C compiler named cc, or by CC"
    try:
        return _compiled(compiler), ""
    except (subprocess.SubprocessError, OSError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        return None, f"{compiler}: {said.decode(errors='replace').strip()[:200]}"


def _call(name: str, *arguments: Any) -> None:
    library, reason = _library()
    if library is None:
        raise InputRefused(f"kernels in C were asked for: {reason}")
    values = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    getattr(library, name)(*values)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


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
        _call("norm_forward", x, shift, gain, bias, y, mean, root, *sizes, eps, silu)
        ctx.save_for_backward(x, gain, bias, mean, root)
        ctx.sizes, ctx.silu, ctx.shifted = sizes, silu, shift is not None
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """From dy (B, C, H, W) the gradients of x, shift, gain and bias."""
        saved = ctx.saved_tensors
        dx, rows = torch.empty_like(saved[0]), [torch.empty_like(saved[-1]) for _ in range(3)]
        _call("norm_backward", _last(dy), *saved, dx, *rows, *ctx.sizes, ctx.silu)
        shift, gain, bias = rows
        return dx, shift if ctx.shifted else None, gain.sum(0), bias.sum(0), None, None, None


class Attend(torch.autograd.Function):
    """softmax(q kᵀ/√width) v of every head, float32."""

    @staticmethod
    def forward(ctx: Any, every: Tensor, heads: int) -> Tensor:
        """(B, 3 C, H, W), queries, keys and values -> (B, C, H, W), channels-last."""
        every = _last(every)
        channels = every.shape[1] // 3
        out = _last(every.new_empty(len(every), channels, *every.shape[2:]))
        ctx.sizes = _sizes(every, heads, channels // heads)
        _call("attention_forward", every, out, *ctx.sizes)
        ctx.save_for_backward(every)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """From dy (B, C, H, W) the gradient of the argument."""
        (every,) = ctx.saved_tensors
        found = torch.empty_like(every)
        _call("attention_backward", _last(dy), every, found, *ctx.sizes)
        return found, None


class Map(torch.autograd.Function):
    """A linear map of the channels at every position, float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x (B, C, H, W), weight (C', C), bias (C',) -> (B, C', H, W), channels-last."""
        x, weight = _last(x), weight.contiguous()
        y = _last(x.new_empty(len(x), len(weight), *x.shape[2:]))
        ctx.sizes = _sizes(x, x.shape[1], len(weight))
        _call("map_forward", x, weight, bias, y, *ctx.sizes)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From dy (B, C', H, W) the gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), weight.new_empty(len(x), *weight.shape)
        dbias = dweight.new_empty(dweight.shape[:2])
        _call("map_backward", _last(dy), x, weight, dx, dweight, dbias, *ctx.sizes)
        return dx, dweight.sum(0), dbias.sum(0)


class Native(Kernels):
    """C for float32 arrays on a processor; everything else goes to torch's functions, by rule."""

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
        out: Tensor = Attend.apply(every, heads)
        return out

    def mapped(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not _able(x):
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
    here = x.device.type == "cpu" and x.dtype == torch.float32
    known = act is F.silu or isinstance(act, nn.SiLU | nn.Identity)
    return here and known and not torch.is_autocast_enabled("cpu")


def _normed(x: Tensor, shift: Tensor | None, norm: nn.GroupNorm, act: Act) -> Tensor:
    silu = not isinstance(act, nn.Identity)
    y: Tensor = Norm.apply(x, shift, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    return y


NATIVE = Native()


def obstacle(device: str | torch.device) -> str | None:
    """What stands in the way of the kernels in C on a device; None if nothing does."""
    if torch.device(device).type != "cpu":
        return f"they run on processors, not on {torch.device(device).type}"
    return _library()[1] or None


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
