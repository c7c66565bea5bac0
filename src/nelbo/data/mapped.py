"""Arrays larger than memory: the file is mapped, and the rows of a batch are read.

One pass in the order of the file, a block at a time, checks every value and takes the SHA-256 of
every row; what it found is kept in an index. After that a batch costs the reading of its own rows.
The file must not change meanwhile: size and time of change are looked at with every batch.
"""

from __future__ import annotations

import math
import mmap
import zlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from nelbo import console
from nelbo.data.files import reading, state
from nelbo.data.index import Index, recalled, remember
from nelbo.data.npy import Place
from nelbo.data.part import Lazy
from nelbo.data.sums import sums_of
from nelbo.errors import InputRefused

BLOCK = 2**24
"""Bytes of the blocks in which a file is gone through."""


class Reading(ABC):
    """What the values of a file mean."""

    @abstractmethod
    def refuse_shape(self, place: Place) -> None:
        """Refuse a type or shape that cannot be meant."""

    @abstractmethod
    def check(self, array: np.ndarray, start: int) -> None:
        """Refuse rows (b, ...) that are not what they should be; the first is row `start`.

        Raises:
            InputRefused: the first bad value by its place.
        """

    @abstractmethod
    def arrange(self, array: np.ndarray) -> np.ndarray:
        """Rows as stored in the file -> (b, C, H, W) uint8 or (b, D) float64."""

    @abstractmethod
    def words(self) -> list[Any]:
        """What tells this reading from another one of the same file."""


class Mapped(Lazy):
    """Rows of an array in a file.

    Arguments:
        place: where they lie. meaning: what they are.
    """

    def __init__(self, place: Place, meaning: Reading) -> None:
        one = meaning.arrange(np.zeros((1, *place.shape[1:]), place.dtype))
        super().__init__((place.shape[0], *one.shape[1:]), one.dtype)
        self.place = place
        self.meaning = meaning
        with reading(place.path), place.path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.state = state(file.fileno())
        if hasattr(mmap, "MADV_RANDOM"):
            self.map.madvise(mmap.MADV_RANDOM)  # a row, not the 128 KiB around it
        count = math.prod(place.shape)
        flat = np.frombuffer(self.map, place.dtype, count, place.offset)
        self.array = flat.reshape(place.shape)

    def read(self, rows: np.ndarray) -> np.ndarray:
        self._refuse_changed()
        return np.ascontiguousarray(self.meaning.arrange(self.array.take(rows, axis=0)))

    def _refuse_changed(self) -> None:
        path = self.place.path
        with reading(path):
            now = state(path)
        if now != self.state:
            raise InputRefused(
                f"{path}: changed while it was in use; put the old file back, or start a new run"
            )

    def survey(self) -> np.ndarray:
        """(n,) S32: SHA-256 of every row, from the index or by a pass over the file.

        Raises:
            InputRefused: a bad value, or bytes that are not those of the .npz.
        """
        key = {
            "kind": "array",
            "path": str(self.place.path.resolve()),
            "member": self.place.member,
            "state": list(self.state),
            "meaning": self.meaning.words(),
        }
        known = recalled(key, self._agrees)
        if known is not None:
            return known.sums
        sums = self._pass()
        remember(key, Index(sums, {}, {}))
        return sums

    def _agrees(self, index: Index, rows: np.ndarray) -> bool:
        same: np.ndarray = sums_of(self.read(rows)) == index.sums[rows]
        return len(index.sums) == len(self) and bool(same.all())

    def _pass(self) -> np.ndarray:
        place, n = self.place, len(self)
        sums = np.empty(n, "S32")
        per_row = max(1, place.size // n)
        step = max(1, BLOCK // per_row)
        with (
            reading(place.path),
            place.path.open("rb") as file,
            console.Meter(f"read {place.path.name}", n, "rows") as meter,
        ):
            file.seek(place.start)
            crc = zlib.crc32(file.read(place.offset - place.start))
            for start in range(0, n, step):
                stop = min(n, start + step)
                data = file.read((stop - start) * per_row)
                crc = 0 if place.crc is None else zlib.crc32(data, crc)
                block = np.frombuffer(data, place.dtype).reshape(stop - start, *place.shape[1:])
                self.meaning.check(block, start)
                sums[start:stop] = sums_of(self.meaning.arrange(block))
                meter.update(stop)
        if place.crc not in (None, crc):
            raise InputRefused(f"{place.label}: is damaged (Bad CRC-32); write it again")
        return sums
