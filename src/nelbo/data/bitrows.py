"""Rows of zeros and ones from an .npy or .npz file, for Bernoulli diffusion.

Values 0 and 1 of any plain type are bits; anything else is refused by its place. Rows are taken as
independent draws, so that equal rows may be in several parts (in a small discrete space they must:
a test part of patterns that never occur in training would be other data). Rows are put in the
order of the SHA-256 of their bytes and of how many equal ones came before: the split depends on
the rows alone, not on their order. A file with test rows keeps them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nelbo.data.base import Dataset
from nelbo.data.files import LIMIT, existing_file
from nelbo.data.npy import load
from nelbo.data.provenance import Provenance
from nelbo.data.splits import fractions
from nelbo.data.sums import digests
from nelbo.errors import InputRefused


def bitrows(
    path: str | Path,
    *,
    key: str | None = None,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.05,
    limit: int = LIMIT,
) -> Dataset:
    """Bits (n, D) from an array N x D of zeros and ones (bool, integers or floats).

    Arguments:
        path: the file.
        key: name of the array in an .npz with several.
        test_fraction, validation_fraction: sizes of the parts that are split off.
        limit: most bytes that an array may declare.

    Raises:
        InputRefused: values other than 0 and 1, another shape, constant data, too few rows.
    """
    path = existing_file(path)
    found = {part: _rows(array, path) for part, array in load(path, key, limit).items()}
    if len({rows.shape[1] for rows in found.values()}) > 1:
        raise InputRefused(f"{path}: the parts have rows of different length; give all the same")
    train, total = found["train"], len(found["train"])
    if len(np.unique(train, axis=0)) < 2:
        raise InputRefused(
            f"{path}: all {total} training rows are the same (constant data); there is nothing to "
            "learn from them"
        )
    own = "test" in found
    held = 0.0 if own else test_fraction
    share = 0.0 if "validation" in found else validation_fraction
    test, validation = fractions(total, str(path), held, share)
    train = train[_order(train)]
    cut = {"train": train[test + validation :], "test": train[:test]}
    cut["validation"] = train[test : test + validation]
    parts = {
        p: cut[p] if p == "train" else found.get(p, cut[p])
        for p in ("train", "validation", "test")
    }
    if len(parts["test"]) < 2:
        raise InputRefused(f"{path}: the test part has fewer than two rows; add some")
    return _dataset(
        path, {part: torch.from_numpy(rows.copy()) for part, rows in parts.items()}, own
    )


def _dataset(path: Path, parts: dict[str, Tensor], own: bool) -> Dataset:
    origin = Provenance("bits", path, levels=2)
    sums = [digest for rows in parts.values() for digest in digests(rows.numpy())]
    rule = "order of the SHA-256 of a row's bytes and of the number of equal rows before it"
    record = origin.record(parts, f"the set's own test part; {rule}" if own else rule, sums)
    record["distinct rows"] = len(set(sums))
    return Dataset.of_levels("bits", parts, 2, record, binary=True)


def _rows(array: np.ndarray, path: Path) -> np.ndarray:
    """(n, D) uint8 zeros and ones."""
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "biuf":
        raise InputRefused(
            f"{path}: values of type {array.dtype} and shape {array.shape}; bits are an array "
            "(N, D) of zeros and ones: reshape and convert it"
        )
    bad = np.argwhere((array != 0) & (array != 1))
    if len(bad):
        row, column = bad[0]
        raise InputRefused(
            f"{path}: {len(bad)} value(s) are neither 0 nor 1, the first is "
            f"{array[row, column]} in row {row}, column {column}; bits are 0 and 1 only"
        )
    return array.astype(np.uint8)


def _order(rows: np.ndarray) -> list[int]:
    """Rows by the SHA-256 of their bytes and of the number of their like that came before."""
    seen: Counter[bytes] = Counter()
    keys = []
    for digest in digests(rows):
        keys.append(hashlib.sha256(digest + seen[digest].to_bytes(8, "big")).digest())
        seen[digest] += 1
    return sorted(range(len(keys)), key=keys.__getitem__)
