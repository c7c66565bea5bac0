"""From a fresh process to the end of the first update: imports, construction, compilation."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import sys
sys.path[:0] = {paths!r}
import argparse, speed, torch
from peers.contest import BIG, SMALL
options = argparse.Namespace(compiled={compiled}, improved_diffusion={improved!r}, only=[{name!r}])
{threads}
device = "cuda" if torch.cuda.is_available() else "cpu"
setting = (SMALL if {small} else BIG).with_batch({batch!r})
from peers import contest
contest.WANTED = {tuning!r}
speed.entered(options, setting, device)[0].update()
if device == "cuda":
    torch.cuda.synchronize()
"""


def first_steps(names: list[str], options: argparse.Namespace) -> dict[str, float | None]:
    """Seconds of the clock by contestant; None where the process failed."""
    import torch

    found: dict[str, float | None] = {}
    improved = options.improved_diffusion
    small = options.small or (not torch.cuda.is_available() and not options.big)
    for name in names:
        project, tuning = name.rsplit(", ", 1)
        threads = f"torch.set_num_threads({options.threads})" if options.threads else ""
        program = PROGRAM.format(
            paths=[str(Path(__file__).resolve().parents[1]), *(p for p in sys.path if p)],
            name=project, tuning=tuning, compiled=options.compiled, threads=threads, small=small,
            improved=None if improved is None else str(improved), batch=options.batch,
        )  # fmt: skip
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        found[name] = time.perf_counter() - start if done.returncode == 0 else None
        if done.returncode:
            print(f"first step of {name} fails: {done.stderr[-300:]}", file=sys.stderr)
    return found
