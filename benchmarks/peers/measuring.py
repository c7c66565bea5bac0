"""Taking turns: rates by round, memory, operations, and the ceiling of the same machine."""

from __future__ import annotations

import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from peers.contest import Contestant

TIMES = {"training": 3, "forward and backward": 3, "forward": 1}
"""Operations of a work, in those of a forward call."""


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
    ready: float | None = None
    """Seconds of three calls that warm up: compilation, choice of algorithms."""
    failed: str | None = None

    def json(self, flops: dict[str, float], top: Ceiling) -> dict[str, Any]:
        """A row of the document."""
        median = statistics.median(self.rates) if self.rates else None
        each, share = flops[self.one.name], None
        if median is not None and self.work in TIMES:
            share = median * each * TIMES[self.work] / (top.tflops * 1e12)
        return {
            "work": self.work,
            "project": self.one.project,
            "tuning": self.one.tuning.name,
            "batch": self.one.setting.batch,
            "parameters": sum(p.numel() for p in self.one.network.parameters()),
            "gflop_per_image": each / 1e9,
            "rates": self.rates,
            "median": median,
            "processor_rates": self.processor,
            "share_of_ceiling": share,
            "peak_bytes": self.peak or None,
            "seconds_to_warm_up": self.ready,
            "failed": self.failed,
        }


Turn = tuple[str, Contestant]
"""A kind of work, and who does it."""


Doing = tuple[Callable[[], Any], float | None]


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
    """Floating-point operations of a forward call on an image, of products and convolutions.

    0 of a network that cannot be called.
    """
    original = one.network._compiled_call_impl
    one.network._compiled_call_impl = None
    try:
        with FlopCounterMode(display=False) as counter:
            one.predict()
    except Exception:  # every work will say what is wrong
        return 0.0
    finally:
        one.network._compiled_call_impl = original
    return float(counter.get_total_flops()) / one.setting.batch


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Give up on what is inside after some seconds, as soon as Python runs again.

    Raises:
        TimeoutError: they are over.
    """

    def over(number: int, frame: Any) -> None:
        raise TimeoutError(f"not ready after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rounds(
    turns: dict[Turn, Doing],
    device: str,
    count: int,
    seconds: float,
    wait: float = 600.0,
) -> list[Measured]:
    """`count` turns of every contestant at every work, after one that warms up (and compiles).

    Arguments:
        turns: what to call, and how many images one call does; None if that is what it returns.
        wait: seconds to warm up.
    """
    found = {turn: Measured(*turn) for turn in turns}
    for turn, (call, _) in turns.items():
        _tried(found[turn], lambda turn=turn, call=call: _warm(found[turn], call, device, wait))
    for number in range(count):
        able = [turn for turn in turns if not found[turn].failed]
        for turn in able[number % len(able) :] + able[: number % len(able)] if able else []:
            _tried(
                found[turn], lambda turn=turn: _round(found[turn], turns[turn], device, seconds)
            )
        print(f"round {number + 1} of {count}", file=sys.stderr)
    return list(found.values())


def _tried(found: Measured, work: Callable[[], None]) -> None:
    """Who fails is named, has no rates, and takes no further turns."""
    try:
        work()
    except Exception as error:  # a peer that does not run is a result
        said = str(error).splitlines()[0] if str(error) else ""
        found.failed = f"{type(error).__name__}: {said}"
        found.rates, found.processor = [], []
        print(f"{found.work}: {found.one.name} fails: {found.failed}", file=sys.stderr)


def _warm(found: Measured, call: Callable[[], Any], device: str, wait: float) -> None:
    start, before = time.perf_counter(), torch.cuda.memory_allocated()
    with patience(wait):
        for number in range(3):
            if number == 2 and device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            call()
        synchronised(device)
    found.ready = time.perf_counter() - start
    if device == "cuda":  # what the others hold is not its own
        found.peak = torch.cuda.max_memory_allocated() - before + found.one.resident


def _round(found: Measured, turn: Doing, device: str, seconds: float) -> None:
    call, images = turn
    calls, done = 0, 0.0
    synchronised(device)
    start, processor = time.perf_counter(), time.process_time()
    while not calls or time.perf_counter() - start < seconds:
        said = call()
        done += said if images is None else images
        calls += 1
        if calls % 4 == 0:
            synchronised(device)
    synchronised(device)
    found.rates.append(done / (time.perf_counter() - start))
    found.processor.append(done / (time.process_time() - processor))
