"""The order in which examples are visited, as a function of the seed and the step.

Epoch e is the permutation drawn from (seed, "order", e). Training reads the endless concatenation
of epochs in batches that are always full, so a batch may straddle two epochs. Nothing is stored: a
run resumed at step k asks for batch k. Evaluation goes by fixed blocks of the example number,
because the batch makeup changes a network's float32 output in its last digits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from nelbo.errors import InputRefused
from nelbo.randomness import generator


def batch_indices(n: int, batch: int, seed: int, step: int) -> Tensor:
    """Examples of training step `step`: positions [step*batch, (step+1)*batch) of all epochs.

    Arguments:
        n: number of training examples.
        batch: batch size.
        seed: of the run.
        step: from 0.

    Returns:
        (batch,) int64 in 0..n-1.

    Raises:
        InputRefused: fewer examples than a batch.
    """
    assert batch > 0 and step >= 0
    if n < batch:
        raise InputRefused(
            f"{n} training examples are fewer than a batch of {batch}: give a batch size of at "
            f"most {n}, or more data"
        )
    epoch, start = divmod(step * batch, n)
    here = _epoch(n, seed, epoch)[start : start + batch]
    missing = batch - len(here)
    return here.clone() if not missing else torch.cat([here, _epoch(n, seed, epoch + 1)[:missing]])


def evaluation_batches(n: int, batch: int) -> list[Tensor]:
    """The fixed partition of 0..n-1 into blocks of `batch`; the last may be shorter.

    Returns:
        list of (b,) int64.
    """
    assert n > 0 and batch > 0
    return list(torch.split(torch.arange(n), batch))


@lru_cache(maxsize=2)
def _epoch(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))
