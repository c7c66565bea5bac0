"""What a run on many GPUs costs, computed: memory, bytes between ranks, files, loader, restarts.

    python benchmarks/plan.py                  prints the tables of docs/scaling.md
    python benchmarks/plan.py --write          puts them there, between the marks
    python benchmarks/plan.py --gpus 8 --images 1000000 --rate 7727

Parameters, operations and what a forward call keeps for the backward call are counted on the
networks themselves (without computing them); the rest is arithmetic on `Cluster`, whose fields say
what is assumed, and on rates that were measured and can be given. With P parameters in float32 and
n ranks, a rank sends per update

    2 (n−1)/n · 4P bytes     summing gradients in a ring;
    3 (n−1)/n · 4P bytes     dealt out (`--shard`): weights brought together twice, gradients
                             summed where their parts live, at most.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from costs import (
    Cluster,
    Cost,
    Plan,
    checkpoint_bytes,
    counted,
    dealt_bytes,
    state_bytes,
    summed_bytes,
    unet,
)
from marked import between

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"


def plans() -> list[Plan]:
    """The CIFAR-10 network of Ho et al. (2020), and a large one."""
    small, large = unet(32, 128, (1, 2, 2, 2), 2, (16,)), unet(64, 256, (1, 2, 3, 4), 3, (16, 8))
    first = counted("35.7 M at 32×32", small, 32, 128)
    return [
        first,
        replace(first, name="the same, larger batch", batch=512),
        counted("463 M at 64×64", large, 64, 64),
    ]


def si(value: float, unit: str) -> str:
    """Three digits with a decimal prefix."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {prefix}{unit}"
    if unit == "s" and value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} {unit}"


def clock(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return si(seconds, "s")
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def rows(cost: Cost) -> dict[str, str]:
    """What a column of the table says, by row."""
    c, p, n = cost.cluster, cost.plan, cost.cluster.ranks
    saved = checkpoint_bytes(p.parameters, p.tensors)
    array = c.images * p.row
    state, part = state_bytes(p.parameters), state_bytes(p.parameters, n)
    return {
        "parameters": f"{p.parameters / 1e6:.1f} M",
        "operations of a training image": si(3 * p.flops, "FLOP"),
        "images/s of one GPU": f"{cost.rate:,.0f}",
        "batch of a rank, of all": f"{p.batch}, {p.batch * n:,}",
        "weights, gradients, moments, average on a rank": si(state, "B"),
        f"the same with `--shard`, 1/{n}": si(part, "B"),
        "activations of a rank": si(cost.activations, "B"),
        "share of a GPU's memory": f"{(state + cost.activations) / c.memory:.0%}",
        "an update without other ranks": si(cost.update, "s"),
        "sent by a rank to sum gradients": si(summed_bytes(p.parameters, n), "B"),
        "collectives of that sum": f"{p.collectives}",
        "seconds of that sum": si(cost.sum_seconds, "s"),
        "sent by a rank with `--shard`": si(dealt_bytes(p.parameters, n), "B"),
        "two small sums by gloo": si(cost.agreement, "s"),
        "images/s of all ranks": f"{cost.together:,.0f}",
        "of what as many GPUs alone would do": f"{cost.update / cost.whole:.0%}",
        f"an epoch of {c.images / 1e6:g} M images": clock(c.images / cost.together),
        "a checkpoint": si(saved, "B"),
        "on disk at most (best, newest, one being written)": si(3 * saved, "B"),
        "writing it, while all wait": clock(saved / min(c.saving, c.disk)),
        "read by all ranks at a restart": si(n * saved, "B"),
        "reading and verifying it": clock(saved / min(c.loading, c.disk / c.gpus)),
        "the array of levels": si(array, "B"),
        "read per second by a machine's ranks": si(cost.together / c.nodes * p.row, "B/s"),
        "cores of a rank for its rows": f"{cost.together / n * c.row * cost.scale:.2f}",
        "first pass of one process": clock(
            c.images * c.first * cost.scale + array / c.disk
        ),
        "index at a later start, per rank": clock(c.images * c.later),
        "10,000 images, T = 1000, every term": clock(cost.evaluation(10_000, 1000)),
        "10,000 images, 16 calls each": clock(cost.evaluation(10_000, 16)),
    }  # fmt: skip


def table(cluster: Cluster, found: list[Plan]) -> str:
    """The table in Markdown, a column for each network."""
    columns = [rows(Cost(plan, cluster, found[0])) for plan in found]
    lines = ["| | " + " | ".join(p.name for p in found) + " |", "|---" * (len(found) + 1) + "|"]
    for name in columns[0]:
        lines.append(f"| {name} | " + " | ".join(c[name] for c in columns) + " |")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cluster = Cluster()
    for name in ("nodes", "gpus", "images", "link", "disk", "rate", "forward", "gloo_hop"):
        value = getattr(cluster, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value)
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    options = vars(parser.parse_args(given))
    write = options.pop("write")
    found = table(replace(cluster, **options), plans())
    print(found)
    if write:
        PAGE.write_text(between(PAGE.read_text(), "plan", found))


if __name__ == "__main__":
    main()
