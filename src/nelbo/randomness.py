"""Randomness as a function: every draw is fixed by (seed, purpose, step or batch, place in it).

No generator state is ever stored. A run resumed at step k seeds step k exactly as the run that was
never interrupted did, and an evaluation draws the same noise for batch b on any number of ranks.
`torch.distributions` takes no generator, so code that samples from distributions runs inside
`seeded`, which forks the global generators and puts them back afterwards.

A training batch may be computed in pieces: by several ranks, or in parts that save memory. What is
drawn for an example must not depend on the pieces, so draws belong to blocks of 512 rows of the
whole batch, each with a stream of its own. Inside `rows_of` a draw that has a value for every row
(`by_row`) is made for the blocks that the piece touches, and cut to it; a draw that all rows share
(`for_all`) comes from one more stream. Outside of it both are plain draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK = 512
"""Rows of a training batch that share a stream; a piece draws at most so many more than it has."""

Draw = Callable[[int, torch.Generator | None], Tensor]
"""(rows, generator; None is torch's own) -> (rows, ...)."""


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
    with _restored():
        torch.manual_seed(key(seed, *parts))
        yield


@contextmanager
def _restored() -> Iterator[None]:
    # the one that this process computes on: to look at the others would take memory on each
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


# --- pieces of a batch ---------------------------------------------------------------------------


class Rows:
    """Rows [start, stop) of a batch of `whole`, and the streams that they draw from.

    Arguments:
        seed, parts: of the batch; see `key`.
        picked: places in the piece that are drawn for alone, from streams of their own.
    """

    def __init__(
        self,
        span: range,
        whole: int,
        seed: int,
        parts: tuple[str | int, ...],
        picked: Tensor | None = None,
    ) -> None:
        assert 0 <= span.start < span.stop <= whole, "a piece has rows, and lies in its batch"
        self.span, self.whole = span, whole
        self.seed, self.parts = seed, parts
        self.blocks = range(span.start // BLOCK, (span.stop - 1) // BLOCK + 1)
        self.picked = picked
        self._own: dict[tuple[str, str], torch.Generator] = {}

    def draw(self, count: int, make: Draw, device: torch.device) -> Tensor:
        """(count, ...): of the blocks what belongs to these rows."""
        parts = []
        for block in self.blocks:
            low = block * BLOCK
            drawn = make(min(BLOCK, self.whole - low), self._stream(block, device))
            parts.append(drawn[max(self.span.start - low, 0) : self.span.stop - low])
        mine = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.picked is not None:
            mine = mine[self.picked.to(mine.device)]
        assert len(mine) == count, "a draw by row has as many rows as the piece"
        return mine

    def shared(self, make: Callable[[torch.Generator | None], Tensor]) -> Tensor:
        """What is the same for all rows; drawn on the CPU."""
        return make(self._generator("batch", torch.device("cpu")))

    def _stream(self, block: int, device: torch.device) -> torch.Generator | None:
        # the first block draws from torch's own generators: a compiled network knows no other
        if block == self.blocks[0] and self.picked is None:
            return None
        return self._generator(str(block), device)

    def _generator(self, name: str, device: torch.device) -> torch.Generator:
        place = (name, str(device))
        if place not in self._own:
            seed = key(self.seed, *self.parts, name)
            self._own[place] = torch.Generator(device).manual_seed(seed)
        return self._own[place]


_rows: Rows | None = None


@contextmanager
def rows_of(span: range, whole: int, seed: int, *parts: str | int) -> Iterator[None]:
    """Draw for rows `span` of a batch of `whole`: the same values, however it is cut.

    Arguments:
        seed, parts: of the batch; see `key`.
    """
    global _rows
    rows, before = Rows(span, whole, seed, parts), _rows
    with seeded(seed, *parts, rows.blocks[0]):
        _rows = rows
        try:
            yield
        finally:
            _rows = before


@contextmanager
def picked(rows: Tensor, purpose: str) -> Iterator[None]:
    """Draw for some of the rows of the piece alone, whether or not others do so before.

    Arguments:
        rows: (k,) int64 places in the piece. purpose: names the streams.
    """
    global _rows
    before = _rows
    if before is not None:
        _rows = Rows(before.span, before.whole, before.seed, (*before.parts, purpose), rows)
    try:
        yield
    finally:
        _rows = before


def by_row(count: int, make: Draw, device: torch.device | str = "cpu") -> Tensor:
    """Draw a value for each of `count` rows.

    Arguments:
        make: draws for as many rows as it is told, from the generator that it is given.
        device: where it draws.
    """
    return make(count, None) if _rows is None else _rows.draw(count, make, torch.device(device))


def for_all(make: Callable[[torch.Generator | None], Tensor]) -> Tensor:
    """Draw on the CPU what all rows of a batch share."""
    return make(None) if _rows is None else _rows.shared(make)


def place_of(count: int) -> tuple[int, int]:
    """Number of the first of `count` rows in its batch, and the rows of the whole batch."""
    return (0, count) if _rows is None else (_rows.span.start, _rows.whole)
