"""From a fresh process to the end of the first update: imports, construction, compilation.

Compiled code of earlier processes is not used: every process has a cache of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

START = "first update"
PROGRAM = """
import sys
sys.path[:0] = {paths!r}
import argparse, speed, torch
from peers import contest
from peers.contest import BIG, SMALL
options = argparse.Namespace(compiled={compiled}, improved_diffusion={improved!r}, only=[{name!r}])
{threads}
device = "cuda" if torch.cuda.is_available() else "cpu"
setting = (SMALL if {small} else BIG).with_batch({batch!r})
contest.WANTED = {tuning!r}
speed.entered(options, setting, device)[0][0].update()
if device == "cuda":
    torch.cuda.synchronize()
"""


def first_steps(
    names: list[str], options: argparse.Namespace
) -> dict[str, dict[str, list[float] | str | None]]:
    """Seconds of the clock and of processor by contestant, or why its process failed."""
    found: dict[str, dict[str, list[float] | str | None]] = {}
    for _ in range(options.starts):
        for name in names:
            one = found.setdefault(name, {"clock": [], "processor": [], "failed": None})
            if one["failed"] is None:
                _start(name, options, one)
    return found


def _start(
    name: str, options: argparse.Namespace, found: dict[str, list[float] | str | None]
) -> None:
    project, tuning = name.split(", ", 1)
    improved = options.improved_diffusion
    program = PROGRAM.format(
        paths=[str(Path(__file__).resolve().parents[1]), *(p for p in sys.path if p)],
        name=project, tuning=tuning, compiled=options.compiled, small=options.small,
        threads=f"torch.set_num_threads({torch.get_num_threads()})", batch=options.batch,
        improved=None if improved is None else str(improved),
    )  # fmt: skip
    before = os.times()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/a", "TRITON_CACHE_DIR": f"{cache}/b"}
        try:
            done = subprocess.run(
                [sys.executable, "-c", program],
                capture_output=True, text=True, timeout=options.wait,
                env=os.environ | caches,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            found["failed"] = f"not ready after {options.wait:g} s"
            return
    clock, after = time.perf_counter() - start, os.times()
    if done.returncode:
        found["failed"] = (done.stderr.strip().splitlines() or ["?"])[-1]
        print(f"first update of {name} fails: {found['failed']}", file=sys.stderr)
        return
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    for key, value in (("clock", clock), ("processor", spent)):
        seconds = found[key]
        assert isinstance(seconds, list)
        seconds.append(value)
