"""Folders of up to millions of image files: listed once, decoded when asked for.

A file is decoded when a batch wants it, by several threads, and only if it is the same, to the
last byte, as the one that the first pass saw (see `survey`; what that found is kept by `index`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nelbo import console
from nelbo.data.decoding import Reader, file_bytes
from nelbo.data.part import Lazy
from nelbo.data.survey import Files, planar, shares, workers
from nelbo.errors import InputRefused

TOLD = 10_000
"""Files between two looks at the meter while listing."""


@dataclass(frozen=True)
class Listing(Files):
    """The image files of a folder in a fixed order.

    Arguments:
        folder: the folder. names: paths below it. state: SHA-256 of names, sizes and times.
        ignored: number of other visible files.
    """

    folder: Path
    names: list[str]
    state: str
    ignored: int

    def __len__(self) -> int:
        return len(self.names)

    def short(self, number: int) -> str:
        return self.names[number]

    def path(self, number: int) -> str:
        return f"{self.folder}/{self.names[number]}"

    def data(self, number: int) -> bytes:
        return file_bytes(self.path(number))


def listing(folder: Path, suffixes: frozenset[str]) -> Listing:
    """Image files in subfolders too, links followed once; hidden ones are left alone.

    Raises:
        InputRefused: there are none.
    """
    found: list[tuple[str, int, int]] = []
    other = 0
    with console.Meter(f"list {folder.name}", 0, "files") as meter:
        for entry in _walk(str(folder), {os.path.realpath(folder)}):
            if os.path.splitext(entry.name)[1].lower() in suffixes:
                found.append(_entry(entry, len(str(folder)) + 1))
                if len(found) % TOLD == 0:
                    meter.update(len(found), total=len(found))
            else:
                other += 1
    if not found:
        among = f" among {other} file(s)" if other else ""
        raise InputRefused(
            f"{folder}: holds no images{among}; put files of these kinds there: "
            f"{', '.join(sorted(suffixes))}"
        )
    found.sort(key=lambda one: one[0].split("/"))
    total = hashlib.sha256()
    for one in found:
        total.update(repr(one).encode())
    return Listing(folder, [name for name, _, _ in found], total.hexdigest(), other)


def _walk(place: str, seen: set[str]) -> Iterator[os.DirEntry[str]]:
    below = []
    try:
        entries = os.scandir(place)
    except OSError:
        return  # as os.walk: what cannot be entered holds nothing
    with entries:
        for entry in entries:
            if entry.name[0] == ".":
                continue
            if not entry.is_dir():
                yield entry
                continue
            # a link to a folder above would be walked for ever
            real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
            if real not in seen:
                seen.add(real)
                below.append(entry.path)
    for path in below:
        yield from _walk(path, seen)


def _entry(entry: os.DirEntry[str], start: int) -> tuple[str, int, int]:
    try:
        found = entry.stat()
    except OSError:  # a broken link is refused when it is read
        return entry.path[start:], -1, -1
    return entry.path[start:], found.st_size, found.st_mtime_ns


class Folder(Lazy):
    """Images that are decoded when they are asked for.

    Arguments:
        files: the folder. kept: (n,) which of its files these are. keys: (n,) S32, their SHA-256.
        plain: (n,) whether Pillow's pixels are the values. shape: (C, H, W). reader: how.
    """

    def __init__(
        self,
        files: Files,
        kept: np.ndarray,
        keys: np.ndarray,
        plain: np.ndarray,
        shape: tuple[int, int, int],
        reader: Reader,
    ) -> None:
        super().__init__((len(kept), *shape), np.dtype(np.uint8))
        self.files = files
        self.kept = kept
        self.keys = keys
        self.plain = plain
        self.reader = reader

    def read(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        places = range(len(rows))

        def some(part: Sequence[int]) -> None:
            for place in part:
                out[place] = self._one(int(rows[place]))

        if workers() == 1 or len(rows) == 1:
            some(places)
        else:
            list(self._pool.map(some, shares(places)))
        return out

    def _one(self, row: int) -> np.ndarray:
        number = int(self.kept[row])
        key = self.keys[row].ljust(32, b"\0")  # NumPy drops zeros at the end
        pixels = self.reader.again(
            self.files.data(number), self.files.path(number), key, bool(self.plain[row])
        )
        return planar(pixels, self.shape[1])

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(workers(), "nelbo-decode")

    def same(self, rows: np.ndarray) -> bool:
        """Whether these files have the sums that they had."""
        return all(
            hashlib.sha256(self.files.data(int(self.kept[row]))).digest()
            == self.keys[row].ljust(32, b"\0")
            for row in rows
        )
