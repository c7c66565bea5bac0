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
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from marked import between
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nelbo.distributed import BUCKET
from nelbo.networks.unet import UNet

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
FLOAT = 4
STATE = 5
"""Numbers per parameter that a rank holds: weight, gradient, two moments, average."""
SAVED = 4
"""Numbers per parameter in a checkpoint: weight, average, two moments."""


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines and measured of nelbo; change it on the command line."""

    nodes: int = 8
    gpus: int = 8
    """Of a node."""
    images: int = 100_000_000
    memory: float = 141e9
    """Bytes of a GPU."""
    link: float = 50e9
    """Bytes per second between machines, for each GPU: 400 Gb/s."""
    efficiency: float = 0.8
    """Share of the links that a large sum reaches."""
    hop: float = 5e-6
    """Seconds of one hop of a ring by nccl."""
    gloo_hop: float = 50e-6
    """Seconds of one hop of a ring by gloo, over TCP."""
    disk: float = 5e9
    """Bytes per second that a node reads or writes in one stream."""
    saving: float = 0.27e9
    """Bytes per second of CPU at which a checkpoint is written with its sums (measured)."""
    loading: float = 0.62e9
    """Bytes per second of CPU at which it is read and verified (measured)."""
    row: float = 3.0e-6
    """Seconds of CPU of a row of a mapped array of 32x32 images (measured)."""
    first: float = 3.3e-6
    """Seconds of CPU of such a row in the first pass (measured)."""
    later: float = 0.4e-6
    """Seconds of CPU per row at a later start (measured)."""
    rate: float = 7727.0
    """Training images per second and GPU of the 35.7 M network (measured: docs/speed.md)."""
    forward: float = 26008.0
    """Forward images per second and GPU of the same (measured)."""
    kept: float = 0.31
    """Of the bytes that a forward call keeps in float32, not compiled, those that are left in
    bfloat16, compiled, with the fused kernel: 4.9 GB at batch 256 (measured)."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def ring(self) -> float:
        """Bytes per second of a rank in a ring through all links of its machine at once."""
        return self.efficiency * self.link * (self.gpus if self.nodes > 1 else 9)


@dataclass(frozen=True)
class Plan:
    """A network and its share of the work.

    Arguments:
        batch: images of a rank in one update.
        kept: bytes that a forward call keeps for the backward call, per image, float32.
    """

    name: str
    size: int
    parameters: int
    tensors: int
    collectives: int
    flops: float
    kept: float
    batch: int

    @property
    def row(self) -> int:
        """Bytes of an image."""
        return 3 * self.size**2


def unet(size: int, channels: int, multipliers: tuple[int, ...], layers: int,
         attention: tuple[int, ...]) -> nn.Module:  # fmt: skip
    """A network without numbers."""
    attends = [size >> i in attention for i in range(len(multipliers))]
    with torch.device("meta"):
        return UNet(
            sample_size=size,
            block_out_channels=tuple(channels * m for m in multipliers),
            layers_per_block=layers,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
            attention_head_dim=None,
        )


def counted(name: str, network: nn.Module, size: int, batch: int) -> Plan:
    """Operations of a forward call on one image, and what it keeps for the backward call."""
    x, t = torch.empty(1, 3, size, size, device="meta"), torch.empty(1, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, t)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.append(s) or s, lambda s: s):
        network(x, t)
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    storages = {s.untyped_storage()._cdata: s.untyped_storage().nbytes() for s in kept}
    parameters = list(network.parameters())
    return Plan(
        name, size, sum(p.numel() for p in parameters), len(parameters),
        buckets(p.numel() for p in parameters),
        float(counter.get_total_flops()),
        float(sum(n for where, n in storages.items() if where not in own)), batch,
    )  # fmt: skip


def plans() -> list[Plan]:
    """The CIFAR-10 network of Ho et al. (2020), and a large one."""
    small, large = unet(32, 128, (1, 2, 2, 2), 2, (16,)), unet(64, 256, (1, 2, 3, 4), 3, (16, 8))
    first = counted("35.7 M at 32×32", small, 32, 128)
    return [
        first,
        replace(first, name="the same, larger batch", batch=512),
        counted("463 M at 64×64", large, 64, 64),
    ]


def summed_bytes(parameters: int, ranks: int) -> float:
    """Sent by a rank in a ring that sums the gradients."""
    return 2 * (ranks - 1) / ranks * FLOAT * parameters


def dealt_bytes(parameters: int, ranks: int) -> float:
    """Sent by a rank of a network that is dealt out, at most."""
    return 3 * (ranks - 1) / ranks * FLOAT * parameters


def checkpoint_bytes(parameters: int, tensors: int) -> int:
    """Tensors of a checkpoint: four per parameter, and AdamW's count of each tensor."""
    return SAVED * FLOAT * parameters + FLOAT * tensors


def state_bytes(parameters: int, ranks: int = 1) -> float:
    """Held by a rank: whole, or dealt to `ranks`."""
    return STATE * FLOAT * parameters / ranks


def buckets(sizes: Iterable[int]) -> int:
    """Collectives in which tensors of these sizes are added up, see `distributed.total_of`."""
    found, held = 0, 0
    for size in sizes:
        if not held or held + size > BUCKET:
            found, held = found + 1, 0
        held += size
    return found


@dataclass(frozen=True)
class Cost:
    """What a plan costs on a cluster; seconds and bytes."""

    plan: Plan
    cluster: Cluster
    reference: Plan
    """The network whose rate was measured; others have the same operations per second."""

    @property
    def rate(self) -> float:
        """Training images per second of one GPU alone."""
        return self.cluster.rate * self.reference.flops / self.plan.flops

    @property
    def forward(self) -> float:
        return self.cluster.forward * self.reference.flops / self.plan.flops

    @property
    def update(self) -> float:
        """Seconds of an update without any other rank."""
        return self.plan.batch / self.rate

    @property
    def sum_seconds(self) -> float:
        """Of the sum of the gradients, which is not hidden behind the backward call."""
        c, p = self.cluster, self.plan
        ring = summed_bytes(p.parameters, c.ranks) / c.ring
        return ring + p.collectives * 2 * (c.ranks - 1) * c.hop

    @property
    def agreement(self) -> float:
        """Of the two small sums by gloo: loss and gradients that exist, and whether to stop."""
        return 2 * 2 * (self.cluster.ranks - 1) * self.cluster.gloo_hop

    @property
    def whole(self) -> float:
        """Seconds of an update on all ranks."""
        return self.update + self.sum_seconds + self.agreement

    @property
    def together(self) -> float:
        """Images per second of all ranks."""
        return self.plan.batch * self.cluster.ranks / self.whole

    @property
    def activations(self) -> float:
        return self.plan.batch * self.plan.kept * self.cluster.kept

    @property
    def scale(self) -> float:
        """Bytes of an image in those of a 32x32 one, by which the loader's costs grow."""
        return self.plan.row / 3072


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
        "10,000 images, T = 1000, every term": clock(1e7 / cost.forward / n),
        "10,000 images, 16 calls each": clock(1.6e5 / cost.forward / n),
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
