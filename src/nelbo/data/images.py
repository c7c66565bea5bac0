"""A folder of images: PNG, JPEG, WebP, BMP and TIFF, grey or colour, 8 bits per channel.

The split goes by the SHA-256 of the files, since decoders differ between versions; images that
decode to the same pixels stay together. What was done to the pixels is counted in the record.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nelbo.data.base import Dataset
from nelbo.data.decoding import PILLOW, Reader
from nelbo.data.files import LIMIT, Cache, existing_folder, in_memory
from nelbo.data.folder import Folder, listing
from nelbo.data.index import Index, recalled, remember
from nelbo.data.provenance import Provenance
from nelbo.data.splits import Rows, by_content, fractions
from nelbo.data.sums import packed
from nelbo.data.survey import Files, Survey, planar, survey
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
    cache: Cache = "auto",
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
        cache: hold the pixels in memory (ram), decode when asked for (none), or what fits.

    Raises:
        InputRefused: no images, an unreadable, truncated, 16-bit or overlarge one, different sizes
            without `size`, constant data, too few examples.
    """
    if channels not in (None, 1, 3):
        raise InputRefused(f"channels {channels}: give 1 (grey) or 3 (RGB), or leave it out")
    files = listing(existing_folder(path), SUFFIXES)
    reader = Reader(_pair(size), channels, reduce_16bit, pixel_limit)
    sizes = (test_fraction, validation_fraction)
    return collection(files, reader, sizes, skip_bad=skip_bad, limit=limit, cache=cache)


def collection(
    files: Files,
    reader: Reader,
    sizes: tuple[float, float],
    *,
    skip_bad: int = 0,
    limit: int = LIMIT,
    cache: Cache = "auto",
) -> Dataset:
    """Encoded images, wherever they lie; see `images`.

    Arguments:
        sizes: fractions of the test and the validation part.
    """
    source = str(files.folder)

    def keep(shape: tuple[int, ...]) -> bool:
        size = len(files) * math.prod(shape)
        return in_memory(size, cache, limit, f"{source} ({len(files)} images)")

    key = _key(files, reader, skip_bad)
    known = None if cache == "ram" else recalled(key, partial(_same, files, reader))
    if known is None or keep(tuple(known.about["shape"])):
        found = survey(reader, files, skip_bad, lambda first: keep(first.pixels.shape))
        known = _index(found, reader)
        rows = _rows(found, known, files, reader)
        if found.pixels is None:
            remember(key, known)
    else:
        rows = _lazy(known, files, reader)
    about = known.about
    origin = Provenance(
        files.folder.resolve().name,
        files.folder,
        levels=256,
        conversions=about["conversions"],
        skipped=about["skipped"],
        warnings=_warnings(about, files.ignored),
    )
    test, validation = fractions(len(known.sums), source, *sizes)
    return by_content(rows, origin, test=test, validation=validation)


def _key(files: Files, reader: Reader, skip_bad: int) -> dict[str, Any]:
    """What tells one reading of one folder from another; decoders differ between versions."""
    how = [reader.size, reader.channels, reader.reduce_16bit, reader.pixel_limit, skip_bad]
    path = str(files.folder.resolve())
    return {"kind": "folder", "path": path, "files": files.state, "how": how, "pillow": PILLOW}


def _index(found: Survey, reader: Reader) -> Index:
    """What the record and a later reading need; grey ones are repeated if others have colour."""
    channels = 1 if all(found.grey) else 3
    repeated = sum(found.grey) if channels == 3 else 0
    conversions = dict(reader.conversions)
    if repeated:
        conversions["grey to RGB"] = conversions.get("grey to RGB", 0) + repeated
    about = {
        "shape": [channels, *(found.shape or (1, 1))],
        "conversions": conversions,
        "skipped": found.skipped,
        "colourless": channels == 3 and found.colourless,
    }
    sums = packed([sums[channels == 3] for sums in found.sums])
    more = {
        "keys": packed(found.keys),
        "kept": np.array(found.kept, np.int64),
        "plain": np.array(found.plain, bool),
    }
    return Index(sums, about, more)


def _rows(found: Survey, known: Index, files: Files, reader: Reader) -> Rows:
    if found.pixels is None:
        return _lazy(known, files, reader)
    values = np.empty((len(found.pixels), *known.about["shape"]), np.uint8)
    for i in range(len(found.pixels)):
        values[i] = planar(found.pixels[i], values.shape[1])
        found.pixels[i] = np.empty(0)
    return Rows(values, keys=known.more["keys"], sums=known.sums)


def _lazy(known: Index, files: Files, reader: Reader) -> Rows:
    folder = _folder(files, reader, known)
    return Rows(folder, keys=known.more["keys"], sums=known.sums)


def _folder(files: Files, reader: Reader, known: Index) -> Folder:
    kept, keys, plain = (known.more[name] for name in ("kept", "keys", "plain"))
    channels, height, width = known.about["shape"]
    return Folder(files, kept, keys, plain, (channels, height, width), reader)


def _same(files: Files, reader: Reader, known: Index, rows: np.ndarray) -> bool:
    return _folder(files, reader, known).same(rows)


def _warnings(about: dict[str, Any], ignored: int) -> list[str]:
    conversions, skipped = about["conversions"], about["skipped"]
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
    if about["colourless"]:
        notes.append("all images are grey, yet stored in three channels: channels=1 would do")
    return notes


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else size
    if min(pair) < 1:
        raise InputRefused(f"size {size}: give a positive side, or height and width")
    return pair
