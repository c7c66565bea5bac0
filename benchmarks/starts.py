"""Seconds from typing a command to what it is for: help, checks, the first update of a training.

    python benchmarks/starts.py --out starts.json

Each command is a fresh process, in alternation; clock and processor. That of the first update is a
run of one update, with its checkpoint, and nothing measured, drawn or reported after it: the run
is stopped there. What the peers need is a row of benchmarks/speed.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST = """
import os, sys
from nelbo import trainer
update = trainer.Trainer.update
def first(self):
    update(self)
    os._exit(0)
trainer.Trainer.update = first
from nelbo.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""A process that ends with its first update."""
COMMANDS = {
    "nelbo --help": ("-m", "nelbo", "--help"),
    "nelbo doctor": ("-m", "nelbo", "doctor"),
    "nelbo train swissroll, to the first update": ("-c", FIRST, "train", "swissroll", "--quiet"),
    "nelbo train digits, to the first update": ("-c", FIRST, "train", "digits", "--quiet"),
    "import torch": ("-c", "import torch"),
}


def started(words: tuple[str, ...]) -> tuple[float, float]:
    """Seconds of the clock and of processor of a process.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        more = os.environ | {"NELBO_OUT": f"{folder}/runs"}
        before, start = os.times(), time.perf_counter()
        subprocess.run([sys.executable, *words], env=more, capture_output=True, check=True)
        clock, after = time.perf_counter() - start, os.times()
    spent = after.children_user + after.children_system
    return clock, spent - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("starts.json"))
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {
        name: {"clock": [], "processor": []} for name in COMMANDS
    }
    for number in range(options.rounds + 1):
        for name, words in COMMANDS.items():
            clock, spent = started(words)
            if number:  # the first one fills the system's page cache
                found[name]["clock"].append(clock)
                found[name]["processor"].append(spent)
    document = {"schema": 1, "load": os.getloadavg(), "starts": found}
    options.out.write_text(json.dumps(document, indent=1))
    for name, one in found.items():
        clock, spent = (statistics.median(one[key]) for key in ("clock", "processor"))
        print(f"{name:45s} {clock:6.2f} s on the clock (least {min(one['clock']):.2f}), "
              f"{spent:6.2f} s of processor")  # fmt: skip


if __name__ == "__main__":
    main()
