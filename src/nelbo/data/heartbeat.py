"""The binary heartbeat: a one at every `period`-th place, the phase uniform over `period`.

The simplest data that no model with independent bits can tell from noise: `period` sequences of
equal probability, so that the entropy is exactly log(period) nats, while each bit alone looks like
a coin of rate 1/period.

References:
    Sohl-Dickstein et al. 2015, section 3.1 and table App.1 (length 20, period 5).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nelbo.data.base import Dataset, Truth
from nelbo.data.provenance import Provenance
from nelbo.data.sums import digests
from nelbo.errors import InputRefused
from nelbo.randomness import generator

TRAIN, VALIDATION, TEST = 10_000, 500, 2_000


def patterns(length: int, period: int) -> Tensor:
    """(period, length) uint8: every sequence there is, row φ with ones at φ, φ + period, ...

    Raises:
        InputRefused: no period of at least 2 that fits into the length.
    """
    if not 2 <= period <= length:
        raise InputRefused(
            f"heartbeat: a period of {period} in a length of {length} is no rhythm; take a period "
            "of at least 2 and at most the length"
        )
    place = torch.arange(length) % period
    return (place == torch.arange(period)[:, None]).to(torch.uint8)


def heartbeat(
    length: int = 20,
    period: int = 5,
    n_train: int = TRAIN,
    n_test: int = TEST,
    seed: int = 0,
    *,
    n_validation: int = VALIDATION,
) -> Dataset:
    """Independent draws of sequences (n, length) of bits, with their truth.

    Arguments:
        length, period: of a sequence; its ones stand at every period-th place.
        n_train, n_validation, n_test: number of draws in each part.
        seed: of the draws.
    """
    all_rows = patterns(length, period)
    if n_train < 2 or n_test < 2 or n_validation < 0:
        raise InputRefused("heartbeat: ask for at least 2 training and 2 test examples")
    sizes = {"train": n_train, "validation": n_validation, "test": n_test}
    parts = {}
    for part, count in sizes.items():
        random = generator(seed, "heartbeat", part)
        parts[part] = all_rows[torch.randint(period, (count,), generator=random)]
    origin = Provenance("heartbeat", None, levels=2, licence="generated: free of rights")
    sums = [digest for rows in parts.values() for digest in digests(rows.numpy())]
    record = origin.record(parts, "independent draws of the phase", sums, seed)
    truth = Truth(math.log(period), 0.0, lambda rows: _log_prob(all_rows, rows))
    return Dataset.of_levels("heartbeat", parts, 2, record, truth, binary=True)


def _log_prob(known: Tensor, rows: Tensor) -> Tensor:
    """−log(period) for the sequences there are, −∞ for all others."""
    found = (rows[:, None, :] == known[None].to(rows.dtype)).all(2).any(1)
    value = torch.full((len(rows),), -math.log(len(known)), dtype=torch.float64)
    return torch.where(found, value, torch.full_like(value, -math.inf))
