"""Data of the 2015 experiments: dead leaves, crops of a photograph, binarised images, bits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import assert_mean
from PIL import Image
from torch import Tensor

from nelbo.data.binarized import binarized
from nelbo.data.bitrows import bitrows
from nelbo.data.deadleaves import deadleaves, draws, radii
from nelbo.data.embedded import digits
from nelbo.data.texture import texture
from nelbo.data.toys import swissroll
from nelbo.errors import InputRefused
from nelbo.randomness import generator

# --- dead leaves ---------------------------------------------------------------------------------


def test_radii_follow_the_power_law() -> None:
    """P(r ≤ x) = (r_min⁻² − x⁻²)/(r_min⁻² − r_max⁻²) at three x (3 comparisons)."""
    r = radii(40_000, (2.0, 16.0), generator(0, "radii"))
    assert float(r.min()) >= 2 and float(r.max()) <= 16
    for x in (2.5, 4.0, 10.0):
        share = (2**-2 - x**-2) / (2**-2 - 16**-2)
        assert_mean((r <= x).double(), share, 3, f"radii up to {x}")


def same_disk(pairs: Tensor) -> Tensor:
    """(n,) whether two pixels have one level; (n, 2)."""
    return (pairs[:, 0] == pairs[:, 1]).double()


def covered_by_one(distance: float, low: float, high: float, power: float = 3) -> float:
    """P(two pixels show one disk): E|both|/E|either| over radii of density ∝ r^-power.

    The last disk that covers either of them covers both with that probability. By quadrature.
    """
    edges = np.linspace(math.log(low), math.log(high), 20_001)
    r = np.exp((edges[1:] + edges[:-1]) / 2)
    weight = r ** (1 - power)
    half = np.minimum(distance / (2 * r), 1)
    lens = 2 * r**2 * (np.arccos(half) - half * np.sqrt(1 - half**2))
    return float((weight * lens).sum() / (weight * (2 * np.pi * r**2 - lens)).sum())


@pytest.mark.parametrize("distance", [1, 4])
def test_two_pixels_are_of_one_disk_as_often_as_the_model_says(distance: int) -> None:
    """In the middle and at the corner: the law is stationary (2 comparisons each)."""
    limits = (1.5, 8.0)
    x = draws(6000, 12, limits, generator(1, "pairs"))[:, 0]
    share = covered_by_one(distance, *limits)
    # two disks have one level by chance once in 256
    share += (1 - share) / 256
    for row, column in ((0, 0), (6, 5)):
        pair = torch.stack([x[:, row, column], x[:, row, column + distance]], 1)
        assert_mean(same_disk(pair), share, 4, f"pixels {distance} apart at {row}, {column}")


def test_the_pair_test_detects_a_square_law() -> None:
    """The power of the test above: radii of density ∝ r⁻² are more than 8 errors off."""
    cube, square = (covered_by_one(4, 1.5, 8.0, power) for power in (3, 2))
    assert square - cube > 8 * math.sqrt(cube * (1 - cube) / 6000)


def test_levels_are_uniform() -> None:
    """Mean of a single pixel (1 comparison)."""
    x = draws(4000, 3, (1.0, 4.0), generator(2, "levels"))
    assert_mean(x[:, 0, 1, 1].double(), 127.5)
    assert int(x.min()) < 3 and int(x.max()) > 252


def test_leaves_follow_the_seed_and_say_what_they_are() -> None:
    one, same = (deadleaves(20, 10, 5, n_validation=4, size=16) for _ in range(2))
    other = deadleaves(20, 10, 6, n_validation=4, size=16)
    assert torch.equal(one.train, same.train) and not torch.equal(one.train, other.train)
    assert one.shape() == (1, 16, 16) and one.levels == 256
    assert one.record["model"]["radius density"] == "r^-3 on [2, 16] pixels"
    assert not torch.equal(one.train[:4], one.validation)
    json.dumps(one.record, allow_nan=False)


@pytest.mark.parametrize("limits", [(0.0, 4.0), (4.0, 4.0), (5.0, 4.0)])
def test_radii_that_are_none(limits: tuple[float, float]) -> None:
    with pytest.raises(InputRefused, match="radii"):
        deadleaves(4, 4, radius_min=limits[0], radius_max=limits[1])


# --- texture -------------------------------------------------------------------------------------


def photograph(path: Path, height: int, width: int, channels: int = 3) -> np.ndarray:
    """A picture whose pixels tell their place: red the row, green the column."""
    y, x = np.mgrid[:height, :width]
    planes = np.stack([y, x, (y * 7 + x * 3) % 256], 2).astype(np.uint8)
    pixels = planes if channels == 3 else planes[:, :, 1]
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize(("height", "width"), [(40, 120), (120, 40)])
def test_no_pixel_is_in_two_parts(height: int, width: int, tmp_path: Path) -> None:
    """Every crop is a crop of the photograph, from its part's region and no other."""
    path = tmp_path / "photo.png"
    pixels = torch.from_numpy(photograph(path, height, width))
    data = texture(path, 8, 3, 300, 60, 1, n_validation=40)
    used = torch.zeros(3, height, width, dtype=torch.int64)
    for k, part in enumerate(("train", "validation", "test")):
        rows = getattr(data, part)
        region = data.record["split"][part]["region"]
        for row in rows:
            top, left = int(row[0, 0, 0]), int(row[1, 0, 0])
            assert torch.equal(row, pixels[top : top + 8, left : left + 8].permute(2, 0, 1))
            assert region["top"] <= top <= region["top"] + region["height"] - 8
            assert region["left"] <= left <= region["left"] + region["width"] - 8
            used[k, top : top + 8, left : left + 8] = 1
        assert len(rows[:, :2, 0, 0].unique(dim=0)) == len(rows)
    assert int(used.sum(0).max()) == 1
    assert [len(getattr(data, part)) for part in ("train", "validation", "test")] == [300, 40, 60]
    assert any("overlap" in note for note in data.record["warnings"])
    json.dumps(data.record, allow_nan=False)


def test_texture_in_grey_by_default_and_by_seed(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photograph(path, 40, 120)
    one, same, other = (texture(path, 8, n_train=50, n_test=9, seed=s) for s in (0, 0, 1))
    assert one.shape() == (1, 8, 8) and torch.equal(one.train, same.train)
    assert not torch.equal(one.train, other.train)
    assert one.record["conversions"] == {"RGB to grey": 1}


def test_a_photograph_that_is_too_small_or_blank(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photograph(path, 40, 79)
    with pytest.raises(InputRefused, match=r"photo.png: 79 x 40 pixels are too few"):
        texture(path, 8)
    Image.fromarray(np.full((40, 120), 7, np.uint8)).save(path)
    with pytest.raises(InputRefused, match="all training crops are the same"):
        texture(path, 8, n_train=50)
    path.write_bytes(b"no picture")
    with pytest.raises(InputRefused, match="cannot be decoded"):
        texture(path, 8)


# --- binarised images ----------------------------------------------------------------------------


def test_a_threshold_at_half() -> None:
    """Of 17 levels, 0..8 are 0 and 9..16 are 1."""
    grey = digits()
    bits = binarized(grey, "threshold")
    assert torch.equal(bits.test, (grey.test > 8).to(torch.uint8))
    assert bits.binary and bits.levels == 2 and bits.name == "digits-threshold"
    assert set(bits.encode(bits.test).unique().tolist()) == {0.0, 1.0}
    assert "above 8" in bits.record["binarize"]["rule"]
    assert bits.record["binarize"]["seed"] is None
    assert bits.record["sha256"] == grey.record["sha256"]
    splits = [data.record["split"]["test"]["sha256"] for data in (bits, grey)]
    assert splits[0] != splits[1]


def test_coins_have_the_rate_of_the_level() -> None:
    """E bit = level/16 over all pixels; never 1 at level 0, always at 16 (1 comparison)."""
    grey = digits()
    bits = binarized(grey, "stochastic", 3)
    assert int(bits.train[grey.train == 0].sum()) == 0
    assert bool((bits.train[grey.train == 16] == 1).all())
    middle = (grey.train > 0) & (grey.train < 16)
    excess = bits.train[middle].double() - grey.train[middle].double() / 16
    assert_mean(excess, 0.0)
    again, other = (binarized(grey, "stochastic", seed) for seed in (3, 4))
    assert torch.equal(bits.train, again.train) and not torch.equal(bits.train, other.train)
    assert "stochastic" in bits.record["binarize"]["rule"]
    assert bits.record["binarize"]["seed"] == 3


def test_what_cannot_be_binarised() -> None:
    with pytest.raises(InputRefused, match="no levels"):
        binarized(swissroll(10, 10), "threshold")


# --- rows of bits --------------------------------------------------------------------------------


def some_rows(n: int = 400) -> np.ndarray:
    return (np.random.default_rng(0).random((n, 3)) < 0.4).astype(np.uint8)


@pytest.mark.parametrize("kind", [np.uint8, np.bool_, np.int64, np.float32, np.float64])
def test_bits_of_any_type_are_the_same_data(kind: type, tmp_path: Path) -> None:
    path = tmp_path / "bits.npy"
    np.save(path, some_rows().astype(kind))
    data = bitrows(path)
    assert data.binary and data.levels == 2 and data.shape() == (3,)
    assert [len(x) for x in (data.train, data.validation, data.test)] == [340, 20, 40]
    everything = torch.cat([data.train, data.validation, data.test]).numpy()
    assert sorted(everything.tolist()) == sorted(some_rows().tolist())
    assert data.record["distinct rows"] == 8
    json.dumps(data.record, allow_nan=False)


def test_the_split_depends_on_the_rows_and_not_on_their_order(tmp_path: Path) -> None:
    rows = some_rows()
    np.save(tmp_path / "a.npy", rows)
    np.save(tmp_path / "b.npy", rows[np.random.default_rng(1).permutation(len(rows))])
    one, other = bitrows(tmp_path / "a.npy"), bitrows(tmp_path / "b.npy")
    assert torch.equal(one.train, other.train) and torch.equal(one.test, other.test)
    assert one.record["sha256"] == other.record["sha256"]


def test_the_test_part_is_like_the_training_part(tmp_path: Path) -> None:
    """Equal rows are independent draws: the test part has the shares of all (1 comparison)."""
    rows = some_rows(20_000)
    np.save(tmp_path / "a.npy", rows)
    data = bitrows(tmp_path / "a.npy")
    assert_mean((data.test == 0).all(1).double(), float((rows == 0).all(1).mean()))


def test_given_test_rows_are_kept(tmp_path: Path) -> None:
    rows = some_rows()
    np.savez(tmp_path / "a.npz", x_train=rows[:300], x_test=rows[300:])
    data = bitrows(tmp_path / "a.npz")
    assert torch.equal(data.test, torch.from_numpy(rows[300:]))
    assert len(data.train) + len(data.validation) == 300 and len(data.validation) == 15


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.where(np.arange(12).reshape(4, 3) == 7, 2, 0), "first is 2 in row 2, column 1"),
        (np.where(np.arange(12).reshape(4, 3) == 4, 0.5, 1), "first is 0.5 in row 1, column 1"),
        (np.where(np.arange(12).reshape(4, 3) == 0, np.nan, 1), "first is nan in row 0"),
        (np.zeros((4, 3, 2), np.uint8), "shape"),
        (np.zeros((50, 3), np.uint8), "constant"),
        (np.array([["0", "1"]]), "type <U1"),
        (np.eye(3, dtype=np.uint8), "too few"),
    ],
)
def test_what_is_no_array_of_bits(values: np.ndarray, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bits.npy"
    np.save(path, values)
    with pytest.raises(InputRefused, match=words) as refusal:
        bitrows(path)
    assert "bits.npy" in str(refusal.value)
