"""Training, forward calls, sampling, the bound and the first step, beside other projects.

    python benchmarks/speed.py                              on a GPU: the whole table
    python benchmarks/speed.py --improved-diffusion PATH    with a copy of improved-diffusion
    python benchmarks/speed.py --small                      the small network, on a CPU
    python benchmarks/speed.py --works training --only nelbo diffusers --into speed.json

All contestants live in one process and take turns: in every round each works for --seconds, in an
order that rotates, so that whatever else the machine does meets all of them alike. A ratio is of
two rates of the same round; its median over the rounds is printed with the smallest and the
largest. On a CPU the seconds of processor are counted as well: they do not grow when neighbours
take the machine away.

Works that are compared to one another are a piece of the JSON file --out, written as soon as it is
done. --into adds pieces to a file that exists, in place of those of the same work and projects, so
that a run can be split over several commands, and one that was killed loses the piece that it was
in. What is not installed is skipped by name, and what fails, or does not get ready within --wait
seconds, is a result.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# threads that spin while they wait would be charged for what neighbours do
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import torch  # noqa: E402
from peers.contest import BIG, SMALL, Absent, Contestant, Setting  # noqa: E402
from peers.measuring import Ceiling, Doing, ceiling, flops, rounds  # noqa: E402
from peers.starting import START, first_steps  # noqa: E402
from peers.tables import ratios, shares, text  # noqa: E402

WORKS = {
    "training": ("training", "forward and backward"),
    "forward": ("forward", "full bound", "bound by few calls"),
    "sampling": ("sampling",),
}
"""What is measured in turns together, as a piece, since one is compared to the other."""
PROJECTS = {
    "nelbo": "ours",
    "diffusers": "diffusers_loop",
    "denoising-diffusion-pytorch": "lucidrains",
    "improved-diffusion": "improved",
}
"""Names, and the modules of `peers` that make them take part."""
FEW = 4
"""Network calls per image of a bound by few calls."""
SCHEMA = 2


def entered(
    options: argparse.Namespace, setting: Setting, device: str
) -> tuple[list[Contestant], dict[str, str]]:
    """Everyone who can take part, and why others cannot."""
    found, absent = [], {}
    for name, module in PROJECTS.items():
        if options.only and name not in options.only:
            continue
        try:
            # imported one by one: the start of one must not pay for the others
            peer = importlib.import_module(f"peers.{module}")
            more = (options.improved_diffusion,) if module == "improved" else ()
            found += peer.contestants(setting, device, options.compiled, *more)
        except Absent as reason:
            absent[name] = str(reason)
            print(f"skipped: {name} ({reason})", file=sys.stderr)
    return found, absent


def work(name: str, one: Contestant) -> Doing | None:
    """What is called, and how many images one call does."""
    batch = float(one.setting.batch)
    plain: dict[str, Doing] = {
        "training": (one.update, batch),
        "forward and backward": (one.backward, batch),
        "forward": (one.predict, batch),
        "sampling": (one.sample, float(one.setting.draws)),
    }
    if name in plain:
        return plain[name]
    evaluate, full = one.evaluate, name == "full bound"
    # by few calls: nobody else has it
    if evaluate is None or not (full or one.project == "nelbo"):
        return None
    return (lambda: evaluate(None if full else FEW)), None


def machine(device: str, top: Ceiling) -> dict[str, Any]:
    """Where and when this was measured, and with what."""
    cuda = device == "cuda"
    here = Path(__file__).resolve().parent
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return {
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "commit": said.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "ceiling_tflops": top.tflops,
        "ceiling_of": top.what,
    }


def begun(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Where the document goes, and what it holds already."""
    if options.into is None:
        return options.out, {"schema": SCHEMA, "pieces": []}
    document = {"schema": SCHEMA, "pieces": []}
    if options.into.exists():
        document = json.loads(options.into.read_text())
        if document.get("schema") != SCHEMA:
            raise SystemExit(f"{options.into}: no document of this version; take another name")
    return options.into, document


def added(document: dict[str, Any], piece: dict[str, Any]) -> None:
    """A piece takes the place of that of the same work, setting and projects."""
    same = ("work", "setting", "projects")
    kept = [p for p in document["pieces"] if any(p[key] != piece[key] for key in same)]
    document["pieces"] = [*kept, piece]


def written(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(document, indent=1))
    beside.replace(path)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the default without a GPU")
    parser.add_argument("--big", action="store_true", help="the big network on a CPU too")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one turn")
    parser.add_argument("--wait", type=float, default=300.0, help="seconds to get ready")
    parser.add_argument("--threads", type=int, default=None)
    every = (*WORKS, START)
    parser.add_argument("--works", nargs="*", choices=every, default=list(every))
    parser.add_argument("--starts", type=int, default=1, help="fresh processes for each")
    parser.add_argument("--only", nargs="+", help="names of projects")
    parser.add_argument("--tunings", nargs="+", help="names of tunings")
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--improved-diffusion", type=Path)
    parser.add_argument("--out", type=Path, default=Path("speed.json"))
    parser.add_argument("--into", type=Path, help="a document to which the pieces are added")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.small = options.small or (device == "cpu" and not options.big)
    setting = (SMALL if options.small else BIG).with_batch(options.batch)
    path, document = begun(options)
    top = ceiling(device)
    print(f"{top.what}: {top.tflops:.3g} TFLOP/s, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    found, absent = entered(options, setting, device)
    if options.tunings:
        found = [one for one in found if one.tuning.name in options.tunings]
    counted = {one.name: flops(one) for one in found}
    plain = json.loads(json.dumps(vars(setting)))  # as it will be read back
    about = {"setting": plain, "projects": sorted({one.project for one in found})}
    for name in options.works:
        piece = {"work": name, **about, "machine": machine(device, top), "absent": absent}
        if name == START:
            piece["seconds"] = first_steps([one.name for one in found], options)
        else:
            turns = {(part, one): work(part, one) for one in found for part in WORKS[name]}
            here = {key: turn for key, turn in turns.items() if turn is not None}
            rows = rounds(here, device, options.rounds, options.seconds, options.wait)
            piece["rows"] = [m.json(counted, top) for m in rows]
            piece["ratios"] = ratios(rows)
            piece["shares"] = shares(rows)
        added(document, piece)
        written(path, document)
    print(text(document))
    print(f"\neverything: {path}")


if __name__ == "__main__":
    main()
