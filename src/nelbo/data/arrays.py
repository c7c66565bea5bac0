"""NumPy arrays from .npy and .npz files: uint8 images, or real vectors.

Arrays that fit are read into memory; larger ones stay in their file, from which the rows of a
batch are read. Which of the two it is changes neither the split nor the batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nelbo.data.base import Dataset
from nelbo.data.files import LIMIT, Cache, existing_file, in_memory
from nelbo.data.mapped import Mapped, Reading
from nelbo.data.npy import Place, places, values
from nelbo.data.provenance import Provenance
from nelbo.data.splits import Rows, by_content, by_part, fractions
from nelbo.errors import InputRefused

LAYOUTS = ("NHW", "NHWC", "NCHW")


def arrays(
    path: str | Path,
    *,
    key: str | None = None,
    levels: int | None = None,
    layout: str | None = None,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.05,
    limit: int = LIMIT,
    cache: Cache = "auto",
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
        limit: most bytes that an array in memory may take.
        cache: hold the values in memory (ram), read rows when asked for (none), or what fits.

    Raises:
        InputRefused: objects, a damaged or overlarge file, a type or shape that is neither images
            nor vectors, NaN or infinite values, constant data, too few examples.
    """
    path = existing_file(path)
    found = places(path, key)
    dtype, shape = found["train"].dtype, found["train"].shape
    vectors = dtype.kind == "f" and levels is None
    depth = None if vectors else levels or (2 if dtype.kind == "b" else 256)
    meaning: Reading = Vectors(path) if vectors else Levels(path, levels or 256, layout)
    kept = _in_memory(found, cache, limit)
    rows = {part: _rows(place, meaning, kept, limit) for part, place in found.items()}
    origin = Provenance("arrays", path, levels=None if dtype.kind == "f" else depth)
    total = shape[0] if shape else 0
    if "test" not in rows:
        held, count = fractions(total, str(path), test_fraction, validation_fraction)
        return by_content(rows["train"], origin, test=held, validation=count)
    (count,) = fractions(total, str(path), validation_fraction)
    validation = rows.get("validation", count)
    return by_part(rows["train"], rows["test"], origin, validation=validation)


def _in_memory(found: dict[str, Place], cache: Cache, limit: int) -> bool:
    """Whether the arrays are read into memory, where all are or none is."""
    first = next(iter(found.values()))
    whole = [place for place in found.values() if not place.readable]
    if whole and cache == "none":
        raise InputRefused(
            f"{whole[0].label}: is compressed or stored column by column, so that its rows cannot "
            "be read by themselves; save it with numpy.save or numpy.savez, or take --cache ram"
        )
    if whole or cache == "ram":
        return True
    # vectors become float64
    size = sum(
        p.size * 8 // p.dtype.itemsize if p.dtype.kind == "f" else p.size for p in found.values()
    )
    return in_memory(size, cache, limit, first.label)


def _rows(place: Place, meaning: Reading, kept: bool, limit: int) -> Rows:
    meaning.refuse_shape(place)
    if not kept:
        lazy = Mapped(place, meaning)
        return Rows(lazy, sums=lazy.survey())
    array = values(place, limit)
    meaning.check(array, 0)
    return Rows(meaning.arrange(array))


@dataclass(frozen=True)
class Levels(Reading):
    """Images.

    Arguments:
        path: the file. top: number of levels. layout: see `arrays`.
    """

    path: Path
    top: int
    layout: str | None

    def refuse_shape(self, place: Place) -> None:
        """Refuse a type or a shape, (N, ...), that images have not."""
        if place.dtype not in (np.uint8, np.bool_):
            raise InputRefused(
                f"{self.path}: values of type {place.dtype}; images are uint8 (levels 0..255) or "
                "bool, vectors are float: convert with .astype"
            )
        self._known(place.shape)

    def check(self, array: np.ndarray, start: int) -> None:
        """Refuse rows, the first of them number `start`, that are NaN or infinite."""
        if not 2 <= self.top <= 256 or (array.size and int(array.max()) >= self.top):
            raise InputRefused(
                f"{self.path}: values up to {int(array.max())} do not fit {self.top} levels; "
                "levels is at least the highest value plus 1, between 2 and 256"
            )

    def arrange(self, array: np.ndarray) -> np.ndarray:
        """(b, C, H, W)."""
        levels = array.astype(np.uint8, copy=False)
        layout = self._known(array.shape)
        if layout == "NHW":
            return levels[:, None]
        return levels if layout == "NCHW" else np.moveaxis(levels, 3, 1)

    def words(self) -> list[Any]:
        return ["levels", self.top, self.layout]

    def _known(self, shape: tuple[int, ...]) -> str:
        layout = self.layout or _guess(shape, self.path)
        if layout not in LAYOUTS or len(layout) != len(shape) or 0 in shape:
            raise InputRefused(
                f"{self.path}: shape {shape} is not the layout {layout}; give one of "
                f"{', '.join(LAYOUTS)} that fits"
            )
        return layout


@dataclass(frozen=True)
class Vectors(Reading):
    """Real vectors, (n, D).

    Arguments:
        path: the file.
    """

    path: Path

    def refuse_shape(self, place: Place) -> None:
        if len(place.shape) != 2 or 0 in place.shape:
            raise InputRefused(
                f"{self.path}: float values of shape {place.shape}; vectors are (N, D): reshape "
                "them, or save images as uint8"
            )

    def check(self, array: np.ndarray, start: int) -> None:
        bad = np.argwhere(~np.isfinite(array.astype("<f8", copy=False)))
        if len(bad):
            row, column = bad[0]
            raise InputRefused(
                f"{self.path}: {len(bad)} value(s) are NaN or infinite, the first in row "
                f"{start + row}, column {column}; remove those rows"
            )

    def arrange(self, array: np.ndarray) -> np.ndarray:
        """(b, D); adding 0 makes -0 equal to 0, so that equal rows have equal bytes."""
        values: np.ndarray = array.astype("<f8") + 0.0
        return values

    def words(self) -> list[Any]:
        return ["vectors"]


def _guess(shape: tuple[int, ...], path: Path) -> str:
    if len(shape) == 3:
        return "NHW"
    last, first = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (-1, 1))
    if last == first:
        raise InputRefused(
            f"{path}: shape {shape} does not tell where the channels are; give the layout, "
            f"one of {', '.join(LAYOUTS)}, or reshape"
        )
    return "NHWC" if last else "NCHW"
