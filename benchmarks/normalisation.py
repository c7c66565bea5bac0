"""How fast the fused normalisation is, beside a copy of the same bytes: one command on a GPU.

    python benchmarks/normalisation.py --out normalisation.json [--tune]

The shapes are those of the 35.7 M network at batch 256. Forward moves an array twice (x, y), the
gradient three times (x, dy, dx); a rate is these bytes over the time, and `of copy` is that rate
over the rate of `torch.Tensor.copy_` of an array of the same size. `torch` is group_norm and silu
as torch computes them, eagerly and compiled. With --tune every plan that a shape allows is tried,
and the best are printed as the lines of `norm_plans.MEASURED`. The gradient is timed without the
sum over examples, which is a small array.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nelbo.networks import norm_kernels
from nelbo.networks.norm_plans import Plan, padded, plan

SHAPES = ((128, 32), (256, 32), (384, 32), (128, 16), (256, 16), (384, 16), (512, 16), (256, 8),
          (512, 8), (256, 4), (512, 4))  # fmt: skip
"""Channels and height; 32 groups."""
GROUPS, EPS = 32, 1e-5
FLUSH = 256 * 2**20
"""Bytes that are written before each call, so that no array is in the cache from the last one."""


class Work:
    """The arrays of one shape."""

    def __init__(self, batch: int, channels: int, height: int, dtype: torch.dtype) -> None:
        last = torch.channels_last
        kind: dict[str, Any] = {"device": "cuda", "dtype": dtype}
        shape = (batch, channels, height, height)
        self.x, self.dy = (torch.randn(shape, **kind).to(memory_format=last) for _ in range(2))
        self.shift = torch.randn(batch, channels, **kind)
        self.gain, self.bias = (torch.randn(channels, device="cuda") for _ in range(2))
        self.y, self.means, self.roots = self.forward()

    def forward(self, chosen: Plan | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return norm_kernels.forward(self.x, self.shift, self.gain, self.bias, GROUPS, EPS, chosen)

    def backward(self, chosen: Plan | None = None) -> Tensor:
        return norm_kernels.backward(
            self.dy, self.x, self.shift, self.gain, self.bias, self.means, self.roots, GROUPS,
            chosen,
        )[0]  # fmt: skip

    def torch(self, x: Tensor) -> Tensor:
        h = x + self.shift[:, :, None, None]
        return F.silu(F.group_norm(h, GROUPS, self.gain.to(x.dtype), self.bias.to(x.dtype), EPS))


def milliseconds(call: Callable[[], object], flush: Tensor, count: int = 30) -> float:
    """Median time on the GPU of one call."""
    for _ in range(3):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def plans(channels: int, positions: int, itemsize: int, arrays: int) -> Iterator[Plan]:
    """The rule's own plan, and what a shape allows: rows of 16 to 128 bytes, held or walked."""
    rule = plan(channels, GROUPS, positions, itemsize, arrays)
    yield rule
    width = channels // GROUPS
    lanes = padded(width)
    held = 1
    while held <= GROUPS:
        wide = held * width * itemsize
        for tile in sorted({positions, min(positions, 64)}):
            elements = tile * held * lanes * arrays
            for warps in (2, 4, 8, 16):
                one = Plan(held, tile, warps)
                if 16 <= wide <= 128 and 16 <= elements / (32 * warps) <= 128 and one != rule:
                    yield one
        held *= 2


def measured(one: Work, flush: Tensor, tune: bool, compiled: bool) -> dict[str, Any]:
    """One shape: copy, kernel, torch, forward and backward; the best plan if asked for."""
    x, size = one.x, one.x.nbytes
    other = torch.empty_like(x)
    copy = 2 * size / milliseconds(lambda: other.copy_(x), flush)
    found: dict[str, Any] = {"shape": list(x.shape), "copy": copy / 1e6}
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    theirs = {"torch": one.torch}
    if compiled:
        theirs["compiled"] = torch.compile(one.torch)
    calls = {"forward": one.forward, "backward": one.backward}
    for name, moved, arrays in (("forward", 2, 1), ("backward", 3, 2)):
        bytes_ = moved * size
        found[name] = {"kernel": bytes_ / milliseconds(calls[name], flush) / 1e6}
        for who, function in theirs.items():
            y = function(leaf)

            def gradient(y: Tensor = y) -> object:
                return torch.autograd.grad(y, leaf, one.dy, retain_graph=True)

            def value(function: Callable[[Tensor], Tensor] = function) -> object:
                return function(leaf)

            call = value if name == "forward" else gradient
            found[name][who] = bytes_ / milliseconds(call, flush) / 1e6
        if tune:
            found[name] |= best(one, calls[name], flush, bytes_, arrays)
    return found


def best(
    one: Work, call: Callable[[Plan], object], flush: Tensor, size: int, arrays: int
) -> dict[str, Any]:
    """The fastest plan, and its rate."""
    channels, positions = one.x.shape[1], one.x.shape[2] * one.x.shape[3]
    times: dict[Plan, float] = {}
    for chosen in plans(channels, positions, one.x.element_size(), arrays):
        try:
            times[chosen] = milliseconds(lambda chosen=chosen: call(chosen), flush, 10)
        except Exception as error:  # a plan that a machine cannot run is not the best one
            print(f"{tuple(one.x.shape)} {chosen}: {error}", file=sys.stderr)
    taken = min(times, key=lambda chosen: times[chosen])
    return {"best": size / times[taken] / 1e6, "plan": list(taken),
            "all": {str(tuple(p)): size / t / 1e6 for p, t in times.items()}}  # fmt: skip


def lines(rows: list[dict[str, Any]], itemsize: int) -> Iterator[str]:
    """The table, and the plans as they are written in the source."""
    head = "| channels, height | copy, GB/s |"
    for name in ("forward", "backward"):
        head += "".join(f" {name}: {k} |" for k in rows[0][name] if k not in ("all", "plan"))
        head += f" {name}: kernel of copy |"
    yield head
    yield "|---" * (head.count("|") - 1) + "|"
    for row in rows:
        text = f"| {row['shape'][1]}, {row['shape'][2]} | {row['copy']:,.0f} |"
        for name in ("forward", "backward"):
            rates = {k: v for k, v in row[name].items() if k not in ("all", "plan")}
            text += "".join(f" {rate:,.0f} |" for rate in rates.values())
            text += f" {rates.get('best', rates['kernel']) / row['copy']:.2f} |"
        yield text
    for row in rows:
        for arrays, name in ((1, "forward"), (2, "backward")):
            if "plan" in row[name]:
                place = (row["shape"][1], GROUPS, row["shape"][2] ** 2, itemsize, arrays)
                yield f"    {place}: Plan{tuple(row[name]['plan'])},"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--float32", action="store_true", help="instead of bfloat16")
    parser.add_argument("--tune", action="store_true", help="try every plan; takes minutes")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available() or not norm_kernels.INSTALLED:
        print("it needs a CUDA device and triton, and one of them is missing", file=sys.stderr)
        return 3
    dtype = torch.float32 if options.float32 else torch.bfloat16
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    rows = []
    for channels, height in SHAPES:
        one = Work(options.batch, channels, height, dtype)
        rows.append(measured(one, flush, options.tune, not options.no_compile))
        print(f"{channels} channels at {height}: done", file=sys.stderr)
    print("\n".join(lines(rows, dtype.itemsize)))
    if options.out is not None:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                 "dtype": str(dtype), "batch": options.batch, "unit": "GB/s"}  # fmt: skip
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
