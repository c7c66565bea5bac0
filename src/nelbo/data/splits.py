"""Cutting a data set into training, validation and test parts by what the examples are.

Examples are put in the order of the SHA-256 of their bytes: the first go to the test part, the
next to the validation part, the rest is trained on. The parts so depend on nothing but the data:
not on file names, the order of the files, the machine or a seed. Equal examples stand next to each
other in that order and a cut never falls between them, so no example is both trained and tested
on. A set that comes with its own test part keeps it, and training examples that also occur there
are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nelbo.data.base import Dataset
from nelbo.data.part import Lazy, taken
from nelbo.data.provenance import Provenance
from nelbo.data.statistics import note_levels, scaling
from nelbo.data.sums import packed, sums_of
from nelbo.errors import InputRefused

LEAST = 2
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Rows:
    """Examples as read.

    Arguments:
        values: (n, C, H, W) uint8 levels or (n, D) float64; in memory, or read when asked for.
        labels: (n,) integers, where known.
        keys: n sort keys, when the examples' own bytes are not to decide: the decoding of an image
            may differ between library versions, its file does not.
        sums: (n,) S32, the SHA-256 of each example's bytes, where it is known already.
    """

    values: np.ndarray | Lazy
    labels: np.ndarray | None = None
    keys: Sequence[bytes] | np.ndarray | None = None
    sums: np.ndarray | None = None

    def own(self) -> np.ndarray:
        """(n,) S32: the SHA-256 of each example's bytes."""
        if self.sums is not None:
            return self.sums
        assert isinstance(self.values, np.ndarray)
        return sums_of(self.values)


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
    own = rows.own()
    _refuse_constant(own, origin)
    group = own if rows.keys is None else _groups(own, packed(rows.keys))
    order = np.argsort(group, kind="stable")
    first = _cut(order, group, test)
    second = _cut(order, group, first + validation) if validation else first
    parts = {"train": order[second:], "validation": order[first:second], "test": order[:first]}
    key = "the example's bytes" if rows.keys is None else "the file"
    rule = f"order of the SHA-256 of {key}: first test, then validation, then training"
    return _assemble(
        origin,
        {part: taken(rows.values, index) for part, index in parts.items()},
        {part: _labels(rows, index) for part, index in parts.items()},
        parts,
        rule,
        {part: own[index] for part, index in parts.items()},
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
    own = {part: rows.own() for part, rows in {"train": train, **held}.items()}
    _refuse_constant(own["train"], origin)
    rest = _without_copies(own, origin)
    order = rest[np.argsort(own["train"][rest], kind="stable")]
    count = 0 if isinstance(validation, Rows) else _cut(order, own["train"], validation)
    index = {"train": np.sort(order[count:]), "validation": order[:count]}
    index["test"] = np.arange(len(test.values))
    source = {"train": train, "validation": train, "test": test}
    rule = "the set's own test part; validation: first of training by the SHA-256 of the bytes"
    if given is not None:
        index["validation"], source["validation"] = np.arange(len(given.values)), given
        rule = "the set's own training, validation and test parts"
    return _assemble(
        origin,
        {part: taken(source[part].values, index[part]) for part in PARTS},
        {part: _labels(source[part], index[part]) for part in PARTS},
        index,
        rule,
        {part: own[part if part in own else "train"][index[part]] for part in PARTS},
        np.concatenate(list(own.values())),
    )


def _groups(own: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """For each example the least key among its copies, so that copies sort together."""
    kinds, kind = np.unique(own, return_inverse=True)
    least = np.empty(len(kinds), "S32")
    falling = np.argsort(keys, kind="stable")[::-1]
    least[kind[falling]] = keys[falling]  # of equal places the last, and so the least, stays
    return least[kind]


def _cut(order: np.ndarray, group: np.ndarray, at: int) -> int:
    """The first place from `at` on where a cut does not separate copies."""
    while 0 < at < len(order) and group[order[at - 1]] == group[order[at]]:
        at += 1
    return min(at, len(order))


def _without_copies(own: dict[str, np.ndarray], origin: Provenance) -> np.ndarray:
    """Training examples that occur in no other part."""
    held = np.concatenate([sums for part, sums in own.items() if part != "train"])
    rest = np.flatnonzero(~np.isin(own["train"], held))
    if dropped := len(own["train"]) - len(rest):
        origin.conversions["training examples dropped: they occur in the held-out parts"] = dropped
    return rest


def _labels(rows: Rows, index: np.ndarray) -> Tensor | None:
    if rows.labels is None:
        return None
    return torch.from_numpy(rows.labels[index].astype(np.int64))


def _assemble(
    origin: Provenance,
    parts: dict[str, Tensor | Lazy],
    labels: dict[str, Tensor | None],
    rows: dict[str, np.ndarray],
    rule: str,
    ordered: dict[str, np.ndarray],
    sums: np.ndarray,
) -> Dataset:
    for part in ("train", "test"):
        if len(parts[part]) < LEAST:
            raise InputRefused(
                f"{origin.source}: {len(parts[part])} examples are left for the {part} part, at "
                f"least {LEAST} are needed; add examples that are not copies, or change the split"
            )
    known = {part: label for part, label in labels.items() if label is not None}
    shift, scale = scaling(parts["train"], origin, rows["train"])
    note_levels(parts["train"], origin)
    return Dataset(
        name=origin.name,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        levels=origin.levels,
        shift=shift,
        scale=scale,
        record=origin.record(parts, rule, sums, ordered=ordered),
        labels=known if len(known) == len(PARTS) else None,
        rows={part: torch.tensor(index, dtype=torch.int64) for part, index in rows.items()},
    )


def _refuse_constant(own: np.ndarray, origin: Provenance) -> None:
    if len(own) > 1 and bool((own == own[0]).all()):
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
