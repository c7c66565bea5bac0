"""Everything that docs/speed.md says of this machine, by one command, in pieces.

    python benchmarks/table.py --improved-diffusion PATH --cifar10 FOLDER
    python benchmarks/table.py --list                what there is to do, and how long at most
    python benchmarks/table.py --budget 560          only what ends within these seconds
    python benchmarks/table.py --write               the table again from what is there

A piece is a command with a limit of at most nine minutes. What it found lies in --folder; pieces
that are done there are not done again, so the same command goes on where it was stopped, and a
machine that is free for ten minutes at a time fills the table in some turns. A piece that fails is
named, noted in FOLDER/done.json, and does not stop the others; --again NAME repeats it. At the end
the tables between the marks of docs/speed.md are written anew from the JSON files.

With a GPU the limits add up to three hours and a quarter; about one is expected. Without one they
add up to seventy minutes, and on two quiet cores about fifteen are expected.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filled import cpu_table, gpu_table
from marked import between

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "speed.md"
LIMIT = 540.0


@dataclass(frozen=True)
class Piece:
    """A command.

    Arguments:
        words: after the interpreter. needs: a file without which it is skipped, or None.
    """

    name: str
    words: tuple[str, ...]
    limit: float = LIMIT
    needs: Path | None = None


def benched(name: str, script: str, words: str, limit: float = LIMIT) -> Piece:
    path = HERE / script
    return Piece(name, (str(path), *shlex.split(words)), limit, path)


def first(project: str, words: str) -> Piece:
    """Seconds to the first update of each tuning of a project."""
    return benched(
        f"first update, {project}", "speed.py", f"{words} --works 'first update' --only {project}"
    )


def pieces(gpu: bool, folder: Path, improved: Path | None, cifar10: Path | None) -> list[Piece]:
    """All that there is to do on a machine."""
    speed, peers = f"--into {folder}/speed.json", ["diffusers", "denoising-diffusion-pytorch"]
    if improved is not None:
        peers.append("improved-diffusion")
        speed += f" --improved-diffusion {shlex.quote(str(improved))}"
    if not gpu:
        # in turns on two cores: the seconds of processor are what is compared
        quick = f"{speed} --small --no-compile --rounds 5 --seconds 0.5"
        return [
            *(benched(w, "speed.py", f"{quick} --works {w}") for w in ("training", "forward")),
            benched("sampling", "speed.py", f"{quick} --works sampling"),
            *(first(p, f"{quick} --starts 3") for p in ("nelbo", *peers)),
            benched("starts", "starts.py", f"--out {folder}/starts.json", 200),
            benched("growth", "growth.py", f"--out {folder}/growth.json", 200),
            benched("loader", "loader.py", f"--out {folder}/loader.json --rounds 5"),
        ]
    found = [
        benched(f"{w}, {p}", "speed.py", f"{speed} --seconds 1 --works {w} --only nelbo {p}")
        for w in ("training", "forward", "sampling")
        for p in peers
    ]
    found += [
        *(first(p, speed) for p in ("nelbo", *peers)),
        benched("starts", "starts.py", f"--out {folder}/starts.json", 300),
        benched("normalisation", "normalisation.py", f"--out {folder}/normalisation.json"),
        benched("overheads", "overheads.py", f"--compile --out {folder}/overheads.json"),
        benched("loader", "loader.py", f"--out {folder}/loader.json"),
        Piece("gpu tests", ("-m", "pytest", "-m", "gpu", "-n", "0", "-q", str(HERE.parent))),
    ]
    if cifar10 is not None:
        words = f"{shlex.quote(str(cifar10))} --seconds 270 --out {folder}/cifar10-270 --stages"
        stages = ("probe", "train", "measure", "steps")
        found += [benched(f"cifar10, {s}", "cifar10.py", f"{words} {s}") for s in stages]
    return found


def run(piece: Piece, folder: Path) -> dict[str, Any]:
    """Do a piece; how it ended. What it says goes to a file of its own."""
    log = folder / f"{piece.name.replace(', ', '-').replace(' ', '-')}.log"
    start = time.monotonic()
    with log.open("w") as out:
        try:
            done = subprocess.run(
                [sys.executable, *piece.words], stdout=out, stderr=subprocess.STDOUT,
                timeout=piece.limit, check=False,
            )  # fmt: skip
            code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            code = None
    said = "done" if code == 0 else f"not within {piece.limit:g} s" if code is None else "failed"
    return {"outcome": said, "code": code, "seconds": round(time.monotonic() - start, 1)}


def written(folder: Path, gpu: bool, page: Path) -> None:
    """Fill the table of this kind of machine."""
    read = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
    name, made = ("gpu table", gpu_table) if gpu else ("cpu table", cpu_table)
    page.write_text(between(page.read_text(), name, made(read)))


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="runs/table-gpu or runs/table-cpu")
    parser.add_argument("--improved-diffusion", type=Path, help="a copy of the project")
    parser.add_argument("--cifar10", type=Path, help="the folder cifar-10-batches-bin")
    parser.add_argument("--only", nargs="+", help="names of pieces, or how they begin")
    parser.add_argument("--again", nargs="+", default=[], help="pieces that are done once more")
    parser.add_argument("--budget", type=float, help="seconds; no piece begins that may exceed it")
    parser.add_argument("--list", action="store_true", help="do nothing")
    parser.add_argument("--write", action="store_true", help="measure nothing, write the table")
    parser.add_argument("--page", type=Path, default=PAGE)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    options, start = arguments(given), time.monotonic()
    gpu = torch.cuda.is_available()
    folder = options.folder or Path("runs", "table-gpu" if gpu else "table-cpu")
    every = pieces(gpu, folder, options.improved_diffusion, options.cifar10)
    if options.only:
        every = [p for p in every if any(p.name.startswith(name) for name in options.only)]
    if options.list:
        for piece in every:
            print(f"{piece.limit:6.0f} s at most  {piece.name}")
        print(f"{sum(p.limit for p in every):6.0f} s at most in all")
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "done.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for piece in [] if options.write else every:
        if done.get(piece.name, {}).get("code") == 0 and piece.name not in options.again:
            continue
        if piece.needs is not None and not piece.needs.exists():
            print(f"skipped: {piece.name} (there is no {piece.needs.name})", file=sys.stderr)
            continue
        spent = time.monotonic() - start
        if options.budget is not None and spent + piece.limit > options.budget:
            print(f"left for another time: {piece.name}", file=sys.stderr)
            continue
        done[piece.name] = run(piece, folder)
        print(f"{piece.name}: {done[piece.name]}", file=sys.stderr)
        path.write_text(json.dumps(done, indent=1))
    written(folder, gpu, options.page)
    print(f"{options.page}: written from {folder}")


if __name__ == "__main__":
    main()
