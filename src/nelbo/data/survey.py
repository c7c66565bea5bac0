"""The first pass over encoded images: every one is decoded once, so that a bad one is named.

Two sums of each are taken, of its file and of its pixels. Several threads decode; a window of
images is in memory at a time, whatever their number.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nelbo import console
from nelbo.data.decoding import Picture, Reader, strict_decoding
from nelbo.errors import InputRefused

WINDOW, WINDOW_BYTES = 512, 2**26
"""Files, and bytes of their pixels, that a pass has in memory at a time."""


class Files(ABC):
    """Encoded images by number.

    Arguments:
        folder: where they lie. state: SHA-256 of what tells that they changed. ignored: number of
        other files there.
    """

    folder: Path
    state: str
    ignored: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def short(self, number: int) -> str:
        """What the record calls an image."""

    @abstractmethod
    def path(self, number: int) -> str:
        """What messages call it."""

    @abstractmethod
    def data(self, number: int) -> bytes:
        """Its bytes; from any thread.

        Raises:
            InputRefused: they cannot be read.
        """


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
    files: Files,
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
        console.Meter(f"read {files.folder.name}", len(files), "images") as meter,
    ):
        start, window = 0, 1
        while start < len(files):
            numbers = range(start, min(start + window, len(files)))
            for number, one in zip(numbers, _decoded(pool, reader, files, numbers), strict=True):
                if isinstance(one, InputRefused):
                    if len(found.skipped) >= skip_bad:
                        raise one
                    found.skipped.append(files.short(number))
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
    pool: ThreadPoolExecutor, reader: Reader, files: Files, numbers: range
) -> Iterator[Seen | InputRefused]:
    """What each file turned out to be, in order; several threads decode."""

    def some(part: range) -> list[Seen | InputRefused]:
        return [_seen(reader, files, number) for number in part]

    for seen in pool.map(some, shares(numbers)):
        yield from seen


def _seen(reader: Reader, files: Files, number: int) -> Seen | InputRefused:
    try:
        picture = reader.decode(files.data(number), files.path(number))
    except InputRefused as error:
        return error
    pixels = picture.pixels
    own = hashlib.sha256(planar(pixels, 1).tobytes()).digest()
    grey = pixels.ndim == 2
    other = hashlib.sha256(planar(pixels, 3).tobytes()).digest() if grey else own
    return picture, (own, other), grey or bool((pixels == pixels[..., :1]).all())


def planar(pixels: np.ndarray, channels: int) -> np.ndarray:
    """(C, H, W) of (H, W) or (H, W, 3); a grey one may become three equal channels."""
    if pixels.ndim == 3:
        return pixels.transpose(2, 0, 1)
    return pixels[None] if channels == 1 else np.broadcast_to(pixels, (channels, *pixels.shape))


def shares(numbers: Sequence[int]) -> list[Sequence[int]]:
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
