"""Data from the user's disk, by what a path turns out to hold."""

from __future__ import annotations

from pathlib import Path

from nelbo.data.arrays import arrays
from nelbo.data.base import Dataset
from nelbo.data.cifar import cifar10, is_cifar10
from nelbo.data.embedded import digits
from nelbo.data.files import Cache, existing, existing_file, reading
from nelbo.data.idx import idx, is_idx, standard_file
from nelbo.data.images import SUFFIXES, images
from nelbo.data.npy import NPY, ZIP
from nelbo.data.parquet import is_parquet, parquet
from nelbo.errors import InputRefused

__all__ = ["arrays", "cifar10", "digits", "idx", "images", "open_path"]


def open_path(
    path: str | Path, *, size: int | tuple[int, int] | None = None, cache: Cache = "auto"
) -> Dataset:
    """The data at a path: CIFAR-10's or MNIST's folder, an IDX, .npy, .npz or
    .parquet file, or images.

    Arguments:
        path: a folder or a file.
        size: for a folder of images, as in `images`.
        cache: hold the data in memory (ram), read rows when asked for (none), or what fits.

    Raises:
        InputRefused: nothing known is there, or the reader of that kind refuses it.
    """
    path = existing(path)
    if is_parquet(path):
        side = (size, size) if isinstance(size, int) else size
        return parquet(path, size=side, cache=cache)
    if path.is_dir():
        if is_cifar10(path):
            return cifar10(path)
        known = any(standard_file(path, part, "images") for part in ("train", "t10k"))
        return idx(path) if known else images(path, size=size, cache=cache)
    with reading(existing_file(path)), path.open("rb") as file:
        start = file.read(6)
    if start == NPY or start[:2] == ZIP or path.suffix in (".npy", ".npz"):
        return arrays(path, cache=cache)
    if is_idx(path):
        return idx(path)
    raise InputRefused(
        f"{path}: is neither an .npy, .npz nor IDX file; give one of these, or a folder of images "
        f"({', '.join(sorted(SUFFIXES))})"
    )
