"""The .npy format, plain and inside an .npz: headers first, then values or where they lie.

A file is read only after its header is checked: no objects (they are pickles, which can run code),
no more bytes declared than the file holds or than fit in memory, no compression that only an
attack reaches. What a file is, is told by its first bytes and not by its name. Values that are not
compressed need not be read to be found: `Place` says where they lie.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from nelbo.data.files import reading, refuse_above
from nelbo.errors import InputRefused

NPY, ZIP = b"\x93NUMPY", b"PK"
RATIO, RATIO_FROM = 200, 2**28
MEMBERS = 1000
LOCAL_HEADER = struct.Struct("<4s22xHH")
HEADERS: dict[tuple[int, int], Callable[[IO[bytes]], tuple[tuple[int, ...], bool, np.dtype]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
PART_NAMES = {
    "train": ("x_train", "train_images", "train"),
    "validation": ("x_val", "val_images", "validation", "val"),
    "test": ("x_test", "test_images", "test"),
}
USUAL_NAMES = ("images", "x", "data", "arr_0")
DAMAGED = (ValueError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, KeyError)


@dataclass(frozen=True)
class Place:
    """An array in a file.

    Arguments:
        path, label: the file, and what messages call the array.
        start: byte at which the .npy begins. offset: byte at which its values begin.
        shape, dtype: of the array. crc: of the .npy, where an .npz states it.
        readable: whether rows can be read by themselves: neither compressed nor column by column.
        packed: bytes in the file.
    """

    path: Path
    label: str
    start: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    crc: int | None
    readable: bool
    packed: int
    member: str | None = None

    @property
    def size(self) -> int:
        """Bytes of values."""
        return math.prod(self.shape) * self.dtype.itemsize


def places(path: Path, key: str | None) -> dict[str, Place]:
    """The arrays of a file by part ("train" alone, or with others), headers checked.

    Arguments:
        key: of an .npz with several.
    """
    with reading(path), path.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        if start == NPY:
            return {"train": _place(file, path, str(path), 0, path.stat().st_size)}
    if start[:2] != ZIP:
        raise InputRefused(
            f"{path}: is neither an .npy nor an .npz file (pickles are never opened); write it "
            "with numpy.save or numpy.savez"
        )
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            infos = _checked(archive, path)
            chosen = _choice(sorted(infos), key, path)
            return {part: _member(archive, infos[n], path, n) for part, n in chosen.items()}
    except zipfile.BadZipFile as error:
        raise InputRefused(f"{path}: is a damaged .npz ({error}); write it again") from error


def values(place: Place, limit: int) -> np.ndarray:
    """The array, read into memory.

    Arguments:
        limit: most bytes that it may declare.
    """
    refuse_above(limit, place.size, place.label)
    try:
        with reading(place.path):
            if place.member is None:
                with place.path.open("rb") as file:
                    return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
            with zipfile.ZipFile(place.path) as archive, archive.open(place.member) as member:
                return np.asarray(np.lib.format.read_array(member, allow_pickle=False))
    except DAMAGED as error:
        raise InputRefused(f"{place.label}: is damaged ({error}); write it again") from error


def load(path: Path, key: str | None, limit: int) -> dict[str, np.ndarray]:
    """The arrays of a file by part, in memory; see `places` and `values`."""
    return {part: values(place, limit) for part, place in places(path, key).items()}


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, name: str) -> Place:
    label = f"{path}: array {name!r}"
    if info.file_size > RATIO_FROM and info.file_size > RATIO * max(1, info.compress_size):
        raise InputRefused(
            f"{label}: unpacks {info.compress_size:,} bytes to {info.file_size:,}, like an "
            "attack; if it is meant, save it with numpy.save, uncompressed"
        )
    plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
    start = _data_start(path, info) if plain else 0
    with archive.open(info) as member:
        return _place(member, path, label, start, info.file_size, info, plain)


def _data_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Byte at which a member's data begin: after its own header, whose length is its own."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        head = file.read(LOCAL_HEADER.size)
        if len(head) < LOCAL_HEADER.size or head[:4] != b"PK\3\4":
            raise zipfile.BadZipFile("a member has no header")
        _, name, extra = LOCAL_HEADER.unpack(head)
    return info.header_offset + LOCAL_HEADER.size + int(name) + int(extra)


def _checked(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    names = [info.filename for info in infos]
    plain = all(name.endswith(".npy") and not set(name) & set("/\\") for name in names)
    if not plain or len(set(names)) != len(names) or not 0 < len(names) <= MEMBERS:
        raise InputRefused(
            f"{path}: is not an .npz file (its members are not distinct plain .npy files); write "
            "it with numpy.savez"
        )
    return {info.filename.removesuffix(".npy"): info for info in infos}


def _choice(names: list[str], key: str | None, path: Path) -> dict[str, str]:
    """Which array is which part."""
    if key is not None and key not in names:
        raise InputRefused(f"{path}: holds no array {key!r}, only {', '.join(names)}")
    if key is not None:
        return {"train": key}
    parts = {
        part: next(name for name in usual if name in names)
        for part, usual in PART_NAMES.items()
        if set(usual) & set(names)
    }
    if {"train", "test"} <= set(parts):
        return parts
    usual_names = names if len(names) == 1 else [name for name in USUAL_NAMES if name in names]
    if not usual_names:
        raise InputRefused(f"{path}: holds {', '.join(names)}; say which by its key")
    return {"train": usual_names[0]}


def _place(
    file: IO[bytes],
    path: Path,
    label: str,
    start: int,
    available: int,
    info: zipfile.ZipInfo | None = None,
    plain: bool = True,
) -> Place:
    """Where an array lies, after checking what its header declares."""
    try:
        shape, by_column, dtype = _header(file)
    except DAMAGED as error:
        raise InputRefused(f"{label}: is damaged ({error}); write it again") from error
    if dtype.hasobject:
        raise InputRefused(
            f"{label}: holds Python objects (a pickle), which are never loaded; save a plain "
            "array of numbers, all rows of one shape"
        )
    begin = file.tell()
    readable = plain and not by_column and len(shape) > 0
    crc, name = (None, None) if info is None else (info.CRC, info.filename)
    found = Place(
        path, label, start, start + begin, shape, dtype, crc, readable, available - begin, name
    )
    if found.size > found.packed:
        raise InputRefused(
            f"{label}: is truncated ({found.size:,} bytes declared); write it again"
        )
    return found


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"format version {version}, known are 1.0 and 2.0")
    return HEADERS[version](file)
