"""Parquet shards: a column of encoded images, or of lists of numbers.

A file, or a folder of them in the order of their names. Rows lie in row groups, which can only be
read whole; the last few that were read are kept. Where all decoded rows fit in memory each group
is read once. Otherwise batches, whose rows come from everywhere, read a group for almost every row
as soon as the groups do not fit either: such data are better written as one .npy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nelbo.data.arrays import Levels, Vectors
from nelbo.data.base import Dataset
from nelbo.data.decoding import Reader
from nelbo.data.files import LIMIT, Cache, existing, in_memory
from nelbo.data.images import PIXEL_LIMIT, collection
from nelbo.data.index import Index, recalled, remember
from nelbo.data.mapped import Reading
from nelbo.data.part import Lazy
from nelbo.data.provenance import Provenance
from nelbo.data.shards import SUFFIX, Shards
from nelbo.data.splits import Rows, by_content, fractions
from nelbo.data.sums import sums_of
from nelbo.data.survey import Files
from nelbo.errors import InputRefused


def parquet(
    path: str | Path,
    *,
    column: str | None = None,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.05,
    skip_bad: int = 0,
    limit: int = LIMIT,
    cache: Cache = "auto",
) -> Dataset:
    """Images (a column of bytes, or of structs with a field "bytes") or lists of numbers.

    Lists of floats are vectors; lists of unsigned bytes are square images, grey or planar RGB.

    Arguments:
        path: a file, or a folder of .parquet files. column: its name, where several would do.
        size, channels, skip_bad: of images, as in `images`.
        test_fraction, validation_fraction: sizes of the parts that are split off.
        limit: most bytes in memory. cache: as in `images`.

    Raises:
        InputRefused: pyarrow is not installed, no such column, rows of different length, or what
            `images` and `arrays` refuse.
    """
    shards = Shards(existing(path), column)
    if shards.encoded:
        reader = Reader(size, channels, False, PIXEL_LIMIT)
        sizes = (test_fraction, validation_fraction)
        files = Pictures(shards)
        return collection(files, reader, sizes, skip_bad=skip_bad, limit=limit, cache=cache)
    table = Table(shards)
    n, source = len(table), str(shards.path)
    sums = table.survey()
    keep = in_memory(n * table.row_bytes, cache, limit, source)
    whole = table.read(np.arange(n)) if keep else table
    levels = None if table.dtype.kind == "f" else 256
    origin = Provenance("parquet", shards.path, levels=levels)
    test, validation = fractions(n, source, test_fraction, validation_fraction)
    return by_content(Rows(whole, sums=sums), origin, test=test, validation=validation)


def is_parquet(path: Path) -> bool:
    """Whether a path is a .parquet file or a folder that holds some."""
    return path.suffix == SUFFIX if path.is_file() else any(path.glob(f"*{SUFFIX}"))


class Pictures(Files):
    """A column of encoded images.

    Arguments:
        shards: of the column.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.folder, self.state, self.ignored = shards.path, shards.marks, 0

    def __len__(self) -> int:
        return len(self.shards)

    def short(self, number: int) -> str:
        group, place = self.shards.where(number)
        file, inside, _ = self.shards.groups[group]
        return f"{self.shards.files[file].name}: row group {inside}, row {place}"

    def path(self, number: int) -> str:
        return f"{self.folder} ({self.short(number)})"

    def data(self, number: int) -> bytes:
        group, place = self.shards.where(number)
        data: bytes = self.shards.group(group)[place].as_py()
        return data


class Table(Lazy):
    """A column of lists of numbers, all of one length.

    Arguments:
        shards: of the column.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.length = len(shards.group(0)[0])
        first = self._numbers(0)
        self.meaning: Reading = (
            Vectors(shards.path) if first.dtype.kind == "f" else Levels(shards.path, 256, "NCHW")
        )
        one = self.meaning.arrange(self._shaped(first[:1]))
        super().__init__((len(shards), *one.shape[1:]), one.dtype)

    def read(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        groups = np.searchsorted(self.shards.ends, rows, side="right")
        starts = np.concatenate([[0], self.shards.ends])[groups]
        for group in np.unique(groups):
            here = np.flatnonzero(groups == group)
            numbers = self._numbers(int(group))[rows[here] - starts[here]]
            out[here] = self.meaning.arrange(self._shaped(numbers))
        return out

    def survey(self) -> np.ndarray:
        """(n,) S32: SHA-256 of every row, from the index or by a pass over the groups."""
        key = {"kind": "parquet", "path": str(self.shards.path.resolve()), "is": self.shards.marks}
        known = recalled(key, self._agrees)
        if known is not None:
            return known.sums
        found, start = [], 0
        for group in range(len(self.shards.groups)):
            numbers = self._shaped(self._numbers(group))
            self.meaning.check(numbers, start)
            found.append(sums_of(self.meaning.arrange(numbers)))
            start += len(numbers)
        remember(key, Index(np.concatenate(found), {}, {}))
        return np.concatenate(found)

    def _agrees(self, index: Index, rows: np.ndarray) -> bool:
        rows = rows[:8]  # each costs a row group
        same = sums_of(self.read(rows)) == index.sums[rows]
        return len(index.sums) == len(self) and bool(same.all())

    def _numbers(self, group: int) -> np.ndarray:
        """(m, D) of a group."""
        array = self.shards.group(group)
        values: np.ndarray = array.flatten().to_numpy(zero_copy_only=False)
        lengths = (
            {len(array[0])}
            if hasattr(array.type, "list_size")
            else set(np.diff(array.offsets.to_numpy()).tolist())
        )
        if lengths != {self.length}:
            raise InputRefused(
                f"{self.shards.path}: rows of different length in column {self.shards.column}; "
                "give all the same"
            )
        return values.reshape(-1, self.length)

    def _shaped(self, numbers: np.ndarray) -> np.ndarray:
        """(m, D) floats, or (m, C, s, s) levels."""
        if numbers.dtype.kind == "f":
            return numbers
        for channels in (1, 3):
            side = round((self.length / channels) ** 0.5)
            if channels * side * side == self.length:
                return numbers.reshape(-1, channels, side, side)
        raise InputRefused(
            f"{self.shards.path}: {self.length} unsigned bytes a row are no square image, grey or "
            "RGB; write them as an .npy of shape (n, C, H, W)"
        )
