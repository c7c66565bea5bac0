"""NumPy arrays from .npy and .npz files: uint8 images, or real vectors.

A file is read only after its header is checked: no objects (they are pickles, which can run code),
no more bytes declared than the file holds or than fit in memory, no compression that only an
attack reaches. What a file is, is told by its first bytes and not by its name.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from nelbo.data.base import Dataset
from nelbo.data.files import LIMIT, existing_file, reading, refuse_above
from nelbo.data.provenance import Provenance
from nelbo.data.splits import Rows, by_content, by_part, fractions
from nelbo.errors import InputRefused

NPY, ZIP = b"\x93NUMPY", b"PK"
RATIO, RATIO_FROM = 200, 2**28
MEMBERS = 1000
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
LAYOUTS = ("NHW", "NHWC", "NCHW")
DAMAGED = (ValueError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, KeyError)


def arrays(
    path: str | Path,
    *,
    key: str | None = None,
    levels: int | None = None,
    layout: str | None = None,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.05,
    limit: int = LIMIT,
) -> Dataset:
    """Images (uint8 or bool) or vectors (float) from a .npy or .npz file.

    An .npz with training and test arrays (x_train, x_test; train_images, test_images; train, test)
    keeps them; any other array is split by content.

    Arguments:
        path: the file.
        key: name of the array in an .npz with several.
        levels: number of grey levels, 256 by default (2 for bool).
        layout: "NHW", "NHWC" or "NCHW"; told from the shape where it is unambiguous.
        test_fraction, validation_fraction: sizes of the parts that are split off.
        limit: most bytes that an array may declare.

    Raises:
        InputRefused: objects, a damaged or overlarge file, a type or shape that is neither images
            nor vectors, NaN or infinite values, constant data, too few examples.
    """
    path = existing_file(path)
    found = load(path, key, limit)
    rows = {part: _rows(array, path, levels, layout) for part, array in found.items()}
    origin = Provenance("arrays", path, levels=_levels(found, levels))
    total = len(rows["train"].values)
    if "test" not in rows:
        held, count = fractions(total, str(path), test_fraction, validation_fraction)
        return by_content(rows["train"], origin, test=held, validation=count)
    (count,) = fractions(len(rows["train"].values), str(path), validation_fraction)
    validation = rows.get("validation", count)
    return by_part(rows["train"], rows["test"], origin, validation=validation)


def load(path: Path, key: str | None, limit: int) -> dict[str, np.ndarray]:
    """The arrays of a file by part ("train" alone, or with others), headers checked first.

    Arguments:
        key: of an .npz with several. limit: most bytes that an array may declare.
    """
    with reading(path), path.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        if start == NPY:
            return {"train": _array(file, path.stat().st_size, str(path), limit)}
    if start[:2] != ZIP:
        raise InputRefused(
            f"{path}: is neither an .npy nor an .npz file (pickles are never opened); write it "
            "with numpy.save or numpy.savez"
        )
    try:
        with reading(path), zipfile.ZipFile(path) as archive:
            return _members(archive, path, key, limit)
    except zipfile.BadZipFile as error:
        raise InputRefused(f"{path}: is a damaged .npz ({error}); write it again") from error


def _members(
    archive: zipfile.ZipFile, path: Path, key: str | None, limit: int
) -> dict[str, np.ndarray]:
    infos = _checked(archive, path)
    found = {}
    for part, name in _choice(sorted(infos), key, path).items():
        info, label = infos[name], f"{path}: array {name!r}"
        if info.file_size > RATIO_FROM and info.file_size > RATIO * max(1, info.compress_size):
            raise InputRefused(
                f"{label}: unpacks {info.compress_size:,} bytes to {info.file_size:,}, like an "
                "attack; if it is meant, save it with numpy.save, uncompressed"
            )
        refuse_above(limit, info.file_size, label)
        with archive.open(info) as member:
            found[part] = _array(member, info.file_size, label, limit)
    return found


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


def _array(file: IO[bytes], available: int, label: str, limit: int) -> np.ndarray:
    """Read one array after checking what its header declares."""
    try:
        shape, dtype = _header(file)
        if dtype.hasobject:
            raise InputRefused(
                f"{label}: holds Python objects (a pickle), which are never loaded; save a plain "
                "array of numbers, all rows of one shape"
            )
        size = math.prod(shape) * dtype.itemsize
        refuse_above(limit, size, label)
        if size > available - file.tell():
            raise InputRefused(f"{label}: is truncated ({size:,} bytes declared); write it again")
        file.seek(0)
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except InputRefused:
        raise
    except DAMAGED as error:
        raise InputRefused(f"{label}: is damaged ({error}); write it again") from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"format version {version}, known are 1.0 and 2.0")
    shape, _, dtype = HEADERS[version](file)
    return shape, dtype


def _levels(found: dict[str, np.ndarray], levels: int | None) -> int | None:
    if found["train"].dtype.kind == "f":
        return None
    return levels or (2 if found["train"].dtype == bool else 256)


def _rows(array: np.ndarray, path: Path, levels: int | None, layout: str | None) -> Rows:
    if array.dtype.kind == "f" and levels is None:
        return Rows(_vectors(array, path))
    if array.dtype not in (np.uint8, np.bool_):
        raise InputRefused(
            f"{path}: values of type {array.dtype}; images are uint8 (levels 0..255) or bool, "
            "vectors are float: convert with .astype"
        )
    top = levels or 256
    if not 2 <= top <= 256 or (array.size and int(array.max()) >= top):
        raise InputRefused(
            f"{path}: values up to {int(array.max())} do not fit {top} levels; levels is at least "
            "the highest value plus 1, between 2 and 256"
        )
    return Rows(_planar(array, path, layout).astype(np.uint8, copy=False))


def _vectors(array: np.ndarray, path: Path) -> np.ndarray:
    if array.ndim != 2 or 0 in array.shape:
        raise InputRefused(
            f"{path}: float values of shape {array.shape}; vectors are (N, D): reshape them, or "
            "save images as uint8"
        )
    # Adding 0 makes -0 equal to 0, so that equal rows have equal bytes.
    values = array.astype("<f8") + 0.0
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise InputRefused(
            f"{path}: {len(bad)} value(s) are NaN or infinite, the first in row {row}, column "
            f"{column}; remove those rows"
        )
    return values


def _planar(array: np.ndarray, path: Path, layout: str | None) -> np.ndarray:
    """(n, C, H, W)."""
    layout = layout or _guess(array, path)
    if layout not in LAYOUTS or len(layout) != array.ndim or 0 in array.shape:
        raise InputRefused(
            f"{path}: shape {array.shape} is not the layout {layout}; give one of "
            f"{', '.join(LAYOUTS)} that fits"
        )
    if layout == "NHW":
        return array[:, None]
    return array if layout == "NCHW" else np.moveaxis(array, 3, 1)


def _guess(array: np.ndarray, path: Path) -> str:
    if array.ndim == 3:
        return "NHW"
    last, first = (array.ndim == 4 and array.shape[axis] in (1, 3) for axis in (-1, 1))
    if last == first:
        raise InputRefused(
            f"{path}: shape {array.shape} does not tell where the channels are; give the layout, "
            f"one of {', '.join(LAYOUTS)}, or reshape"
        )
    return "NHWC" if last else "NCHW"
