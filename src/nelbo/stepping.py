r"""One update of one player: loss, gradient, clipping, optimiser, average.

What an update is does not depend on how it is made. With g the gradient of the mean loss ℓ,

    g ← g min(1, c/‖g‖),   θ ← AdamW(θ, g),   θ̄ ← d θ̄ + (1 − d) θ,

and if ℓ or ‖g‖ is not finite nothing of it happens. `Immediate` reads both numbers before it lets
the weights move: on a GPU it waits for all that was asked of it. `deferred` does not wait.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nelbo import distributed, sharding
from nelbo.averages import EMA
from nelbo.errors import NumericalFailure
from nelbo.randomness import rows_of


class Player(NamedTuple):
    """One side of the training: a module, its optimiser, and its loss on a batch."""

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor], Tensor]
    """(B, *shape) -> (B,) per-example losses; draws by `nelbo.randomness.by_row`."""
    moves: int = 1
    """Updates of this player in one update of the trainer, each on a batch of its own."""
    averaged: bool = True
    """Whether an average of its weights is kept."""


@dataclass(frozen=True)
class Rules:
    """What is the same for all updates of a run.

    Arguments:
        seed: every draw is a function of it, of the player, the update and the row.
        limit: largest gradient norm; infinity for no clipping.
        accumulation: parts into which a batch is split to save memory.
        autocast: gives the context of the forward pass.
        share: what a loss is multiplied with before the backward pass; see `Trainer`.
    """

    seed: int
    limit: float
    accumulation: int
    autocast: Callable[[], AbstractContextManager[None]]
    share: int


class Move(NamedTuple):
    """One update of one player."""

    player: Player
    average: EMA | None
    """Moves after the player; None if it does not move with this update."""
    x_0: Tensor
    """(B, *shape), the rows of this rank."""
    whole: int
    """Examples on all ranks together."""
    number: int
    """Of the player's updates, from 0: names the draws."""
    step: int
    """Of the trainer's updates, from 0."""
    rate: float


class Outcome:
    """Loss and gradient norm of an update, which may still be on their way from a device.

    Arguments:
        values: (2,) float64 on the CPU, valid once the event has passed.
    """

    def __init__(self, move: Move, values: Tensor, event: torch.cuda.Event | None = None) -> None:
        self.name, self.step = move.player.name, move.step
        self._values, self._event = values, event

    @property
    def known(self) -> bool:
        """Whether nobody would have to wait."""
        return self._event is None or self._event.query()

    def read(self) -> tuple[float, float]:
        """Mean loss, and the norm of its gradient before clipping."""
        if self._event is not None:
            self._event.synchronize()
        loss, norm = self._values.tolist()
        return loss, norm

    def check(self, alone: bool) -> None:
        """Refuse what is not finite.

        Arguments:
            alone: whether there is no other player.
        Raises:
            NumericalFailure: says what, at which update, and what is left.
        """
        loss, norm = self.read()
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        kept = f"the weights of update {self.step} are unchanged"
        if not alone:
            kept = f"its weights are unchanged, and nothing after update {self.step} is saved"
        raise NumericalFailure(
            f"the {what} of {self.name} is {value} at update {self.step + 1}; {kept}. Lower the "
            "learning rate, lengthen the warm-up or clip"
        )


class Stepping(ABC):
    """How the updates of a run are made.

    Arguments:
        rules: of the run. players: all of them.
    """

    behind = 0
    """Updates that may be under way before the outcome of an earlier one is looked at."""

    def __init__(self, rules: Rules, players: list[Player]) -> None:
        self.rules = rules
        self.players = players
        self.moved = False
        """Whether a player has moved since this was last set to False."""

    @abstractmethod
    def make(self, move: Move) -> Outcome:
        """Make an update of a player, or ask a device to.

        Raises:
            NumericalFailure: something is not finite, and the player has not changed; where
                outcomes come later they are checked by whoever gets them.
        """

    def restart(self) -> None:  # noqa: B027 nothing is held by most
        """Forget what was prepared: weights or moments were replaced, or an update failed."""


class Immediate(Stepping):
    """Loss and norm are read before anything moves; any optimiser, any number of ranks."""

    def make(self, move: Move) -> Outcome:
        player = move.player
        player.module.train()
        player.optimizer.zero_grad(set_to_none=True)
        mine = self._backward(move)
        total = _summed(list(player.module.parameters()), mine)
        clipped = nn.utils.clip_grad_norm_(player.module.parameters(), self.rules.limit)
        norm = float(sharding.whole(clipped))
        outcome = Outcome(move, torch.tensor([total, norm], dtype=torch.float64))
        outcome.check(len(self.players) == 1)
        for group in player.optimizer.param_groups:
            group["lr"] = move.rate
        self.moved = True
        player.optimizer.step()
        if move.average is not None:
            move.average.update(player.module, move.step)
        return outcome

    def _backward(self, move: Move) -> float:
        """This rank's part of the mean loss, and of its gradient."""
        rules, player, total = self.rules, move.player, 0.0
        pieces = distributed.spans(move.whole, rules.accumulation)
        parts = move.x_0.split([len(piece) for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            with (
                rows_of(piece, move.whole, rules.seed, "train", player.name, move.number),
                rules.autocast(),
            ):
                loss = player.loss(part).sum() / move.whole
            (loss * rules.share).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total


def _summed(parameters: list[nn.Parameter], loss: float) -> float:
    """Add up the gradients of all ranks, and their parts of a loss.

    A parameter that had no part in any rank's loss keeps no gradient, as in one process.
    """
    if distributed.world_size() == 1:
        return loss
    parameters = [p for p in parameters if not sharding.is_part(p)]
    used = [float(p.grad is not None) for p in parameters]
    found = distributed.total(torch.tensor([loss, *used], dtype=torch.float64))
    for parameter, count in zip(parameters, found[1:].tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    distributed.total_of(gradients)
    return float(found[0])
