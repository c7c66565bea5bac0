"""Parts of a data set: examples that are in memory, or read when they are asked for.

A tensor is a `Part`. So is whatever knows its length and the shape of an example and gives the
rows with given numbers: an array or a folder of images that does not fit in memory reads the rows
of a batch and forgets them. What asks for rows cannot tell the two apart.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nelbo.data.files import LIMIT
from nelbo.errors import InputRefused

CHUNK = 4096
"""Rows that are read at once in a pass over all."""


class Part(Protocol):
    """Examples (n, *shape), of which some are asked for at a time."""

    @property
    def shape(self) -> torch.Size:
        """(n, *shape)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Tensor:
        """Rows by number, slice or index tensor."""


class Lazy(ABC):
    """Examples that are read when they are asked for, from any thread.

    Arguments:
        shape: (n, *shape). dtype: uint8 or float64.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def read(self, rows: np.ndarray) -> np.ndarray:
        """(b,) int64 numbers from 0 to n - 1 -> (b, *shape), a fresh array.

        Raises:
            InputRefused: a file cannot be read, or is not what it was.
        """

    def __getitem__(self, index: Any) -> Tensor:
        """Rows by number, slice, or a tensor or list of numbers from 0 to n - 1.

        Raises:
            InputRefused: more rows than memory should hold.
        """
        if isinstance(index, int):
            return self[[range(len(self))[index]]][0]
        if isinstance(index, slice):
            rows = np.arange(*index.indices(len(self)))
        else:
            rows = torch.as_tensor(index, dtype=torch.int64).numpy()
        size = len(rows) * self.row_bytes
        if size > LIMIT:
            raise InputRefused(
                f"{len(rows):,} rows of {self.row_bytes:,} bytes do not fit in memory (the limit "
                f"is {LIMIT:,} bytes); ask for fewer (--limit)"
            )
        return torch.from_numpy(self.read(rows))

    @property
    def row_bytes(self) -> int:
        """Bytes of one example."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Chosen(Lazy):
    """Some rows of a part, in an order of their own.

    Arguments:
        of: the part. rows: (n,) int64 numbers of its rows.
    """

    def __init__(self, of: Lazy, rows: np.ndarray) -> None:
        super().__init__((len(rows), *of.shape[1:]), of.dtype)
        self.of = of
        self.rows = rows

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.of.read(self.rows[rows])


def head(part: Any, n: int | None) -> Any:
    """The first n rows (all for None), read when asked for if the part is."""
    if isinstance(part, Lazy):
        rows = np.arange(len(part))[:n]
        return part if len(rows) == len(part) else Chosen(part, rows)
    return part[:n]


def pieces(part: Part, size: int = CHUNK) -> Iterator[Tensor]:
    """All rows in order, `size` at a time."""
    for start in range(0, len(part), size):
        yield part[start : start + size]


def some(part: Part, rows: Tensor) -> Tensor:
    """Rows (b, *shape) with numbers (b,) int64; of a tensor three times as fast as an index."""
    return part.index_select(0, rows) if isinstance(part, Tensor) else part[rows]


def taken(values: np.ndarray | Lazy, rows: np.ndarray) -> Tensor | Lazy:
    """Rows of values, in memory or not as these are."""
    if isinstance(values, Lazy):
        return Chosen(values, rows)
    return torch.from_numpy(np.ascontiguousarray(values[rows]))
