"""How cost grows: with the side of an image, the batch, the latents, the calls, the ranks.

    python benchmarks/growth.py --out growth.json

Seconds of processor of one thread, which other programs on the same cores hardly change, and their
ratios to the row above; the median of --rounds, in alternation. The network is small (16 channels,
1-2, one block, attention at 8x8); a ratio says what the work does, not how fast a machine is. The
part of the ranks starts two processes of gloo and counts what they add up in an update.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nelbo import distributed
from nelbo.evaluation import evaluate
from nelbo.recipes.build import build
from nelbo.recipes.options import Images
from nelbo.trainer import Trainer
from nelbo.walks.train import trainer_of

Work = Callable[[], object]


def made(folder: Path, side: int, batch: int = 8) -> tuple[Any, Trainer]:
    """A recipe and its trainer, on noise."""
    path = folder / f"{side}.npy"
    if not path.exists():
        draws = np.random.default_rng(0)
        np.save(path, draws.integers(0, 256, (128, 3, side, side), dtype=np.uint8))
    recipe = build(
        Images(
            path=path, channels=16, multipliers=(1, 2), layers=1, attention=(8,), dropout=0.0,
            batch=batch, steps=10**6, ahead=0, cache="ram",
        )
    )  # fmt: skip
    return recipe, trainer_of(recipe, "cpu")


def processor(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Median seconds of processor of each, in alternation, after one that warms up."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if number:
                spent[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in spent.items()}


def updates(folder: Path, rounds: int) -> dict[str, float]:
    """Of one update, by side and by batch."""
    shapes = {f"{s}x{s}, batch 8": (s, 8) for s in (16, 32, 64)}
    shapes |= {f"32x32, batch {b}": (32, b) for b in (16, 32)}
    return processor({n: made(folder, *s)[1].update for n, s in shapes.items()}, rounds)


def bounds(folder: Path, rounds: int) -> dict[str, float]:
    """Of the bound of 16 images, every term on N latents, and by few calls on 1,000."""
    recipe, _ = made(folder, 16)
    data, model = recipe.dataset, recipe.model

    def measured(latents: int, calls: float | None) -> Work:
        times = recipe.model.process.schedule.grid(latents)
        return lambda: evaluate(
            model, data.test[:16], times, encode=data.encode, calls=calls,
            pilot=data.train[:8], replicates=1, batch=16,
        )  # fmt: skip

    works = {f"every term, N = {n}": measured(n, None) for n in (16, 64, 256)}
    works |= {f"{c} calls, N = 1000": measured(1000, c) for c in (4, 16, 64)}
    return processor(works, rounds)


def shared(path: Path) -> None:
    """As one of some ranks: what is added up in an update, and seconds of processor of it."""
    torch.set_num_threads(1)
    distributed.init(60.0)
    sent: list[int] = []
    right = distributed.total

    def total(values: torch.Tensor) -> torch.Tensor:
        sent.append(values.numel() * values.element_size())
        return right(values)

    distributed.total = total  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        _, trainer = made(Path(folder), 32, 16)
        trainer.update()
        sent.clear()
        start = time.process_time()
        for _ in range(3):
            trainer.update()
        spent = (time.process_time() - start) / 3
    count = sum(p.numel() for p in trainer.players[0].module.parameters())
    found = {"bytes": sent[: len(sent) // 3], "seconds": spent, "parameters": count}
    distributed.shutdown()
    path.with_suffix(f".{os.environ.get('RANK', '0')}").write_text(json.dumps(found))


def ranks(folder: Path) -> dict[str, Any]:
    """One process, and two."""
    found = {}
    for world in (1, 2):
        path = folder / f"ranks{world}.x"
        words = [__file__, "--rank", str(path)]
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        subprocess.run([sys.executable, *run, *words], check=True, capture_output=True)
        found[f"{world}"] = json.loads(path.with_suffix(".0").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("growth.json"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        shared(options.rank)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        document = {
            "schema": 1,
            "torch": torch.__version__,
            "updates": updates(folder, options.rounds),
            "bounds": bounds(folder, options.rounds),
            "ranks": ranks(folder),
        }
    options.out.write_text(json.dumps(document, indent=1))
    for part in ("updates", "bounds"):
        before = None
        for name, seconds in document[part].items():
            ratio = "" if before is None else f"   x {seconds / before:.2f}"
            print(f"{name:24s} {seconds * 1e3:9.1f} ms of processor{ratio}")
            before = seconds
    for world, row in document["ranks"].items():
        said = f"{sum(row['bytes']):,} bytes added up in {len(row['bytes'])} collectives"
        print(f"{world} ranks: {said}, {row['seconds'] * 1e3:.0f} ms of processor of the first")


if __name__ == "__main__":
    main()
