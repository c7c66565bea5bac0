"""CIFAR-10 in a given time: train, measure the bound of all 10,000 test images, fill the table.

One command on a machine with a GPU:

    python benchmarks/cifar10.py cifar-10-batches-bin --minutes 25 --out runs/cifar10-25

A short probe measures the rate of updates, from which the number of updates that fit follows (the
learning rate falls to zero over exactly these). Everything else is the command line of nelbo; the
commands and their documents are in OUT/cifar10.json. `--tiny` takes a network that a CPU can bear,
to try the script out.

Reference points on one H200, of improved-diffusion's network of 52.5 M parameters, bfloat16,
compiled, 256 test images: L_hybrid with the cosine schedule and T = 1000 gives 3.51 bits/dim after
276 s; the bound in continuous time (log-SNR 13.3 to −5) 3.28 after 271 s. Improved DDPM's
published figure after 500,000 updates is 2.94 (Nichol & Dhariwal 2021).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

PROBE = 200
"""Updates of the probe; its first half warms up (and compiles)."""
NETWORK = (
    "--channels 128 --multipliers 1 2 2 2 --layers 3 --attention 16 8 --dropout 0.1 "
    "--batch 256 --rate 4e-4 --warmup 500 --ema 0.9995 --bf16 --compile"
)
TINY = (
    "--channels 8 --multipliers 1 2 --layers 1 --attention 8 --dropout 0 --batch 16 --ema 0.99 "
    "--latents 100 --samples 2"
)
BOUND = (
    "--objective continuous --predict velocity --logsnr-max 13.3 --logsnr-min -5 --fourier 7 8 "
    "--decay cosine --validate-every 0"
)
MEASURES = (
    ("one call per image", "--calls 1"),
    ("sixteen calls per image", "--calls 16"),
    ("every step, 256 images", "--limit 256"),
)
TINY_MEASURES = (("one call per image", "--calls 1"),)
STEPS = "--steps 10,25,50,100 --grid both --variance posterior,optimal --fit 128 --limit 256"


def nelbo(words: str) -> dict[str, Any]:
    """Run a command of nelbo with --json; its document, and the seconds on the clock."""
    start = time.monotonic()
    command = [sys.executable, "-m", "nelbo", *words.split(), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return {"command": f"nelbo {words}", "seconds": time.monotonic() - start,
            "document": json.loads(done.stdout)}  # fmt: skip


def updates_per_second(folder: Path) -> float:
    """Of the second half of a run, from its metrics."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    middle = rows[len(rows) // 2]
    last = rows[-1]
    return float((last["step"] - middle["step"]) / (last["seconds"] - middle["seconds"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with data_batch_1.bin ... test_batch.bin")
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10-timed"))
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    recipe = f"train cifar10 {options.data} {TINY if options.tiny else NETWORK} {BOUND}"
    probe = options.out.with_name(f"{options.out.name}-probe")
    nelbo(f"{recipe} --out {probe} --steps {PROBE} --save-every {PROBE} --calls 1 --samples 1")
    rate = updates_per_second(probe)
    steps = max(1, round(60 * options.minutes * rate))
    print(f"{rate:.2f} updates/s: {steps} updates in {options.minutes:g} minutes", file=sys.stderr)
    every = max(1, steps // 5)
    found = [nelbo(f"{recipe} --out {options.out} --steps {steps} --save-every {every} --calls 1")]
    measures = TINY_MEASURES if options.tiny else MEASURES
    found += [nelbo(f"evaluate {options.out} {words} --seed 1") for _, words in measures]
    print("\nmeasured with                  bits/dim     ± se  ± se_mc  images  seconds")
    for (name, _), one in zip(measures, found[1:], strict=True):
        total = one["document"]["terms"]["total"]
        print(f"{name:28s}  {total['mean']:9.4f}  {total['se']:7.4f}  {total['se_mc']:7.5f}  "
              f"{total['n']:6d}  {one['seconds']:7.0f}")  # fmt: skip
    if not options.tiny:
        found.append(nelbo(f"evaluate {options.out} {STEPS}"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"platform": platform.platform(), "gpu": gpu, "torch": torch.__version__}
    path = options.out / "cifar10.json"
    path.write_text(json.dumps({"schema": 1, "machine": machine, "runs": found}, indent=1))
    print(f"\nall documents: {path}")


if __name__ == "__main__":
    main()
