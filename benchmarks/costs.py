"""What a network costs on many GPUs: bytes, seconds, memory; the arithmetic of `plan.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nelbo.distributed import BUCKET
from nelbo.networks.unet import UNet

FLOAT = 4
STATE = 5
"""Numbers per parameter that a rank holds: weight, gradient, two moments, average."""
SAVED = 4
"""Numbers per parameter in a checkpoint: weight, average, two moments."""
EVALUATED = 512
"""Images of a batch of an evaluation."""


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

    def evaluation(self, images: int, calls: int) -> float:
        """Seconds of the rank with the most batches, which are dealt whole."""
        each = -(-images // EVALUATED)
        busiest = -(-each // self.cluster.ranks)
        return min(images, busiest * EVALUATED) * calls / self.forward

    @property
    def scale(self) -> float:
        """Bytes of an image in those of a 32x32 one, by which the loader's costs grow."""
        return self.plan.row / 3072
