"""Taking turns: rates by round, memory, operations, and the ceiling of the same machine."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from peers.contest import Contestant


@dataclass(frozen=True)
class Ceiling:
    """The rate of a large product of matrices, measured in the same run."""

    tflops: float
    what: str


@dataclass
class Measured:
    """One contestant at one kind of work; a number for every round."""

    work: str
    one: Contestant
    rates: list[float] = field(default_factory=list)
    """Images (in evaluation: network calls) per second."""
    processor: list[float] = field(default_factory=list)
    """The same per second of processor, of all threads together."""
    peak: int = 0
    """Bytes of the device at most, on a GPU."""
    failed: str | None = None

    def json(self, flops: dict[str, float], top: Ceiling) -> dict[str, Any]:
        """A row of the document."""
        median = statistics.median(self.rates) if self.rates else None
        each = flops[self.one.name]
        share = None
        if median is not None and self.work in ("training", "forward"):
            share = median * each * (3 if self.work == "training" else 1) / (top.tflops * 1e12)
        return {
            "work": self.work,
            "project": self.one.project,
            "tuning": self.one.tuning.name,
            "parameters": sum(p.numel() for p in self.one.network.parameters()),
            "gflop_per_image": each / 1e9,
            "rates": self.rates,
            "median": median,
            "processor_rates": self.processor,
            "share_of_ceiling": share,
            "peak_bytes": self.peak or None,
            "failed": self.failed,
        }


def synchronised(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ceiling(device: str) -> Ceiling:
    """The best of some products of square matrices, random numbers: bfloat16, float32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        synchronised(device)
        start = time.perf_counter()
        a @ b
        synchronised(device)
        best = min(best, time.perf_counter() - start)
    name = str(dtype).removeprefix("torch.")
    return Ceiling(2 * n**3 / best / 1e12, f"{n}x{n} product in {name}")


def flops(one: Contestant) -> float:
    """Floating-point operations of a forward call on a batch, of products and convolutions."""
    original = one.network._compiled_call_impl
    one.network._compiled_call_impl = None
    with FlopCounterMode(display=False) as counter:
        one.predict()
    one.network._compiled_call_impl = original
    return float(counter.get_total_flops())


def rounds(
    work: str,
    turns: dict[Contestant, tuple[Callable[[], Any], float]],
    device: str,
    count: int,
    seconds: float,
) -> list[Measured]:
    """`count` turns of every contestant, after one that warms up (and compiles).

    Arguments:
        turns: what to call, and how many images one call does.
    """
    found = {one: Measured(work, one) for one in turns}
    for one, (call, _) in turns.items():
        found[one].failed, found[one].peak = _warmed(call, device)
        if found[one].failed:
            print(f"{work}: {one.name} fails: {found[one].failed}", file=sys.stderr)
    able = [one for one in turns if not found[one].failed]
    for number in range(count):
        for one in able[number % len(able) :] + able[: number % len(able)] if able else []:
            rate, processor = _turn(*turns[one], device, seconds)
            found[one].rates.append(rate)
            found[one].processor.append(processor)
        print(f"{work}: round {number + 1} of {count}", file=sys.stderr)
    return list(found.values())


def _warmed(call: Callable[[], Any], device: str) -> tuple[str | None, int]:
    try:
        for number in range(3):
            if number == 2 and device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            call()
        synchronised(device)
    except Exception as error:  # a peer that does not run is a result
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", 0
    return None, torch.cuda.max_memory_allocated() if device == "cuda" else 0


def _turn(
    call: Callable[[], Any], images: float, device: str, seconds: float
) -> tuple[float, float]:
    calls = 0
    synchronised(device)
    start, processor = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        call()
        calls += 1
        if calls % 4 == 0:
            synchronised(device)
    synchronised(device)
    done = calls * images
    return done / (time.perf_counter() - start), done / (time.process_time() - processor)
