"""The sandwich on trained models: certified <= exact <= upper, for both families.

    python benchmarks/sandwich.py OUT [--data swissroll ring gaussian] [--seeds 2] [--n 5000]

For every data set of known law a diffusion model and a game are trained twice, for a twentieth of
the recipe's updates and for all of them, and compared with fresh draws of the law. A diffusion
model has its own divergence (by its decoder's means) and an upper side (by its bound); a game has
neither, and its rungs of the noise ladder are held against the divergence of the blurred laws.
A line with a violation ends with !. Runs that exist are read, not repeated. JSON goes to
OUT/sandwich.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nelbo import console
from nelbo.recipes.families import families
from nelbo.recipes.games import GAMES
from nelbo.recipes.options import RECIPES

SHARES = (0.05, 1.0)
MORE = {("ring", "diffusion"): ["--logsnr-max", "9.5"]}
"""A decoder as narrow as that of the recipe would need too fine a lattice for its exact value."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", nargs="+", default=["swissroll", "ring", "gaussian"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--n", type=int, default=5000)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in options.data:
        for family in ("diffusion", "game"):
            for share in SHARES:
                for seed in range(options.seeds):
                    rows += _lines(options, name, family, share, seed)
                    (options.out / "sandwich.json").write_text(json.dumps(rows, indent=1))
                    print(_table(rows), flush=True)
                    print(flush=True)


def _lines(
    options: argparse.Namespace, name: str, family: str, share: float, seed: int
) -> list[dict[str, Any]]:
    """The lines of one run: the pair itself, then the rungs whose exact value is known."""
    kinds: dict[str, Any] = RECIPES if family == "diffusion" else GAMES
    steps = round(share * kinds[name]().steps)
    folder = options.out / f"{name}-{family}-{steps}-{seed}"
    flag = [] if families(name)[0] == family else ["--game" if family == "game" else "--no-game"]
    if not (folder / "report.html").exists():
        quiet = ["--no-compare"] if family == "game" else []
        run = ["--seed", str(seed), "--steps", str(steps), "--out", str(folder)]
        more = [*flag, *run, *MORE.get((name, family), []), *quiet, "--threads", "1", "--quiet"]
        _nelbo(options.out, "train", name, *more)
    if not list(folder.glob("compare/*.json")):
        asked = ["--n", str(options.n), "--no-metrics", "--seed", str(seed), "--quiet"]
        _nelbo(options.out, "compare", "data", str(folder), *asked, "--threads", "1")
    document = json.loads(next(folder.glob("compare/*.json")).read_text())
    run = {"data": name, "family": family, "steps": steps, "seed": seed}
    sandwich = document["sandwich"] or {}
    exact = sandwich.get("exact") or {}
    whole = {
        "what": "the pair",
        "lower": document["certificate"]["jsd_nats_lower"],
        "exact": exact.get("jsd_nats"),
        "error": exact.get("error", 0.0),
        "upper": sandwich.get("jsd_nats_upper"),
    }
    rungs = [
        {
            "what": f"log-SNR {rung['logsnr']:g}",
            "lower": rung["certificate"]["jsd_nats_lower"],
            "exact": rung["exact"],
            "error": rung.get("exact_error") or 0.0,
            "upper": None,
        }
        for rung in document["ladder"]
        if rung["exact"] is not None
    ]
    return [run | line for line in [whole, *rungs]]


def _nelbo(out: Path, *arguments: str) -> None:
    environment = {**os.environ, "NELBO_OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nelbo", *arguments]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def violated(line: dict[str, Any]) -> bool:
    """Whether certified <= exact <= upper fails, within the error of the exact value."""
    lower, upper, error = line["lower"], line["upper"], line["error"]
    exact = line["exact"]
    if exact is None:
        return upper is not None and lower > upper
    # an estimate of a small divergence may lie below 0
    return bool(lower > max(exact, 0.0) + error or (upper is not None and exact - error > upper))


def _table(rows: list[dict[str, Any]]) -> str:
    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    cells = [
        [
            f"{row['data']} {row['family']} {row['steps']} seed {row['seed']}",
            row["what"],
            shown(row["lower"]),
            shown(row["exact"]) + (f" ± {row['error']:.4f}" if row["error"] else ""),
            shown(row["upper"]) + (" !" if violated(row) else ""),
        ]
        for row in rows
    ]
    return console.table(cells, ["run", "", "certified", "exact", "upper"])


if __name__ == "__main__":
    main()
