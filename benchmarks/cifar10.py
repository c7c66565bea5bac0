"""CIFAR-10 in a given time: train, measure the bound of all 10,000 test images, fill the table.

One command on a machine with a GPU:

    python benchmarks/cifar10.py cifar-10-batches-bin --seconds 270 --out runs/cifar10-270
    python benchmarks/cifar10.py cifar-10-batches-bin --minutes 25 --out runs/cifar10-25

The time is that of the updates. A short probe measures their rate, from which the number that fits
follows (the learning rate falls to zero over exactly these); what the updates really took, and
what came before the first one (reading, compiling), stand in the document beside the figures.
Everything else is the command line of nelbo; the commands and their documents are in
OUT/cifar10.json. What is there already is not done again: the same command goes on where one that
was stopped left off, and --stages does a part of it. `--tiny` takes a network that a CPU can bear,
to try the script out, --more adds options of `nelbo train cifar10`. With --rank it trains a list
of variants of the recipe instead, --seconds 60 each say, and measures them on the validation part,
so that the choice is made where the test images are not looked at.

Reference points on one H200, of improved-diffusion's network of 52.5 M parameters, bfloat16,
compiled, 256 test images: L_hybrid with the cosine schedule and T = 1000 gives 3.51 bits/dim after
276 s; the bound in continuous time (log-SNR 13.3 to −5) 3.28 after 271 s. Improved DDPM's
published figure after 500,000 updates is 2.94 (Nichol & Dhariwal 2021).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

PROBE = 200
"""Updates of the probe; its first half warms up (and compiles)."""
SHORT = 600.0
"""Seconds up to which the recipe for a short time is taken."""
LONG_RECIPE = (
    "--channels 128 --multipliers 1 2 2 2 --layers 3 --attention 16 8 --dropout 0.1 "
    "--predict velocity --batch 256 --rate 4e-4 --warmup 500 --ema 0.9995 --bf16 --compile"
)
SHORT_RECIPE = (
    "--channels 128 --multipliers 1 2 2 2 --layers 2 --attention 16 --dropout 0 --samples 4 "
    "--schedule learned --predict epsilon --latents 4000 --batch 128 --rate 1e-3 --warmup 300 "
    "--ema 0.998 --bf16 --compile"
)
"""No dropout in some forty epochs, an average over hundreds of updates, and twice as many updates
of half the batch. A learned log-SNR won a comparison of small networks (docs/speed.md). A grid of
N latents costs about 20/N bits/dim more than a continuum of them, and few calls do not become more
with N."""
VARIANTS = {
    "the recipe": "",
    "log-SNR learned, from 10": "--logsnr-max 10",
    "log-SNR fixed": "--schedule logsnr",
    "log-SNR fixed, from 11": "--schedule logsnr --logsnr-max 11",
    "log-SNR fixed, from 10": "--schedule logsnr --logsnr-max 10",
    "velocity": "--predict velocity",
    "rate 5e-4": "--rate 5e-4",
    "rate 2e-3": "--rate 2e-3",
    "batch 256": "--batch 256",
    "96 channels": "--channels 96",
    "three blocks, attention at 8x8 as well": "--layers 3 --attention 16 8",
}
"""What --rank trains one after the other, --seconds each, and measures on validation images."""
TINY = (
    "--channels 8 --multipliers 1 2 --layers 1 --attention 8 --dropout 0 --batch 16 --ema 0.99 "
    "--latents 100 --samples 2"
)
BOUND = (
    "--objective continuous --logsnr-max 13.3 --logsnr-min -5 --fourier 7 8 --decay cosine "
    "--validate-every 0"
)
MEASURES = (
    ("one call per image", "--calls 1"),
    ("sixteen calls per image", "--calls 16"),
    ("every step, 64 images", "--limit 64"),
)
TINY_MEASURES = (("one call per image", "--calls 1"),)
STEPS = "--steps 10,25,50,100 --grid both --variance posterior,optimal --fit 128 --limit 256"
STAGES = ("probe", "train", "measure", "steps")


def nelbo(words: str) -> dict[str, Any]:
    """Run a command of nelbo with --json; its document, and the seconds on the clock."""
    start = time.monotonic()
    command = [sys.executable, "-m", "nelbo", *words.split(), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return {"command": f"nelbo {words}", "seconds": time.monotonic() - start,
            "document": json.loads(done.stdout)}  # fmt: skip


def losses(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics that tell of updates."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if "loss" in row]


def updates_per_second(folder: Path) -> float:
    """Of the second half of a run, from its metrics."""
    rows = losses(folder)
    middle = rows[len(rows) // 2]
    last = rows[-1]
    return float((last["step"] - middle["step"]) / (last["seconds"] - middle["seconds"]))


def state(folder: Path) -> str:
    """How far a run is: none, begun, trained (to its last update), finished."""
    path = folder / "status.json"
    if not path.exists():
        return "none"
    status = json.loads(path.read_text())
    if status["state"] == "finished":
        return "finished"
    return "trained" if status["step"] == status["steps"] else "begun"


def probe(recipe: str, folder: Path) -> float:
    """Updates per second."""
    if state(folder) != "finished":
        shutil.rmtree(folder, ignore_errors=True)
        words = f"--steps {PROBE} --save-every {PROBE} --calls 1 --samples 1"
        nelbo(f"{recipe} --out {folder} {words}")
    return updates_per_second(folder)


def train(recipe: str, folder: Path, rate: float, seconds: float) -> dict[str, Any]:
    """The run itself; its time by what it was spent on."""
    steps = max(1, round(seconds * rate))
    print(f"{rate:.2f} updates/s: {steps} updates in {seconds:g} s", file=sys.stderr)
    more = "" if state(folder) == "none" else "--resume"
    words = f"--steps {steps} --save-every {max(1, steps // 5)} --calls 1"
    found = nelbo(f"{recipe} --out {folder} {words} {more}".rstrip())
    return found | {"times": spent(folder)}


def spent(folder: Path) -> dict[str, float]:
    """Updates of a run, their seconds, and those before the first ones were done.

    The first rows hold what is compiled, so the rate is taken from the others.
    """
    rows = losses(folder)
    last = rows[-1]
    rate = updates_per_second(folder)
    return {
        "updates": last["step"],
        "seconds": last["seconds"],
        "updates_per_second": rate,
        "seconds_of_updates": last["step"] / rate,
        "seconds_before": last["seconds"] - last["step"] / rate,
    }


def table(measured: dict[str, dict[str, Any]]) -> str:
    lines = ["\nmeasured with                  bits/dim     ± se  ± se_mc  images  seconds"]
    for name, one in measured.items():
        total = one["document"]["terms"]["total"]
        lines.append(f"{name:28s}  {total['mean']:9.4f}  {total['se']:7.4f}  "
                     f"{total['se_mc']:7.5f}  {total['n']:6d}  {one['seconds']:7.0f}")  # fmt: skip
    return "\n".join(lines)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with data_batch_1.bin ... test_batch.bin")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=25)
    length.add_argument("--seconds", type=float)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10-timed"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--more", default="", help="further options, as one word in quotes")
    parser.add_argument("--rank", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    return parser.parse_args(given)


def rank(given: list[str], options: argparse.Namespace) -> None:
    """Train every variant of the recipe as long, and print their bounds of validation images."""
    print(f"{'variant':42s} bits/dim     ± se   updates/s")
    for number, (name, more) in enumerate(VARIANTS.items()):
        out = options.out.with_name(f"{options.out.name}-{number}")
        words = [*given, "--out", str(out), "--more", f"{more} {options.more}"]
        with contextlib.redirect_stdout(io.StringIO()):
            main([*words, "--stages", "probe", "train", "--no-rank"])
        document = json.loads(out.with_name(f"{out.name}.json").read_text())
        found = nelbo(f"evaluate {out} --calls 4 --seed 1 --split validation")
        total, rate = found["document"]["terms"]["total"], document["rate"]
        print(f"{name:42s} {total['mean']:8.4f}  {total['se']:7.4f}  {rate:9.2f}", flush=True)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    if options.rank:
        rank(sys.argv[1:] if given is None else given, options)
        return
    seconds = options.seconds or 60 * options.minutes
    network = TINY if options.tiny else SHORT_RECIPE if seconds <= SHORT else LONG_RECIPE
    recipe = f"train cifar10 {options.data} {network} {BOUND} {options.more}".rstrip()
    path = options.out.with_name(f"{options.out.name}.json")
    document: dict[str, Any] = {"schema": 2, "asked_seconds": seconds, "measured": {}}
    if path.exists():
        document = json.loads(path.read_text())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    document["machine"] = {
        "platform": platform.platform(), "gpu": gpu, "torch": torch.__version__
    }  # fmt: skip

    def keep() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1))

    if "probe" in options.stages:
        document["rate"] = probe(recipe, options.out.with_name(f"{options.out.name}-probe"))
        keep()
    if "rate" not in document:
        raise SystemExit(f"{path} holds no rate of updates: begin with --stages probe")
    if "train" in options.stages and state(options.out) != "finished":
        document["run"] = train(recipe, options.out, document["rate"], seconds)
        keep()
    if "measure" in options.stages:
        for name, words in TINY_MEASURES if options.tiny else MEASURES:
            if name not in document["measured"]:
                document["measured"][name] = nelbo(f"evaluate {options.out} {words} --seed 1")
                keep()
    if "steps" in options.stages and not options.tiny and "steps" not in document:
        document["steps"] = nelbo(f"evaluate {options.out} {STEPS}")
        keep()
    for name, value in document.get("run", {}).get("times", {}).items():
        print(f"{name:20s} {value:9.1f}")
    print(table(document["measured"]))
    print(f"\nall documents: {path}")


if __name__ == "__main__":
    main()
