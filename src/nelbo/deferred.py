r"""Updates that a device is asked for without waiting for any of their numbers.

Whether an update is finite is decided where it is computed. With m = 0 until one is not, and 1
from then on,

    θ ← θ + (1 − m) Δθ,   moments and counts likewise,   θ̄ ← θ̄ + (1 − m)(1 − d)(θ − θ̄),

so that the first bad update and all after it change nothing, whenever the host comes to look. It
looks at an update when the next one has been asked for, and then names the one that failed. m is
what PyTorch's fused optimisers call `found_inf`. Rate and decay are tensors, filled before each
update; so an update reads nothing of the host but its inputs, and can be recorded whole, forward,
loss, backward, clipping, optimiser and average, as one CUDA graph (`replay`).

On a CPU it is the same program without a graph, and equals `Immediate` to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nelbo.averages import EMA
from nelbo.errors import UsageError
from nelbo.randomness import BLOCK, rows_of
from nelbo.replay import CudaGraph, Recorder, Replay
from nelbo.stepping import Move, Outcome, Player, Rules, Stepping


@runtime_checkable
class Halved(Protocol):
    """A loss that draws on the host first, and then asks it nothing; see `nelbo.losses`."""

    def inputs(self, x_0: Tensor) -> tuple[Tensor, ...]:
        """What the second half takes, on the device of x_0."""

    def given(self, *inputs: Tensor) -> Tensor:
        """(B,) losses of them."""


class Deferred(Stepping):
    """For one player that moves once, one process, and a batch that is not split.

    Arguments:
        rules, players: see `Stepping`.
        recorder: records updates on a device; None: they are asked for one kernel at a time.
    Raises:
        UsageError: the run is of another kind, or the optimiser is not a fused one.
    """

    behind = 1

    def __init__(
        self,
        rules: Rules,
        players: list[Player],
        recorder: Callable[[torch.device], Recorder] | None = None,
    ) -> None:
        super().__init__(rules, players)
        single = len(players) == 1 and players[0].moves == 1
        if not single or rules.accumulation > 1 or rules.share > 1:
            raise UsageError("updates are deferred for one player, one process, whole batches")
        if not players[0].optimizer.defaults.get("fused"):
            raise UsageError("updates are deferred with a fused optimiser: give it fused=True")
        self._recorder = recorder
        self._update: Update | None = None
        self._run: Callable[..., None] | None = None

    def make(self, move: Move) -> Outcome:
        """Ask for an update; its outcome is to be checked after the next one was asked for."""
        update, run = self._prepared(move)
        if not move.player.module.training:
            move.player.module.train()
        whole = range(move.whole)
        with rows_of(whole, move.whole, self.rules.seed, "train", move.player.name, move.number):
            inputs = update.inputs(move.x_0)
            update.rate.fill_(move.rate)
            if move.average is not None:
                update.weight.fill_(1 - move.average.decay(move.step))
            run(*inputs)
        self.moved = True
        return _underway(move, update.seen)

    def restart(self) -> None:
        self._update = self._run = None

    def _prepared(self, move: Move) -> tuple[Update, Callable[..., None]]:
        if self._update is None or self._run is None:
            device = move.x_0.device
            self._update = Update(self.rules, move.player, move.average, move.whole, device)
            self._run = self._update
            if self._recorder is not None:
                assert move.whole <= BLOCK, "rows beyond the first block draw from new generators"
                self._run = Replay(self._update, self._recorder(device))
                for group in move.player.optimizer.param_groups:
                    group["capturable"] = True
        return self._update, self._run


class Update:
    """All that a device does for an update, in place: the same tensors every time.

    Arguments:
        average: moves with the player, or None.
        whole: examples of a batch.
    """

    def __init__(
        self, rules: Rules, player: Player, average: EMA | None, whole: int, device: torch.device
    ) -> None:
        self.rules, self.player, self.average, self.whole = rules, player, average, whole
        self.parameters = list(player.module.parameters())
        one = torch.zeros((), dtype=torch.float32, device=device)
        self.rate, self.weight, self.bad = one, one.clone(), one.clone()
        self.seen = torch.zeros(2, dtype=torch.float64, device=device)
        """Loss and gradient norm of the last update."""
        for group in player.optimizer.param_groups:
            group["lr"] = self.rate
        player.optimizer.found_inf = self.bad  # type: ignore[attr-defined]

    def inputs(self, x_0: Tensor) -> tuple[Tensor, ...]:
        """What an update takes of a batch; draws on the CPU."""
        loss = self.player.loss
        return loss.inputs(x_0) if isinstance(loss, Halved) else (x_0,)

    def __call__(self, *inputs: Tensor) -> None:
        """One update."""
        optimizer, loss = self.player.optimizer, self.player.loss
        optimizer.zero_grad(set_to_none=True)
        with self.rules.autocast():
            each = loss.given(*inputs) if isinstance(loss, Halved) else loss(*inputs)
            mean = each.sum() / self.whole
        mean.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters, self.rules.limit)
        self.seen.copy_(torch.stack([mean.detach().double(), norm.double()]))
        self.bad.copy_(torch.maximum(self.bad, (~self.seen.isfinite().all()).float()))
        optimizer.step()
        if self.average is not None:
            self.average.follow(self.player.module, self.weight * (1 - self.bad))


def _underway(move: Move, seen: Tensor) -> Outcome:
    """The outcome of what was asked for last, on its way to the CPU."""
    if not seen.is_cuda:
        return Outcome(move, seen.clone())
    values = torch.empty(2, dtype=torch.float64, pin_memory=True)
    values.copy_(seen, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return Outcome(move, values, event)


def recorded(rules: Rules, players: list[Player]) -> Deferred:
    """Updates that are recorded as one CUDA graph and replayed."""
    return Deferred(rules, players, CudaGraph)
