"""Data that nothing which is compared was trained on or chosen by.

Data of a known law are drawn anew; the data of a run are its test part, and its other parts may
train classifiers only; anything else is taken to be unseen, and said to be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nelbo.commands import Compare
from nelbo.data import toys
from nelbo.data.base import Dataset
from nelbo.data.embedded import digits
from nelbo.data.sums import digests
from nelbo.errors import InputRefused, UsageError
from nelbo.randomness import generator
from nelbo.walks.opponents import OWN, Opponent, read

BUILT_IN: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "swissroll": toys.swissroll,
    "ring": lambda: toys.ring(std=0.01),
    "grid": toys.grid25,
    "gaussian": lambda: toys.correlated(**toys.PLANE),
}


@dataclass(frozen=True)
class Reals:
    """Data, and what of it may be used for what.

    Arguments:
        rows: held out from training and choice of everything that is compared.
        fit: more of the same, on which only classifiers are trained; None: no more.
        what: in words.
    """

    name: str
    dataset: Dataset
    rows: Tensor
    fit: Tensor | None
    what: str


def reals(options: Compare, against: list[Opponent]) -> Reals:
    """The data of `--real`, held out from everything that is compared.

    Raises:
        InputRefused: the data do not fit what is compared. UsageError: `data` without a run.
    """
    datasets = [one.data for one in against if one.data is not None]
    if options.real == OWN:
        if not datasets:
            raise UsageError("data means the data of a run, and no run is compared: give a path")
        dataset, own = datasets[0], True
    else:
        dataset = _named(options)
        own = any(_same(dataset, other) for other in datasets)
        dataset = next((other for other in datasets if _same(dataset, other)), dataset)
    for other in datasets:
        _check(dataset, other)
    truth = dataset.truth
    if truth is not None and truth.components is not None:
        return _fresh(options, dataset)
    if not own:
        rows = dataset.all
        unseen = ", taken to be unseen by the runs" if datasets else ""
        return Reals(dataset.name, dataset, rows, None, f"all {len(rows)} rows{unseen}")
    fit = torch.cat((dataset.train[:], dataset.validation[:]))
    test = dataset.test[:]
    return Reals(dataset.name, dataset, test, fit, f"test part, {len(test)} rows")


def _named(options: Compare) -> Dataset:
    if options.real in BUILT_IN:  # a folder of that name is ./digits
        return BUILT_IN[options.real]()
    if (Path(options.real) / "recipe.json").is_file():
        raise UsageError(f"{options.real} is a run: for its data type the word data instead")
    if not Path(options.real).exists():
        known = ", ".join(BUILT_IN)
        raise UsageError(
            f"{options.real}: no such file or folder; give one, the word data (a run's own), or "
            f"one of {known}"
        )
    found = read(Path(options.real), options.size)
    return dataclasses.replace(found, name=Path(options.real).resolve().stem)


def _fresh(options: Compare, dataset: Dataset) -> Reals:
    """New draws from a known law: no run can have seen them."""
    assert dataset.truth is not None and dataset.truth.components is not None
    count = round((options.n or FRESH) / HELD)
    rng = generator(options.seed, "compare", dataset.name)
    rows = dataset.truth.components.sample(count, rng)
    return Reals(dataset.name, dataset, rows, None, f"{count} fresh draws of the known law")


FRESH = 5000
"""Pairs of the certificate where data cost nothing."""
HELD = 0.45
"""Share of the reals that the certificate holds out."""


def _same(one: Dataset, other: Dataset) -> bool:
    return one.record.get("sha256") == other.record.get("sha256")


def _check(dataset: Dataset, other: Dataset) -> None:
    """Refuse samples of another kind than the data."""
    if dataset.shape() != other.shape() or dataset.levels != other.levels:
        raise InputRefused(
            f"{dataset.name} holds {_kind(dataset)}, the run makes {_kind(other)}: compare it "
            "with data of its own kind (the word data takes the run's own)"
        )


def _kind(dataset: Dataset) -> str:
    shape = "x".join(map(str, dataset.shape()))
    return f"{shape} {'real vectors' if dataset.levels is None else f'{dataset.levels} levels'}"


def copies(held: Reals, rows: Tensor | None) -> dict[str, int]:
    """Samples of a certificate that are, to the bit, rows of the data."""
    assert rows is not None, "a certificate that was made here, not read"
    known = [held.rows] if held.fit is None else [held.rows, held.fit]
    marks = {mark for some in known for mark in digests(some.numpy())}
    found = sum(mark in marks for mark in digests(rows.to(held.rows.dtype).numpy()))
    return {"of": len(rows), "found": found}
