"""Training, forward calls, sampling, the bound and the first step, beside other projects.

    python benchmarks/speed.py                              on a GPU: the whole table
    python benchmarks/speed.py --improved-diffusion PATH    with a copy of improved-diffusion
    python benchmarks/speed.py --small                      the small network, on a CPU

All contestants live in one process and take turns: in every round each works for --seconds, in an
order that rotates, so that whatever else the machine does meets all of them alike. A ratio is of
two rates of the same round; its median over the rounds is printed with the smallest and the
largest. On a CPU the seconds of processor are counted as well: they do not grow when neighbours
take the machine away. Everything goes to --out as JSON. What is not installed is skipped by name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

# threads that spin while they wait would be charged for what neighbours do
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import torch  # noqa: E402
from peers import diffusers_loop, improved, lucidrains, ours  # noqa: E402
from peers.contest import BIG, SMALL, Absent, Contestant, Setting  # noqa: E402
from peers.measuring import Ceiling, Measured, ceiling, flops, rounds  # noqa: E402
from peers.starting import first_steps  # noqa: E402
from peers.tables import ratios, text  # noqa: E402

WORKS = ("training", "forward", "sampling", "full bound", "bound by few calls")


def entered(options: argparse.Namespace, setting: Setting, device: str) -> list[Contestant]:
    """Everyone who can take part; who cannot is named on stderr."""
    compiled = options.compiled
    path = options.improved_diffusion
    makers = {
        "nelbo": lambda: ours.contestants(setting, device, compiled),
        "diffusers": lambda: diffusers_loop.contestants(setting, device, compiled),
        "denoising-diffusion-pytorch": lambda: lucidrains.contestants(setting, device, compiled),
        "improved-diffusion": lambda: improved.contestants(setting, device, compiled, path),
    }
    found = []
    for name, make in makers.items():
        if options.only and name not in options.only:
            continue
        try:
            found += make()
        except Absent as reason:
            print(f"skipped: {name} ({reason})", file=sys.stderr)
    return found


def work(name: str, one: Contestant, setting: Setting) -> tuple[Any, float] | None:
    """What is called, and how many images (or calls of the network) one call does."""
    if name == "training":
        return one.update, setting.batch
    if name == "forward":
        return one.predict, setting.batch
    if name == "sampling":
        return one.sample, setting.draws
    # by few calls: nobody else has it
    if one.evaluate is None or (name != "full bound" and one.project != "nelbo"):
        return None
    evaluate, calls = one.evaluate, None if name == "full bound" else 2
    count = setting.calls if calls is None else calls
    if name == "full bound" and one.project == "nelbo":
        count += 1  # one term more, drawn twice, from which the error of the noise follows
    return (lambda: evaluate(calls)), setting.batch * count


def machine(device: str, top: Ceiling) -> dict[str, Any]:
    """Where this was measured."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "platform": platform.platform(),
        "gpu": gpu,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "ceiling_tflops": top.tflops,
        "ceiling_of": top.what,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the default without a GPU")
    parser.add_argument("--big", action="store_true", help="the big network on a CPU too")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one turn")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--only", nargs="+", help="names of projects")
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--no-start", dest="start", action="store_false")
    parser.add_argument("--improved-diffusion", type=Path)
    parser.add_argument("--out", type=Path, default=Path("speed.json"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = options.small or (device == "cpu" and not options.big)
    setting = (SMALL if small else BIG).with_batch(options.batch)
    top = ceiling(device)
    document: dict[str, Any] = {"schema": 1, "setting": vars(setting), "rows": []}
    document["machine"] = machine(device, top)
    print(f"{top.what}: {top.tflops:.3g} TFLOP/s, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    found = entered(options, setting, device)
    counted = {one.name: flops(one) / setting.batch for one in found}
    everything: list[Measured] = []
    for name in options.works:
        turns = {one: work(name, one, setting) for one in found}
        here = {one: turn for one, turn in turns.items() if turn is not None}
        everything += rounds(name, here, device, options.rounds, options.seconds)
        document["rows"] = [m.json(counted, top) for m in everything]
        document["ratios"] = ratios(everything)
        options.out.write_text(json.dumps(document, indent=1))
    if options.start:
        document["first step"] = first_steps([one.name for one in found], options)
    document["machine"]["load_after"] = os.getloadavg()
    options.out.write_text(json.dumps(document, indent=1))
    print(text(document))
    print(f"\neverything: {options.out}")


if __name__ == "__main__":
    main()
