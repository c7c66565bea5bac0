r"""Training: players that minimise their losses in turn, one update each per iteration.

Diffusion has one player, a game has two. `Trainer` is an iterator of `Record`s and knows neither
files nor screens. All randomness of update k is a function of (seed, k, place in the batch): a run
continued from the state after k updates is, bit for bit on a CPU, the run that was never
interrupted.

Under several ranks each computes its rows of the batch,

    ∇ (1/B) Σ_b ℓ_b = Σ_ranks ∇ (1/B) Σ_{b of the rank} ℓ_b,

and the gradients are added up once per move, before they are clipped: the same update as that of
one process with the same batch, whether B divides or not. It is a plain sum, after the backward
pass: a game's loss runs one player inside the other's, and a gradient penalty differentiates
twice, both of which a wrapper with hooks on the module would have to be talked out of.

Averages of the weights (`nelbo.averages`) are kept beside those of every player that wants one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nelbo import distributed, sharding
from nelbo.averages import EMA, Decay
from nelbo.errors import NumericalFailure
from nelbo.randomness import rows_of
from nelbo.rates import Rate


class Stateful(Protocol):
    """What changes while a run trains and is not a weight; no tensors if it has no state."""

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""


@runtime_checkable
class Closable(Protocol):
    """What holds a thread or a file."""

    def close(self) -> None:
        """Let go of it."""


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
class Record:
    """What one update did."""

    step: int
    """Updates done, this one included."""
    losses: Mapping[str, float]
    """Mean loss by player, in the loss's own unit."""
    grad_norms: Mapping[str, float]
    rate: float
    examples: int


class Trainer:
    """Iterate to train: `for record in trainer`.

    Arguments:
        players: in the order in which they move.
        batch: move number -> (B, *shape); every move has a batch of its own. Under several ranks
            the rows of this rank, `distributed.spans(whole, accumulation)`.
        rate: learning rate by update number, for all players.
        steps: updates in all.
        seed: every draw of update k is a function of (seed, k, place in the batch).
        ema: decay of the averaged weights, by update.
        clip: largest gradient norm, None for no clipping.
        accumulation: parts into which a batch is split to save memory.
        autocast: a function that gives the context of the forward pass (bf16), or None.
        carried: what else belongs to the state, by the name of its group of tensors.
        whole: examples of a batch on all ranks together; as many as `batch` gives, if None.
        dealt: averages of players that are dealt to ranks (`nelbo.sharding`), by name.
    """

    def __init__(
        self,
        players: list[Player],
        batch: Callable[[int], Tensor],
        rate: Rate,
        *,
        steps: int,
        seed: int,
        ema: Decay,
        clip: float | None = None,
        accumulation: int = 1,
        autocast: Callable[[], AbstractContextManager[None]] | None = None,
        carried: Mapping[str, Stateful] | None = None,
        whole: int | None = None,
        dealt: Mapping[str, EMA] | None = None,
    ) -> None:
        self.players = players
        self.batch = batch
        self.rate = rate
        self.steps = steps
        self.seed = seed
        self.clip = clip
        self.accumulation = accumulation
        self.autocast = autocast if autocast is not None else nullcontext
        self.carried = {} if carried is None else dict(carried)
        known = {} if dealt is None else dealt
        self.averages = {
            p.name: known[p.name] if p.name in known else EMA(p.module, ema)
            for p in players
            if p.averaged
        }
        # a network that is dealt averages the gradients of its ranks, where a sum is wanted
        self.share = distributed.world_size() if known else 1
        assert whole is not None or distributed.world_size() == 1, "ranks share a known batch"
        self.whole = whole
        self.step = 0
        self.settled = True
        """Whether no player has moved since the update `step`."""

    def __iter__(self) -> Iterator[Record]:
        while self.step < self.steps:
            yield self.update()

    def close(self) -> None:
        """Let go of what prepares the batches; to train on is allowed."""
        if isinstance(self.batch, Closable):
            self.batch.close()

    def update(self) -> Record:
        """One update: every player in turn makes its moves.

        Raises:
            NumericalFailure: a loss or gradient is not finite; the mover has not changed.
        """
        rate = self.rate(self.step)
        losses, norms = {}, {}
        examples, move = 0, self.step * sum(player.moves for player in self.players)
        for player in self.players:
            for k in range(player.moves):
                number = self.step * player.moves + k
                x_0 = self.batch(move)
                examples, move = examples + (self.whole or len(x_0)), move + 1
                losses[player.name], norms[player.name] = self._move(player, number, x_0, rate)
            if player.averaged:
                self.averages[player.name].update(player.module, self.step)
        self.step += 1
        self.settled = True
        return Record(self.step, losses, norms, rate, examples)

    def _move(self, player: Player, number: int, x_0: Tensor, rate: float) -> tuple[float, float]:
        player.module.train()
        player.optimizer.zero_grad(set_to_none=True)
        mine = self._backward(player, number, x_0)
        total = _summed(list(player.module.parameters()), mine)
        limit = math.inf if self.clip is None else self.clip
        norm = float(sharding.whole(nn.utils.clip_grad_norm_(player.module.parameters(), limit)))
        self._check(player.name, total, norm)
        for group in player.optimizer.param_groups:
            group["lr"] = rate
        self.settled = False
        player.optimizer.step()
        return total, norm

    def _backward(self, player: Player, number: int, x_0: Tensor) -> float:
        """This rank's part of the mean loss, and of its gradient."""
        whole, total = self.whole or len(x_0), 0.0
        pieces = distributed.spans(whole, self.accumulation)
        parts = x_0.split([len(piece) for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            with (
                rows_of(piece, whole, self.seed, "train", player.name, number),
                self.autocast(),
            ):
                loss = player.loss(part).sum() / whole
            (loss * self.share).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _check(self, name: str, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        kept = f"the weights of update {self.step} are unchanged"
        if len(self.players) > 1:
            kept = f"its weights are unchanged, and nothing after update {self.step} is saved"
        raise NumericalFailure(
            f"the {what} of {name} is {value} at update {self.step + 1}; {kept}. Lower the "
            "learning rate, lengthen the warm-up or clip"
        )

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of the state by group; the step number is `self.step`.

        Of players that are dealt to ranks the whole tensors: all ranks come here.
        """
        state: dict[str, dict[str, Tensor]] = {}
        for player in self.players:
            state[player.name] = _wholes(player.module.state_dict())
            if player.averaged:
                average = self.averages[player.name].module
                state[f"{player.name}-ema"] = _wholes(average.state_dict())
            state[f"{player.name}-optimizer"] = _optimizer_tensors(player.optimizer)
        return state | self.carried_state()

    def carried_state(self) -> dict[str, dict[str, Tensor]]:
        """The groups of what is carried; none for what has no state."""
        groups = {name: thing.state_dict() for name, thing in self.carried.items()}
        return {name: tensors for name, tensors in groups.items() if tensors}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Continue from a state after `step` updates; names and shapes must match exactly."""
        for player in self.players:
            sharding.load(player.module, state[player.name])
            if player.averaged:
                average = self.averages[player.name].module
                sharding.load(average, state[f"{player.name}-ema"])
            _load_optimizer(player.optimizer, state[f"{player.name}-optimizer"])
        for name in self.carried_state():
            self.carried[name].load_state_dict(state[name])
        self.step = step


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


def _wholes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: sharding.whole(tensor) for name, tensor in state.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": sharding.whole(value)
        for index, entry in state.items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    entries: dict[int, dict[str, Tensor]] = {}
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        mine = value.clone()
        if value.shape == weights[int(index)].shape:
            mine = sharding.part_of(mine, weights[int(index)])
        entries.setdefault(int(index), {})[name] = mine
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
