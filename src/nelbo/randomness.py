"""Randomness as a function: every draw is fixed by (seed, purpose, step or batch, rank).

No generator state is ever stored. A run resumed at step k seeds step k exactly as the run that was
never interrupted did, and an evaluation draws the same noise for batch b on any number of ranks.
`torch.distributions` takes no generator, so code that samples from distributions runs inside
`seeded`, which forks the global generators and puts them back afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def key(seed: int, *parts: str | int) -> int:
    """63-bit seed of a purpose: the leading bits of SHA-256 over (seed, parts).

    Arguments:
        seed: the run's seed.
        parts: purpose, step or batch index, rank; order matters.
    """
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *parts: str | int) -> torch.Generator:
    """A CPU generator seeded with `key(seed, *parts)`."""
    return torch.Generator().manual_seed(key(seed, *parts))


@contextmanager
def seeded(seed: int, *parts: str | int) -> Iterator[None]:
    """Run a block with the global generators seeded by `key`, then restore them."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(key(seed, *parts))
        yield
