r"""A network fitted to tell reals from fakes, and stopped before it knows them by heart.

Each step takes as many reals as fakes, so the loss is balanced whatever their numbers:

    1/2 mean sp(-s(x)) + 1/2 mean sp(s(y)).

A part of the rows is held out of the steps; the weights that are kept are the running average with
the least loss on it. Several members, each with another part held out, are averaged in logits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from nelbo.errors import NumericalFailure
from nelbo.randomness import generator, seeded

LOOK = 25
CHUNK = 1024


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Arguments:
        steps: most optimiser steps. batch: rows of each side per step. rate: of Adam.
        decay: weight decay. patience: steps without progress after which to stop.
        average: of the running average of the weights, per step.
    """

    steps: int = 1500
    batch: int = 128
    rate: float = 2e-3
    decay: float = 1e-2
    patience: int = 300
    average: float = 0.98


class Average(nn.Module):
    """The mean logit of several networks, on rows standardised like those of the fit."""

    shift: Tensor
    scale: Tensor

    def __init__(self, members: list[nn.Module], shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, rows: Tensor) -> Tensor:
        x = (rows - self.shift) / self.scale
        return torch.stack([member(x).flatten() for member in self.members]).mean(0)


def fit_networks(
    make: Callable[[], nn.Module],
    real: Tensor,
    fake: Tensor,
    seed: int,
    schedule: Schedule,
    members: int,
    per_channel: bool = False,
) -> Average:
    """Fit `members` networks, each with another part of the rows held out.

    Arguments:
        make: makes a network (B, *shape) -> (B,) or (B, 1).
        real, fake: (n, *shape) and (m, *shape) float32.
        seed: of weights, parts and batches.
        per_channel: standardise images by channel, not by pixel.
    """
    axes = [0, *range(2, real.ndim)] if per_channel else [0]
    both = torch.cat([real, fake])
    shift, scale = both.mean(axes, keepdim=True), both.std(axes, keepdim=True)
    scale = torch.where(scale > 1e-9, scale, torch.ones_like(scale))
    x, y = ((rows - shift) / scale for rows in (real, fake))
    draws = generator(seed, "members")
    x, y = (rows[torch.randperm(len(rows), generator=draws)] for rows in (x, y))
    found = []
    for member in range(members):
        with seeded(seed, "weights", member):
            network = make()
        held, kept = _folds((x, y), member, max(members, 5))
        found.append(fit(network, kept, held, generator(seed, "batches", member), schedule))
    return Average(found, shift, scale).eval()


def fit(
    network: nn.Module,
    kept: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    draws: torch.Generator,
    schedule: Schedule,
) -> nn.Module:
    """Train on the pairs of rows `kept`, and return the average that did best on `held`.

    Raises:
        NumericalFailure: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=schedule.rate, weight_decay=schedule.decay
    )
    average = copy.deepcopy(network).eval()
    best, least, since = copy.deepcopy(average), math.inf, 0
    network.train()
    for step in range(1, schedule.steps + 1):
        x, y = (_batch(rows, schedule.batch, draws) for rows in kept)
        logits = network(torch.cat([x, y])).flatten()
        loss = softplus(-logits[: len(x)]).mean() + softplus(logits[len(x) :]).mean()
        if not bool(torch.isfinite(loss)):
            raise NumericalFailure(f"the loss of a classifier is {float(loss)} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        _follow(average, network, min(schedule.average, step / (step + 10)))
        if step % LOOK:
            continue
        value = balanced_loss(average, *held)
        since = 0 if value < least else since + LOOK
        if value < least:
            best, least = copy.deepcopy(average), value
        if since >= schedule.patience:
            break
    return best


def balanced_loss(network: nn.Module, real: Tensor, fake: Tensor) -> float:
    """[mean sp(-s(x)) + mean sp(s(y))]/2, nats; log 2 - L(D)."""
    a, b = score(network, real), score(network, fake)
    return float(softplus(-a).mean() + softplus(b).mean()) / 2


@torch.no_grad()
def score(network: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Logits float64, in blocks of rows; (n,) if the network gives one per row."""
    weights = network.parameters() if isinstance(network, nn.Module) else iter(())
    device = next(weights, rows).device
    parts = [network(block.to(device)).detach().flatten() for block in rows.split(CHUNK)]
    return torch.cat(parts).to("cpu", torch.float64)


def _folds(
    sides: tuple[Tensor, Tensor], member: int, folds: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    held, kept = [], []
    for rows in sides:
        out = torch.arange(len(rows)) % folds == member
        held.append(rows[out])
        kept.append(rows[~out])
    return (held[0], held[1]), (kept[0], kept[1])


def _batch(rows: Tensor, size: int, draws: torch.Generator) -> Tensor:
    return rows[torch.randint(len(rows), (min(size, len(rows)),), generator=draws)]


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, keep: float) -> None:
    pairs = list(zip(average.parameters(), network.parameters(), strict=True))
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - keep)
