"""How the updates of a run are made: read at once, asked for ahead, or recorded as one CUDA graph.

| option --graphs | what is recorded                                                       |
|-----------------|------------------------------------------------------------------------|
| update          | a whole update: loss, gradient, clipping, optimiser and average        |
| network         | the compiled network, forward and backward (with --compile)            |
| none            | nothing                                                                |
| auto            | with --compile an update where that can be, else the network; else none |

An update can be recorded on a GPU, by one process, of whole batches of at most 512 rows, whose
loss asks nothing of the host. On a GPU nobody waits for a number of an update before the next one
is asked for, recorded or not, unless ranks or parts of a batch add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from nelbo.deferred import Deferred, recorded
from nelbo.errors import UsageError
from nelbo.randomness import BLOCK
from nelbo.recipes.groups import Options
from nelbo.stepping import Immediate, Player, Rules, Stepping


class Way(NamedTuple):
    """How updates are made."""

    stepping: Callable[[Rules, list[Player]], Stepping]
    network: bool
    """Whether the compiled network is recorded by itself."""
    said: str


def obstacle(options: Options, device: str, ranks: int, fixed: bool) -> str | None:
    """What stands in the way of recording a whole update; None if nothing does.

    Arguments:
        ranks: processes. fixed: whether the loss asks nothing of the host.
    """
    if torch.device(device).type != "cuda":
        return f"a CUDA graph needs a GPU, and this is {torch.device(device).type}"
    if ranks > 1:
        return "ranks add up their gradients"
    if options.accumulation > 1:
        return "a batch is computed in parts"
    if options.batch > BLOCK:
        return f"rows beyond the first {BLOCK} draw from generators of their own"
    return None if fixed else "what the loss learns from is read by the host"


def chosen(options: Options, device: str, ranks: int, fixed: bool) -> Way:
    """How the updates of a run are made.

    Arguments:
        as of `obstacle`.
    Raises:
        UsageError: an update was to be recorded and cannot be.
    """
    reason = obstacle(options, device, ranks, fixed)
    if options.graphs == "update" and reason is not None:
        raise UsageError(f"--graphs update: {reason}")
    wanted = options.graphs == "update" or (options.graphs == "auto" and options.compile)
    if wanted and reason is None:
        return Way(recorded, False, "updates: recorded as one CUDA graph")
    single = ranks == 1 and options.accumulation == 1
    network = options.graphs in ("auto", "network") and single
    why = f" (one graph: {reason})" if wanted else ""
    if torch.device(device).type == "cuda" and single:
        return Way(Deferred, network, f"updates: asked for ahead{why}")
    return Way(Immediate, network, f"updates: one after the other{why}")
