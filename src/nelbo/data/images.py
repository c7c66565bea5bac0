"""A folder of images: PNG, JPEG, WebP, BMP and TIFF, grey or colour, 8 bits per channel.

The split goes by the SHA-256 of the files, since decoders differ between versions; images that
decode to the same pixels stay together. What was done to the pixels is counted in the record.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from nelbo.data.base import Dataset
from nelbo.data.decoding import Reader
from nelbo.data.files import LIMIT, existing_folder, refuse_above
from nelbo.data.provenance import Provenance
from nelbo.data.splits import Rows, by_content, fractions
from nelbo.errors import InputRefused

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
PIXEL_LIMIT = 2**26


def images(
    path: str | Path,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    test_fraction: float = 0.1,
    *,
    validation_fraction: float = 0.05,
    skip_bad: int = 0,
    reduce_16bit: bool = False,
    pixel_limit: int = PIXEL_LIMIT,
    limit: int = LIMIT,
) -> Dataset:
    """A folder of images, subfolders included, 256 levels, (C, H, W).

    Arguments:
        path: the folder; files with other suffixes and hidden files are left alone.
        size: side or (height, width) to crop (centred) and resize to; needed if sizes differ.
        channels: 1 or 3; by default 1 if all images are grey, else 3.
        test_fraction, validation_fraction: sizes of the parts that are split off.
        skip_bad: number of files that may be bad; they are listed in the record.
        reduce_16bit: reduce 16 bits per channel to their upper 8 instead of refusing.
        pixel_limit: most pixels that one file may declare.
        limit: most bytes that all images may take in memory.

    Raises:
        InputRefused: no images, an unreadable, truncated, 16-bit or overlarge one, different sizes
            without `size`, constant data, too few examples.
    """
    if channels not in (None, 1, 3):
        raise InputRefused(f"channels {channels}: give 1 (grey) or 3 (RGB), or leave it out")
    folder = existing_folder(path)
    paths, ignored = _listing(folder)
    reader = Reader(_pair(size), channels, reduce_16bit, pixel_limit)
    arrays, keys, skipped = _read_all(reader, folder, paths, skip_bad, limit)
    values = _stacked(arrays, reader.conversions)
    origin = Provenance(
        folder.resolve().name,
        folder,
        levels=256,
        conversions=reader.conversions,
        skipped=skipped,
        warnings=_warnings(values, reader.conversions, skipped, ignored),
    )
    test, validation = fractions(len(values), str(folder), test_fraction, validation_fraction)
    return by_content(Rows(values, keys=keys), origin, test=test, validation=validation)


def _listing(folder: Path) -> tuple[list[Path], int]:
    """Image files in a fixed order, and the number of other visible files."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        # A link to a folder above would be walked for ever.
        folders[:] = [] if real in seen else [name for name in folders if name[0] != "."]
        if real not in seen:
            found += [Path(place) / name for name in names if name[0] != "."]
        seen.add(real)
    paths = sorted(path for path in found if path.suffix.lower() in SUFFIXES)
    if not paths:
        other = f" among {len(found)} file(s)" if found else ""
        raise InputRefused(
            f"{folder}: holds no images{other}; put files of these kinds there: "
            f"{', '.join(sorted(SUFFIXES))}"
        )
    return paths, len(found) - len(paths)


def _read_all(
    reader: Reader, folder: Path, paths: list[Path], skip_bad: int, limit: int
) -> tuple[list[np.ndarray], list[bytes], list[str]]:
    arrays: list[np.ndarray] = []
    keys: list[bytes] = []
    skipped: list[str] = []
    first = paths[0]
    for path in paths:
        try:
            pixels, key = reader.read(path)
        except InputRefused:
            if len(skipped) >= skip_bad:
                raise
            skipped.append(str(path.relative_to(folder)))
            continue
        if not arrays:
            refuse_above(limit, pixels.nbytes * len(paths), f"{folder} ({len(paths)} images)")
            first = path
        elif pixels.shape[:2] != arrays[0].shape[:2]:
            raise InputRefused(
                f"{path}: is {_across(pixels)}, but {first} is {_across(arrays[0])}; give a size "
                "to crop and resize all to (--size)"
            )
        arrays.append(pixels)
        keys.append(key)
    return arrays, keys, skipped


def _stacked(arrays: list[np.ndarray], conversions: dict[str, int]) -> np.ndarray:
    """(n, C, H, W): grey if all are, else grey repeated in three channels; empties the list."""
    if not arrays:
        return np.empty((0, 1, 1, 1), np.uint8)
    channels = 3 if any(array.ndim == 3 for array in arrays) else 1
    values = np.empty((len(arrays), channels, *arrays[0].shape[:2]), np.uint8)
    grey = sum(array.ndim == 2 for array in arrays)
    if channels == 3 and grey:
        conversions["grey to RGB"] = conversions.get("grey to RGB", 0) + grey
    for i in range(len(arrays)):
        values[i] = arrays[i] if arrays[i].ndim == 2 else np.moveaxis(arrays[i], 2, 0)
        arrays[i] = np.empty(0)
    return values


def _warnings(
    values: np.ndarray, conversions: dict[str, int], skipped: list[str], ignored: int
) -> list[str]:
    changed = (
        "transparency flattened on black",
        "transparent colour ignored",
        "enlarged",
        "first of several frames",
    )
    notes = [f"{conversions[step]} image(s): {step}" for step in changed if step in conversions]
    if skipped:
        notes.append(f"{len(skipped)} bad file(s) skipped: {', '.join(skipped)}")
    if ignored:
        notes.append(f"{ignored} file(s) with other suffixes left alone")
    if values.shape[1] == 3 and all(bool((image == image[:1]).all()) for image in values):
        notes.append("all images are grey, yet stored in three channels: channels=1 would do")
    return notes


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else size
    if min(pair) < 1:
        raise InputRefused(f"size {size}: give a positive side, or height and width")
    return pair


def _across(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]} pixels"
