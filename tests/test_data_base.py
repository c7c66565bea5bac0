"""Scales, baselines, the embedded digits, and splits by content."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nelbo.data import toys
from nelbo.data.base import Dataset
from nelbo.data.embedded import digits
from nelbo.data.provenance import Provenance
from nelbo.data.splits import Rows, by_content, by_part, fractions
from nelbo.errors import InputRefused, NumericalFailure

# SHA-256 of the pixels as published, in order, and of the first 297 rows by their sums.
DIGITS = "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"
TEST_SUM = "7da51192de8ddcef1fd276775e20c26b2c76d1e7282b4a0586f2bea5f582e167"


def levels_data(train: list[int], test: list[int], levels: int) -> Dataset:
    """One-pixel images."""

    def part(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1)

    return Dataset(
        "t", part(train), part(test), part(test), levels, torch.zeros(()), 1.0, record={}
    )


def rows_of(data: Dataset) -> dict[str, set[bytes]]:
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: {row.numpy().tobytes() for row in part} for name, part in parts.items()}


def random_images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 2, 3), dtype=np.uint8)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_levels_round_trip_and_end_at_one(levels):
    data = levels_data([0], [0], levels)
    y = torch.arange(levels, dtype=torch.uint8)
    x = data.encode(y)
    assert x.dtype == torch.float32 and x[0] == -1 and x[-1] == 1
    torch.testing.assert_close(x.double(), 2 * y.double() / (levels - 1) - 1, rtol=0, atol=1e-7)
    assert torch.equal(data.decode(x), y)
    nudged = x + 0.9 / (levels - 1) * torch.where(torch.arange(levels) % 2 == 0, 1, -1)
    assert torch.equal(data.decode(nudged), y)


def test_decode_limits_samples_and_refuses_nan():
    data = levels_data([0], [0], 17)
    assert data.decode(torch.tensor([-9.0, 9.0])).tolist() == [0, 16]
    with pytest.raises(NumericalFailure, match="not|NaN"):
        data.decode(torch.tensor([math.nan]))


def test_histogram_baseline_by_hand():
    """Counts (2, 1, 0) of three levels: p = 3/6, 2/6, 1/6."""
    data = levels_data([0, 0, 1], [0, 1, 2], 3)
    expected = torch.tensor([3 / 6, 2 / 6, 1 / 6], dtype=torch.float64).log().neg()
    torch.testing.assert_close(data.histogram_baseline(), expected)
    assert data.uniform_baseline() == pytest.approx(math.log(3))


def test_histogram_keeps_dimensions_apart(monkeypatch):
    monkeypatch.setattr("nelbo.data.base.CHUNK", 2)
    train = torch.tensor([[0, 1], [0, 1], [0, 0]], dtype=torch.uint8).reshape(3, 1, 1, 2)
    test = torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8).reshape(2, 1, 1, 2)
    data = Dataset("t", train, test, test, 2, torch.zeros(()), 1.0, record={})
    expected = [-math.log(4 / 5 * 3 / 5), -math.log(1 / 5 * 2 / 5)]
    assert data.histogram_baseline().tolist() == pytest.approx(expected)


def test_offsets():
    assert levels_data([0], [0], 17).offset() == 0
    vectors = torch.zeros(2, 2, dtype=torch.float64)
    scale = torch.tensor([2.0, 5.0], dtype=torch.float64)
    data = Dataset("t", vectors, vectors, vectors, None, torch.zeros(2), scale, record={})
    assert data.offset() == pytest.approx(math.log(10))
    with pytest.raises(InputRefused, match="no levels"):
        data.uniform_baseline()
    with pytest.raises(InputRefused, match="toys only"):
        data.scaled_components()


def test_digits_are_the_published_ones():
    data = digits()
    whole = np.zeros((1797, 1, 8, 8), np.uint8)
    labels = np.zeros(1797, np.int64)
    for name, part in (
        ("train", data.train),
        ("validation", data.validation),
        ("test", data.test),
    ):
        whole[data.rows[name]], labels[data.rows[name]] = part.numpy(), data.labels[name].numpy()
    assert hashlib.sha256(whole.tobytes()).hexdigest() == DIGITS
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(labels).tolist() == counts
    assert (data.levels, data.shape(), data.dims) == (17, (1, 8, 8), 64)
    assert (len(data.train), len(data.validation), len(data.test)) == (1400, 100, 297)


def test_digits_split_is_the_order_of_the_sums():
    data = digits()
    parts = torch.cat([data.test, data.validation, data.train])
    sums = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in parts]
    assert sums == sorted(sums)
    assert data.record["split"]["test"]["sha256"] == TEST_SUM
    more = digits(validation=300)
    assert torch.equal(more.test, data.test) and len(more.train) == 1200


def test_digits_baselines_are_those_of_the_field():
    """Uniform 4.087; histogram 2.419 +- .012 on another split of the same sizes."""
    data = digits()
    bits = data.histogram_baseline() / 64 / math.log(2)
    assert data.uniform_baseline() / 64 / math.log(2) == pytest.approx(4.0875, abs=1e-4)
    assert float(bits.mean()) == pytest.approx(2.419, abs=0.06)


@pytest.mark.parametrize("make", [digits, toys.ring])
def test_records_are_json(make):
    record = make().record
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert {"path", "sha256", "split", "licence", "conversions", "warnings"} <= set(record)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 12), min_size=12, max_size=40), st.randoms())
def test_splits_depend_on_content_only_and_copies_stay_together(values, random):
    def split(numbers: list[int]) -> Dataset | None:
        rows = Rows(np.array(numbers, np.uint8).reshape(-1, 1, 1, 1))
        try:
            return by_content(rows, Provenance("t", None, levels=256), test=3, validation=2)
        except InputRefused:
            return None

    shuffled = random.sample(values, len(values))
    first, second = split(values), split(shuffled)
    assert (first is None) == (second is None)
    if first is None or second is None:
        assert len(set(values)) < 10
        return
    assert torch.equal(first.train, second.train) and torch.equal(first.test, second.test)
    assert first.record == second.record
    parts = rows_of(first)
    assert not parts["train"] & parts["test"] and not parts["validation"] & parts["test"]
    assert not parts["train"] & parts["validation"]
    assert len(first.train) + len(first.validation) + len(first.test) == len(values)


def test_given_keys_decide_but_copies_stay_together():
    values = random_images(20)
    values[7] = values[3]
    keys = [bytes([i]) for i in range(20)]
    data = by_content(Rows(values, keys=keys), Provenance("t", None, 256), test=4, validation=2)
    assert sorted(data.rows["test"].tolist()) == [0, 1, 2, 3, 7]
    assert sorted(data.rows["validation"].tolist()) == [4, 5]


def test_own_test_part_is_kept_and_its_copies_leave_the_training_part():
    train, test = random_images(40), random_images(10, seed=1)
    train[5] = test[2]
    data = by_part(Rows(train), Rows(test), Provenance("t", None, 256), validation=6)
    assert torch.equal(data.test, torch.from_numpy(test))
    assert (len(data.train), len(data.validation)) == (33, 6)
    assert 5 not in data.rows["train"].tolist() + data.rows["validation"].tolist()
    assert list(data.record["conversions"].values()) == [1]


def test_own_validation_part_is_kept():
    train, validation, test = (random_images(n, seed=n) for n in (20, 5, 6))
    data = by_part(
        Rows(train), Rows(test), Provenance("t", None, 256), validation=Rows(validation)
    )
    assert torch.equal(data.validation, torch.from_numpy(validation)) and len(data.train) == 20
    with pytest.raises(InputRefused, match="shape"):
        by_part(Rows(train), Rows(test[:, :, :1]), Provenance("t", None, 256), validation=2)


def test_checksum_of_a_split_tells_one_changed_pixel():
    values = random_images(30)
    first = by_content(Rows(values), Provenance("t", None, 256), test=4, validation=2)
    changed = values.copy()
    changed[0, 0, 0, 0] ^= 1
    second = by_content(Rows(changed), Provenance("t", None, 256), test=4, validation=2)
    assert first.record["sha256"] != second.record["sha256"]


def test_constant_images_are_refused():
    rows = Rows(np.full((20, 1, 2, 2), 7, np.uint8))
    with pytest.raises(InputRefused, match="constant"):
        by_content(rows, Provenance("t", None, 256), test=4, validation=2)


def test_few_levels_are_pointed_out():
    values = random_images(60) % 17
    data = by_content(Rows(values), Provenance("t", None, 256), test=4, validation=2)
    assert "only 17 of 256 levels" in data.record["warnings"][0]
    data = by_content(Rows(values), Provenance("t", None, 17), test=4, validation=2)
    assert data.record["warnings"] == []


def test_fractions():
    assert fractions(1000, "t", 0.1, 0.05) == [100, 50]
    assert fractions(10, "t", 0.1, 0.1) == [2, 2]
    assert fractions(10, "t", 0.1, 0.0) == [2, 0]
    with pytest.raises(InputRefused, match="mine: 5 example.*too few"):
        fractions(5, "mine", 0.1, 0.1)
    with pytest.raises(InputRefused, match="leave something"):
        fractions(100, "t", 0.6, 0.5)
