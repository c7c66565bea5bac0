r"""Does the loader keep up? Images per second with and without it, and what a training step sees.

Rows, each measured in alternation with what it is compared to, in one process:

- 32x32 arrays in memory and in a mapped file: batches on the model's scale, made on demand and
  ahead of time by a thread;
- a folder of PNG files against Pillow alone (`np.asarray(Image.open(path))`), on as many threads;
- Parquet of the same PNG files, if pyarrow is installed;
- training steps of a small U-Net on a batch that is there against batches of the loader;
- the listing of a folder of tiny files.

Ratios are medians over rounds, the spread is half the distance of the quartiles; the ratio of CPU
times (all threads of the process) tells more where other programs run on the same cores. Files are
in the system's page cache: no disk is measured.

    python benchmarks/loader.py --out loader.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nelbo.data.base import Dataset
from nelbo.data.feed import Feed
from nelbo.data.folder import Folder, listing
from nelbo.data.images import SUFFIXES, images
from nelbo.data.loading import batch_indices
from nelbo.data.part import Chosen
from nelbo.data.sources import open_path
from nelbo.data.survey import shares, workers
from nelbo.recipes.build import build
from nelbo.recipes.options import Images
from nelbo.walks.train import trainer_of

BATCH = 128
Work = Callable[[int], object]
"""Does the work of a round; all contestants of a row do the same."""


def pictures(n: int, side: int) -> np.ndarray:
    """(n, side, side, 3) smooth noise, which PNG packs as it packs photographs."""
    draws = np.random.default_rng(0)
    coarse = draws.integers(0, 256, (n, side // 4, side // 4, 3), dtype=np.uint8)
    return np.stack(
        [
            np.asarray(Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC))
            for c in coarse
        ]
    )


def compared(contestants: dict[str, Work], count: int, rounds: int) -> dict[str, Any]:
    """Units per second of each, in alternation, and ratios to the first one.

    Arguments:
        count: units in the work of one round.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-1, rounds):  # one round to warm up
        for name, work in contestants.items():
            start, cpu = time.perf_counter(), time.process_time()
            work(max(number, 0))
            if number >= 0:
                spent[name].append((time.process_time() - cpu) / count)
                rates[name].append(count / (time.perf_counter() - start))
    first, least = next(iter(rates.values())), next(iter(spent.values()))
    found: dict[str, Any] = {}
    for name, own in rates.items():
        ratios = [a / b for a, b in zip(own, first, strict=True)]
        low, _, high = statistics.quantiles(own, n=4)
        low_ratio, _, high_ratio = statistics.quantiles(ratios, n=4)
        cheaper = [a / b for a, b in zip(least, spent[name], strict=True)]
        found[name] = {
            "cpu_microseconds": statistics.median(spent[name]) * 1e6,
            "cpu_ratio": statistics.median(cheaper),
            "per_second": statistics.median(own),
            "spread": (high - low) / 2,
            "ratio": statistics.median(ratios),
            "ratio_spread": (high_ratio - low_ratio) / 2,
        }
    return found


def fed(dataset: Dataset, ahead: int, batches: int) -> Work:
    """Batches of a feed that goes on from round to round."""
    n = len(dataset.train)
    feed = Feed(dataset, lambda step: batch_indices(n, BATCH, 0, step), "cpu", ahead)
    state = {"next": 0}

    def work(number: int) -> Tensor:
        for _ in range(batches):
            last = feed(state["next"])
            state["next"] += 1
        return last

    return work


def loaded(path: Path, batches: int, rounds: int) -> dict[str, Any]:
    """Arrays in memory and mapped, on demand and ahead."""
    held, mapped = (open_path(path, cache=cache) for cache in ("ram", "none"))
    names = {
        "in memory, on demand": fed(held, 0, batches),
        "in memory, ahead": fed(held, 2, batches),
        "mapped, on demand": fed(mapped, 0, batches),
        "mapped, ahead": fed(mapped, 2, batches),
    }
    return compared(names, BATCH * batches, rounds)


def decoded(root: Path, n: int, rounds: int) -> dict[str, Any]:
    """A folder of PNG files: Pillow alone, then nelbo's rows, on the same files and threads."""
    data = images(root, cache="none")
    train = data.train
    assert isinstance(train, Chosen) and isinstance(train.of, Folder)
    folder = train.of
    pool = ThreadPoolExecutor(workers())
    draws = np.random.default_rng(0)
    orders = [draws.permutation(len(folder))[:n] for _ in range(rounds)]
    batches = [[order[i : i + BATCH] for i in range(0, n, BATCH)] for order in orders]

    def alone(part: Any) -> list[np.ndarray]:
        return [np.asarray(Image.open(folder.files.path(int(folder.kept[k])))) for k in part]

    def pillow(number: int) -> None:
        for rows in batches[number]:
            list(pool.map(alone, shares(rows)))

    def one(number: int) -> None:
        for rows in batches[number]:
            alone(rows)

    def nelbo(number: int) -> None:
        for rows in batches[number]:
            folder.read(rows)

    names = {f"Pillow, {workers()} threads": pillow, "nelbo": nelbo, "Pillow, one thread": one}
    return compared(names, n, rounds)


def sharded(root: Path, path: Path, n: int, rounds: int) -> dict[str, Any] | str:
    """Parquet of the same files: held in memory, and decoded when asked for."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        return "skipped: pyarrow is not installed"
    data = [file.read_bytes() for file in sorted(root.rglob("*.png"))]
    parquet.write_table(arrow.table({"image": data}), path, row_group_size=1000)
    held, lazy = (open_path(path, cache=cache) for cache in ("ram", "none"))
    names = {"in memory": fed(held, 2, n // BATCH), "decoded": fed(lazy, 2, n // BATCH)}
    return compared(names, n // BATCH * BATCH, rounds)


def stepped(path: Path, root: Path, steps: int, rounds: int) -> dict[str, Any]:
    """Training steps on one batch that is there, and on batches of the loader."""
    names: dict[str, Work] = {}
    for name, place, cache, ahead in (
        ("a resident batch", path, "ram", 0),
        ("in memory, ahead", path, "ram", 2),
        ("mapped, on demand", path, "none", 0),
        ("mapped, ahead", path, "none", 2),
        ("PNG folder, on demand", root, "none", 0),
        ("PNG folder, ahead", root, "none", 2),
    ):
        options = Images(
            path=place,
            cache=cache,
            ahead=ahead,
            channels=16,
            multipliers=(1, 1),
            layers=1,
            attention=(),
            batch=32,
            steps=10**6,
            dropout=0.0,
        )
        trainer = trainer_of(build(options), "cpu")
        if name == "a resident batch":
            batch = trainer.batch(0)
            trainer.batch = lambda step, batch=batch: batch  # type: ignore[misc]

        def work(number: int, trainer: Any = trainer) -> None:
            for _ in range(steps):
                trainer.update()

        names[name] = work
    return compared(names, steps * 32, rounds)


def listed(root: Path, n: int) -> dict[str, Any]:
    """Seconds to list n tiny files in folders of 1,000."""
    for i in range(n):
        folder = root / f"{i // 1000:05d}"
        if i % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{i:09d}.png").write_bytes(b"x")
    found, spent = [], []
    for _ in range(3):
        start, cpu = time.perf_counter(), time.process_time()
        files = listing(root, SUFFIXES)
        found.append(time.perf_counter() - start)
        spent.append(time.process_time() - cpu)
    assert len(files) == n
    return {
        "files": n,
        "seconds": found,
        "cpu_microseconds_per_file": min(spent) / n * 1e6,
        "microseconds_per_file": min(found) / n * 1e6,
    }


def show(title: str, rows: Any) -> None:
    print(f"\n{title}")
    if isinstance(rows, str):
        print(f"  {rows}")
        return
    for name, row in rows.items():
        rate = f"{row['per_second']:12,.0f} ± {row['spread']:,.0f}"
        print(
            f"  {name:24}{rate}   x {row['ratio']:.3f} ± {row['ratio_spread']:.3f}"
            f"   CPU {row['cpu_microseconds']:9,.1f} us, x {row['cpu_ratio']:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("loader.json"))
    parser.add_argument("--images", type=int, default=20_000, help="32x32 images in the arrays")
    parser.add_argument("--files", type=int, default=3_000, help="PNG files of each size")
    parser.add_argument("--listed", type=int, default=100_000, help="tiny files that are listed")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--arrays-only", action="store_true", help="the rows of arrays alone")
    parser.add_argument("--threads", type=int, default=1, help="threads of a training step")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    document: dict[str, Any] = {
        "schema": 1,
        "commit": commit.stdout.strip(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "options": {k: str(v) for k, v in vars(asked).items()},
        "unit": "images per second",
    }
    rounds = asked.rounds
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["NELBO_CACHE"] = f"{scratch}/cache"
        root = Path(scratch)
        array = root / "a.npy"
        some = np.moveaxis(pictures(2000, 32), 3, 1)
        noise = np.random.default_rng(1).integers(0, 4, (asked.images, 1, 1, 1), dtype=np.uint8)
        np.save(array, np.resize(some, (asked.images, 3, 32, 32)) + noise)
        document["arrays"] = loaded(array, 100, rounds)
        show("32x32x3 arrays, images/s", document["arrays"])
        if asked.arrays_only:
            asked.out.write_text(json.dumps(document, indent=1))
            return
        for side in (32, 128):
            folder = root / f"png{side}"
            folder.mkdir()
            for i, one in enumerate(pictures(asked.files, side)):
                Image.fromarray(one).save(folder / f"{i}.png")
            n = min(1024, asked.files // BATCH * BATCH) if side > 32 else asked.files
            document[f"png{side}"] = decoded(folder, n, rounds)
            show(f"PNG {side}x{side}, images/s", document[f"png{side}"])
        document["parquet32"] = sharded(root / "png32", root / "a.parquet", 2048, rounds)
        show("Parquet of PNG 32x32, images/s", document["parquet32"])
        document["steps"] = stepped(array, root / "png32", 4, rounds)
        show("training steps, 16 channels, batch 32, images/s", document["steps"])
        document["listing"] = listed(root / "tiny", asked.listed)
        told = "{microseconds_per_file:.2f} us a file, CPU {cpu_microseconds_per_file:.2f} us"
        print("\nlisting: " + told.format(**document["listing"]))
    asked.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
