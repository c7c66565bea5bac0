"""IDX files, the format of MNIST and its kin, plain or compressed with gzip.

A big-endian header, 00 00 type dimensions, one 32-bit size per dimension, then the values. Images
are type 08 (unsigned byte) with three dimensions, labels type 08 with one (LeCun, Cortes and
Burges, 1998). The compression is told by content, not by the file's name.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from nelbo.data.base import Dataset
from nelbo.data.files import LIMIT, existing, existing_file, reading, refuse_above
from nelbo.data.provenance import Provenance
from nelbo.data.splits import Rows, by_content, by_part, fractions
from nelbo.errors import InputRefused

GZIP = b"\x1f\x8b"
UNSIGNED_BYTE = 8
INFLATION = 1040  # deflate packs at most 1,032 to 1
AGAIN = "copy or download it again"


def idx(
    path: str | Path,
    *,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.05,
    limit: int = LIMIT,
) -> Dataset:
    """Images in MNIST's format, 256 levels, (1, H, W).

    Arguments:
        path: a folder with train-images-idx3-ubyte and t10k-images-idx3-ubyte (plain or .gz),
            which keeps its own test part; or one images file, which is split by content.
        test_fraction: of one file; a folder keeps its own test part.
        validation_fraction: part of the training examples (of all, for one file).
        limit: most bytes that a file may declare.

    Raises:
        InputRefused: a missing, empty, truncated or overlong file, or one that holds labels.
    """
    path = existing(path)
    origin = Provenance("idx", path, levels=256)
    if path.is_dir():
        train, test = (_part(path, part, limit) for part in ("train", "t10k"))
        (count,) = fractions(len(train.values), str(path), validation_fraction)
        return by_part(train, test, origin, validation=count)
    rows = Rows(_images(path, limit))
    held, count = fractions(len(rows.values), str(path), test_fraction, validation_fraction)
    return by_content(rows, origin, test=held, validation=count)


def is_idx(path: Path) -> bool:
    """Whether a file begins like an IDX file of unsigned bytes."""
    with reading(path), path.open("rb") as plain:
        start = plain.read(4)
    if start[:2] == GZIP:
        with _unpacked(path) as stream:
            try:
                start = stream.read(4)
            except (EOFError, zlib.error, gzip.BadGzipFile):
                return False
    return start[:3] == bytes([0, 0, UNSIGNED_BYTE])


def standard_file(folder: Path, part: str, kind: str) -> Path | None:
    """The file of a part ("train", "t10k") and kind ("images", "labels") by its usual names."""
    dims = 3 if kind == "images" else 1
    for mark in ("-", "."):
        for ending in ("", ".gz"):
            path = folder / f"{part}-{kind}{mark}idx{dims}-ubyte{ending}"
            if path.exists():
                return path
    return None


def _part(folder: Path, part: str, limit: int) -> Rows:
    images = standard_file(folder, part, "images")
    if images is None:
        raise InputRefused(
            f"{folder}: holds no {part}-images-idx3-ubyte (or .gz); add it, or give the path of "
            "one images file to have it split by content"
        )
    values = _images(images, limit)
    labels = standard_file(folder, part, "labels")
    if labels is None:
        return Rows(values)
    marks = _read(labels, limit)
    if marks.shape != (len(values),):
        raise InputRefused(
            f"{labels}: has shape {marks.shape} for {len(values)} images; give the labels that "
            "belong to them, or take the file away"
        )
    return Rows(values, labels=marks)


def _images(path: Path, limit: int) -> np.ndarray:
    """(n, 1, H, W) uint8."""
    array = _read(path, limit)
    if array.ndim == 1:
        raise InputRefused(
            f"{path}: holds labels (an IDX file of one dimension), not images; give the images "
            "file, whose name usually contains images-idx3"
        )
    if array.ndim != 3:
        raise InputRefused(f"{path}: has {array.ndim} dimensions; images have three (n, H, W)")
    return array[:, None]


def _read(path: Path, limit: int) -> np.ndarray:
    path = existing_file(path)
    try:
        with reading(path), _unpacked(path) as stream:
            shape = _header(stream, path)
            count = math.prod(shape)
            refuse_above(limit, count, str(path))
            # A read allocates what it asks for, so ask for no more than the file can hold.
            data = stream.read(min(count, INFLATION * path.stat().st_size) + 1)
    except (EOFError, zlib.error) as error:
        raise InputRefused(f"{path}: is truncated or damaged ({error}); {AGAIN}") from error
    if len(data) != count:
        relation = "truncated" if len(data) < count else "longer than its header says"
        raise InputRefused(f"{path}: is {relation} ({count:,} bytes of data declared); {AGAIN}")
    if count == 0:
        raise InputRefused(f"{path}: declares no examples, shape {shape}; {AGAIN}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _header(stream: BinaryIO, path: Path) -> tuple[int, ...]:
    start = stream.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or not 0 < start[3] <= 4:
        raise InputRefused(f"{path}: is not an IDX file (it begins {start.hex(' ')}); {AGAIN}")
    if start[2] != UNSIGNED_BYTE:
        raise InputRefused(
            f"{path}: holds values of type {start[2]:#04x}; only unsigned bytes (0x08) are images"
        )
    sizes = stream.read(4 * start[3])
    if len(sizes) < 4 * start[3]:
        raise InputRefused(f"{path}: is truncated in its header; {AGAIN}")
    return tuple(int(size) for size in np.frombuffer(sizes, ">u4"))


def _unpacked(path: Path) -> BinaryIO:
    with path.open("rb") as plain:
        packed = plain.read(2) == GZIP
    return cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb")
