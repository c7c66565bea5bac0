"""Cutting a data set into training, validation and test parts by what the examples are.

Examples are put in the order of the SHA-256 of their bytes: the first go to the test part, the
next to the validation part, the rest is trained on. The parts so depend on nothing but the data:
not on file names, the order of the files, the machine or a seed. Equal examples stand next to each
other in that order and a cut never falls between them, so no example is both trained and tested
on. A set that comes with its own test part keeps it, and training examples that also occur there
are dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nelbo.data.base import Dataset
from nelbo.data.provenance import Provenance
from nelbo.errors import InputRefused

LEAST = 2
FEW_LEVELS = 128
LATTICE_ROWS = 4096
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Rows:
    """Examples as read.

    Arguments:
        values: (n, C, H, W) uint8 levels or (n, D) float64.
        labels: (n,) integers, where known.
        keys: n sort keys, when the examples' own bytes are not to decide: the decoding of an image
            may differ between library versions, its file does not.
    """

    values: np.ndarray
    labels: np.ndarray | None = None
    keys: list[bytes] | None = None


def digests(values: np.ndarray) -> list[bytes]:
    """SHA-256 of each example's bytes, little-endian and in C order."""
    plain = np.ascontiguousarray(values)
    return [hashlib.sha256(row.tobytes()).digest() for row in plain]


def fractions(total: int, source: str, *wanted: float) -> list[int]:
    """Sizes of the parts split off: round(fraction * total), at least two unless a fraction is 0.

    Raises:
        InputRefused: the fractions leave nothing to train on, or there are too few examples.
    """
    if not all(0 <= fraction < 1 for fraction in wanted) or sum(wanted) >= 1:
        raise InputRefused(
            f"fractions {', '.join(map(str, wanted))}: give numbers from 0 to 1 that leave "
            "something to train on"
        )
    sizes = [max(LEAST, round(fraction * total)) if fraction else 0 for fraction in wanted]
    if total - sum(sizes) < LEAST:
        raise InputRefused(
            f"{source}: {total} example(s) are too few to be split into training, validation and "
            f"test parts of at least {LEAST}; add examples"
        )
    return sizes


def by_content(rows: Rows, origin: Provenance, *, test: int, validation: int) -> Dataset:
    """Split by the order of the SHA-256 sums; see the module.

    Arguments:
        rows: all examples.
        origin: what the record says of them.
        test, validation: sizes; a part grows where its last example has copies.

    Raises:
        InputRefused: constant data, or a part of fewer than two examples.
    """
    own = digests(rows.values)
    _refuse_constant(own, origin)
    group = _groups(own, rows.keys or own)
    order = sorted(range(len(own)), key=group.__getitem__)
    first = _cut(order, group, test)
    second = _cut(order, group, first + validation) if validation else first
    parts = {"train": order[second:], "validation": order[first:second], "test": order[:first]}
    key = "the file" if rows.keys else "the example's bytes"
    rule = f"order of the SHA-256 of {key}: first test, then validation, then training"
    return _assemble(
        origin,
        {part: rows.values[index] for part, index in parts.items()},
        {part: _labels(rows, index) for part, index in parts.items()},
        parts,
        rule,
        own,
    )


def by_part(
    train: Rows,
    test: Rows,
    origin: Provenance,
    *,
    validation: int | Rows,
) -> Dataset:
    """Keep the set's own test part; cut the validation part from training by content.

    Arguments:
        train, test: the set's own parts.
        origin: what the record says of them.
        validation: a size, or the set's own validation part.

    Raises:
        InputRefused: constant data, parts of different shape, or fewer than two examples in one.
    """
    given = validation if isinstance(validation, Rows) else None
    held = {"test": test} if given is None else {"test": test, "validation": given}
    _refuse_other_shapes(train, held, origin)
    own = {part: digests(rows.values) for part, rows in {"train": train, **held}.items()}
    _refuse_constant(own["train"], origin)
    rest = _without_copies(own, origin)
    order = sorted(rest, key=own["train"].__getitem__)
    count = 0 if isinstance(validation, Rows) else _cut(order, own["train"], validation)
    taken, kept = order[:count], sorted(order[count:])
    index = {"train": kept, "validation": taken, "test": list(range(len(test.values)))}
    source = {"train": train, "validation": train, "test": test}
    rule = "the set's own test part; validation: first of training by the SHA-256 of the bytes"
    if given is not None:
        index["validation"], source["validation"] = list(range(len(given.values))), given
        rule = "the set's own training, validation and test parts"
    return _assemble(
        origin,
        {part: source[part].values[index[part]] for part in PARTS},
        {part: _labels(source[part], index[part]) for part in PARTS},
        index,
        rule,
        [digest for part in own.values() for digest in part],
    )


def _groups(own: list[bytes], keys: Sequence[bytes]) -> list[bytes]:
    """For each example the least key among its copies, so that copies sort together."""
    least: dict[bytes, bytes] = {}
    for digest, key in zip(own, keys, strict=True):
        least[digest] = min(key, least.get(digest, key))
    return [least[digest] for digest in own]


def _cut(order: Sequence[int], group: Sequence[bytes], at: int) -> int:
    """The first place from `at` on where a cut does not separate copies."""
    while 0 < at < len(order) and group[order[at - 1]] == group[order[at]]:
        at += 1
    return min(at, len(order))


def _without_copies(own: dict[str, list[bytes]], origin: Provenance) -> list[int]:
    """Training examples that occur in no other part."""
    held = {digest for part, sums in own.items() if part != "train" for digest in sums}
    rest = [i for i, digest in enumerate(own["train"]) if digest not in held]
    if dropped := len(own["train"]) - len(rest):
        origin.conversions["training examples dropped: they occur in the held-out parts"] = dropped
    return rest


def _labels(rows: Rows, index: list[int]) -> Tensor | None:
    if rows.labels is None:
        return None
    return torch.from_numpy(rows.labels[index].astype(np.int64))


def _assemble(
    origin: Provenance,
    values: dict[str, np.ndarray],
    labels: dict[str, Tensor | None],
    rows: dict[str, list[int]],
    rule: str,
    sums: list[bytes],
) -> Dataset:
    for part in ("train", "test"):
        if len(values[part]) < LEAST:
            raise InputRefused(
                f"{origin.source}: {len(values[part])} examples are left for the {part} part, at "
                f"least {LEAST} are needed; add examples that are not copies, or change the split"
            )
    known = {part: label for part, label in labels.items() if label is not None}
    parts = {part: torch.from_numpy(np.ascontiguousarray(values[part])) for part in PARTS}
    shift, scale = _scaling(parts["train"], origin)
    _note_levels(parts["train"], origin)
    return Dataset(
        name=origin.name,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        levels=origin.levels,
        shift=shift,
        scale=scale,
        record=origin.record(parts, rule, sums),
        labels=known if len(known) == len(PARTS) else None,
        rows={part: torch.tensor(index, dtype=torch.int64) for part, index in rows.items()},
    )


def _scaling(train: Tensor, origin: Provenance) -> tuple[Tensor, float | Tensor]:
    """Mean and standard deviation of each dimension of training vectors; 0 and 1 for images."""
    if origin.levels is not None:
        return torch.zeros((), dtype=torch.float64), 1.0
    shift, scale = train.mean(0), train.std(0, correction=0)
    bad = torch.nonzero(~(torch.isfinite(scale) & (scale > 1e-12 * shift.abs()))).flatten()
    if len(bad):
        raise InputRefused(
            f"{origin.source}: column(s) {_few(bad.tolist())} are constant (or beyond the range "
            "of float64) in the training part, so they have no density; remove them"
        )
    return shift, scale


def _note_levels(train: Tensor, origin: Provenance) -> None:
    """Warn where the figure in bits/dim would mislead: few levels in use, or a lattice."""
    if origin.levels is None:
        some = train[:LATTICE_ROWS].numpy()
        few = [d for d in range(some.shape[1]) if 2 * len(np.unique(some[:, d])) < len(some)]
        if few:
            origin.warnings.append(
                f"column(s) {_few(few)} repeat their values: a density can grow without limit on "
                "such data, and the bound says little"
            )
        return
    seen = np.zeros(origin.levels, bool)
    for rows in torch.split(train, LATTICE_ROWS):
        seen[rows.numpy()] = True
    used = int(seen.sum())
    if used <= FEW_LEVELS < origin.levels:
        origin.warnings.append(
            f"only {used} of {origin.levels} levels occur: bits/dim are not comparable with those "
            "of images that use them all"
        )


def _refuse_constant(own: list[bytes], origin: Provenance) -> None:
    if len(set(own)) == 1 and len(own) > 1:
        raise InputRefused(
            f"{origin.source}: all {len(own)} examples are the same (constant data); there is "
            "nothing to learn from them"
        )


def _refuse_other_shapes(train: Rows, held: dict[str, Rows], origin: Provenance) -> None:
    for part, rows in held.items():
        if rows.values.shape[1:] != train.values.shape[1:]:
            raise InputRefused(
                f"{origin.source}: training examples have shape {train.values.shape[1:]}, those "
                f"of the {part} part {rows.values.shape[1:]}; give both the same"
            )


def _few(items: Sequence[int]) -> str:
    shown = ", ".join(map(str, items[:8]))
    return shown if len(items) <= 8 else f"{shown}, ... ({len(items)} in all)"
