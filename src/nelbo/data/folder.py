"""Folders of up to millions of image files: listed once, decoded when asked for.

The first pass decodes every file, so that a bad one is named before training begins, and takes two
sums of each: of the file and of its pixels. They are kept in an index (see `index`). Later a file
is decoded when a batch wants it, by several threads, and only if it is the same to the last byte.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from nelbo import console
from nelbo.data.decoding import Picture, Reader, file_bytes, strict_decoding
from nelbo.data.part import Lazy
from nelbo.errors import InputRefused

WINDOW, WINDOW_BYTES = 512, 2**26
"""Files, and bytes of their pixels, that a pass has in memory at a time."""
TOLD = 10_000
"""Files between two looks at the meter while listing."""


@dataclass(frozen=True)
class Listing:
    """The image files of a folder in a fixed order.

    Arguments:
        folder: the folder. names: paths below it. state: SHA-256 of names, sizes and times.
        ignored: number of other visible files.
    """

    folder: Path
    names: list[str]
    state: str
    ignored: int

    def path(self, number: int) -> str:
        """The path of a file."""
        return f"{self.folder}/{self.names[number]}"


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


@dataclass
class Survey:
    """What a pass over the files found; grows as it goes.

    Arguments:
        kept: numbers of the files that could be read. keys: SHA-256 of each of these files.
        sums: of its pixels as they are, and grey ones as three channels. plain: nothing was done.
        skipped: paths of bad files. shape: (H, W). pixels: where they are kept.
    """

    kept: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    sums: list[tuple[bytes, bytes]] = field(default_factory=list)
    plain: list[bool] = field(default_factory=list)
    grey: list[bool] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    colourless: bool = True
    shape: tuple[int, int] | None = None
    pixels: list[np.ndarray] | None = None


def survey(
    reader: Reader,
    files: Listing,
    skip_bad: int,
    keep: Callable[[Picture], bool],
) -> Survey:
    """Decode every file once.

    Arguments:
        skip_bad: files that may be bad. keep: of the first picture, whether memory holds all.

    Raises:
        InputRefused: a bad file more than may be, or images of different sizes.
    """
    found, first = Survey(), ""
    with (
        strict_decoding(),
        ThreadPoolExecutor(workers()) as pool,
        console.Meter(f"read {files.folder.name}", len(files.names), "images") as meter,
    ):
        start, window = 0, 1
        while start < len(files.names):
            numbers = range(start, min(start + window, len(files.names)))
            for number, one in zip(numbers, _decoded(pool, reader, files, numbers), strict=True):
                if isinstance(one, InputRefused):
                    if len(found.skipped) >= skip_bad:
                        raise one
                    found.skipped.append(files.names[number])
                    continue
                if found.shape is None:
                    first, found.shape = files.path(number), one[0].pixels.shape[:2]
                    found.pixels = [] if keep(one[0]) else None
                    window = max(1, min(WINDOW, WINDOW_BYTES // max(1, one[0].pixels.nbytes)))
                _add(found, reader, number, one, files.path(number), first)
            start = numbers.stop
            meter.update(start)
    return found


Seen = tuple[Picture, tuple[bytes, bytes], bool]


def _add(found: Survey, reader: Reader, number: int, one: Seen, path: str, first: str) -> None:
    picture, sums, colourless = one
    shape = picture.pixels.shape[:2]
    if shape != found.shape:
        assert found.shape is not None
        raise InputRefused(
            f"{path}: is {_across(shape)}, but {first} is {_across(found.shape)}; give a size "
            "to crop and resize all to (--size)"
        )
    reader.count(picture.done)
    found.kept.append(number)
    found.keys.append(picture.key)
    found.sums.append(sums)
    found.plain.append(not picture.done)
    found.grey.append(picture.pixels.ndim == 2)
    found.colourless &= colourless
    if found.pixels is not None:
        found.pixels.append(picture.pixels)


def _decoded(
    pool: ThreadPoolExecutor, reader: Reader, files: Listing, numbers: range
) -> Iterator[Seen | InputRefused]:
    """What each file turned out to be, in order; several threads decode."""

    def some(part: range) -> list[Seen | InputRefused]:
        return [_seen(reader, files.path(number)) for number in part]

    for seen in pool.map(some, _shares(numbers)):
        yield from seen


def _seen(reader: Reader, path: str) -> Seen | InputRefused:
    try:
        picture = reader.decode(file_bytes(path), path)
    except InputRefused as error:
        return error
    pixels = picture.pixels
    own = hashlib.sha256(planar(pixels, 1).tobytes()).digest()
    grey = pixels.ndim == 2
    other = hashlib.sha256(planar(pixels, 3).tobytes()).digest() if grey else own
    return picture, (own, other), grey or bool((pixels == pixels[..., :1]).all())


def planar(pixels: np.ndarray, channels: int) -> np.ndarray:
    """(C, H, W) of (H, W) or (H, W, 3); a grey one may become three equal channels."""
    if pixels.ndim == 2:
        return np.broadcast_to(pixels, (channels, *pixels.shape))
    return np.moveaxis(pixels, 2, 0)


def _shares(numbers: Sequence[int]) -> list[Sequence[int]]:
    """Pieces for the threads: several for each, since files differ."""
    size = max(1, -(-len(numbers) // (4 * workers())))
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def workers() -> int:
    """Threads that decode: as many as there are cores for this process, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = (cores or 1) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(16, share))


def _across(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels"


class Folder(Lazy):
    """Images that are decoded when they are asked for.

    Arguments:
        files: the folder. kept: (n,) which of its files these are. keys: (n,) S32, their SHA-256.
        plain: (n,) whether Pillow's pixels are the values. shape: (C, H, W). reader: how.
    """

    def __init__(
        self,
        files: Listing,
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
            list(self._pool.map(some, _shares(places)))
        return out

    def _one(self, row: int) -> np.ndarray:
        path = self.files.path(int(self.kept[row]))
        key = self.keys[row].ljust(32, b"\0")  # NumPy drops zeros at the end
        pixels = self.reader.again(file_bytes(path), path, key, bool(self.plain[row]))
        return planar(pixels, self.shape[1])

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(workers(), "nelbo-decode")

    def same(self, rows: np.ndarray) -> bool:
        """Whether these files have the sums that they had."""
        return all(
            hashlib.sha256(file_bytes(self.files.path(int(self.kept[row])))).digest()
            == self.keys[row].ljust(32, b"\0")
            for row in rows
        )
