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
How an update is made, and when its numbers are looked at, is in `stepping`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from nelbo import distributed, sharding
from nelbo.averages import EMA, Decay
from nelbo.errors import NumericalFailure
from nelbo.rates import Rate
from nelbo.stepping import Immediate, Move, Outcome, Player, Rules, Stepping

__all__ = ["Figures", "Player", "Record", "Trainer"]


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


class Figures(Mapping[str, float]):
    """A number for every player, read when it is asked for: it may be on its way from a device."""

    def __init__(self, outcomes: Mapping[str, Outcome], place: int) -> None:
        self._outcomes, self._place = outcomes, place

    def __getitem__(self, name: str) -> float:
        return self._outcomes[name].read()[self._place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._outcomes)

    def __len__(self) -> int:
        return len(self._outcomes)

    @property
    def known(self) -> bool:
        """Whether nobody would have to wait."""
        return all(outcome.known for outcome in self._outcomes.values())


@dataclass(frozen=True)
class Record:
    """What one update did."""

    step: int
    """Updates done, this one included."""
    losses: Figures
    """Mean loss by player, in the loss's own unit."""
    grad_norms: Figures
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
        stepping: how updates are made; see `nelbo.stepping` and `nelbo.deferred`.
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
        stepping: Callable[[Rules, list[Player]], Stepping] = Immediate,
    ) -> None:
        self.players = players
        self.batch = batch
        self.rate = rate
        self.steps = steps
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
        limit = math.inf if clip is None else clip
        context = nullcontext if autocast is None else autocast
        self.stepping = stepping(Rules(seed, limit, accumulation, context, self.share), players)
        self._underway: deque[Outcome] = deque()

    def __iter__(self) -> Iterator[Record]:
        while self.step < self.steps:
            yield self.update()
        self.settle()

    @property
    def settled(self) -> bool:
        """Whether no player has moved since the update `step`."""
        return not self.stepping.moved

    def close(self) -> None:
        """Let go of what prepares the batches; to train on is allowed."""
        if isinstance(self.batch, Closable):
            self.batch.close()

    def update(self) -> Record:
        """One update: every player in turn makes its moves.

        Raises:
            NumericalFailure: a loss or gradient is not finite; the mover has not changed. Where
                updates are deferred, that of the update before this one, and `step` is again the
                number of those that were made.
        """
        rate, outcomes = self.rate(self.step), {}
        examples, move = 0, self.step * sum(player.moves for player in self.players)
        for player in self.players:
            for k in range(player.moves):
                x_0 = self.batch(move)
                whole, move = self.whole or len(x_0), move + 1
                last = player.averaged and k == player.moves - 1
                average = self.averages[player.name] if last else None
                number = self.step * player.moves + k
                asked = Move(player, average, x_0, whole, number, self.step, rate)
                outcomes[player.name] = self.stepping.make(asked)
                self._underway.append(outcomes[player.name])
                examples += whole
        self.step += 1
        self.stepping.moved = False
        self.settle(self.stepping.behind)
        return Record(self.step, Figures(outcomes, 0), Figures(outcomes, 1), rate, examples)

    def settle(self, behind: int = 0) -> None:
        """Look at the outcomes of all updates but the last `behind`.

        Raises:
            NumericalFailure: of an update that changed nothing; `step` is what was done before.
        """
        while len(self._underway) > behind:
            outcome = self._underway.popleft()
            try:
                outcome.check(len(self.players) == 1)
            except NumericalFailure:
                self.step = outcome.step
                self._underway.clear()
                self.stepping.restart()
                raise

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All tensors of the state by group; the step number is `self.step`.

        Of players that are dealt to ranks the whole tensors: all ranks come here.

        Raises:
            NumericalFailure: an update that was under way has failed.
        """
        self.settle()
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
        self._underway.clear()
        self.stepping.restart()
        self.step = step


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
