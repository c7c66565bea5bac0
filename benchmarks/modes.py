"""Games on the ring and the grid, by the published counts: modes, high quality, reverse KL.

    python benchmarks/modes.py OUT [--seeds 5] [--recipes ring grid]

Trains `nelbo train ring` and `nelbo train grid` for each seed on one thread, as they are shipped,
and prints what the comparison at the end of each run found: modes, share of high quality and
reverse KL of 2,500 samples (PacGAN's definitions), the divergence from the true law after a blur
of both by the modes' own width and by a tenth of the data's deviation, and the certificate. Runs
that exist are read, not repeated. JSON goes to OUT/modes.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nelbo import console

BITS = math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--recipes", nargs="+", default=["ring", "grid"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.recipes:
        for seed in range(options.seeds):
            rows.append(_run(options.out, name, seed))
            (options.out / "modes.json").write_text(json.dumps(rows, indent=1))
            print(_table(rows), flush=True)
            print(flush=True)


def _run(out: Path, name: str, seed: int) -> dict[str, Any]:
    folder = out / f"{name}-{seed}"
    taken = folder.with_suffix(".seconds")
    if not taken.exists():
        started = time.perf_counter()
        before = os.times()
        asked = ["train", name, "--seed", str(seed), "--threads", "1", "--quiet"]
        environment = {**os.environ, "NELBO_OUT": str(out), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-m", "nelbo", *asked, "--out", str(folder)],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        after = os.times()
        spent = after.children_user + after.children_system
        spent -= before.children_user + before.children_system
        clock = time.perf_counter() - started
        taken.write_text(json.dumps({"cpu": spent, "clock": clock}))
    (document,) = (folder / "compare").glob("*.json")
    return {"recipe": name, "seed": seed, **json.loads(taken.read_text()), **_read(document)}


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    return {name: found[name] for name in ("modes", "blurred", "certificate")}


def _table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        modes, blurs = row["modes"], row["blurred"]
        cells.append(
            [
                f"{row['recipe']} {row['seed']}",
                f"{modes['found']}/{modes['of']}",
                f"{modes['held']}/{modes['of']}",
                f"{100 * modes['high_quality']:.2f}",
                f"{modes['reverse_kl_nats']:.4f}",
                *[f"{b['jsd_nats'] / BITS:.4f} ± {b['error'] / BITS:.4f}" for b in blurs],
                f"{row['certificate']['jsd_nats_lower'] / BITS:.4f}",
                f"{row['cpu']:.0f}",
            ]
        )
    head = ["run", "found", ">= 1 %", "HQ %", "reverse KL", "bits, sd", "bits, .1", "bits >="]
    return console.table(cells, [*head, "CPU s"])


if __name__ == "__main__":
    main()
