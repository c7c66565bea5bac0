"""Features of examples: known for all of a set, finite, and about what they say."""

from __future__ import annotations

import torch

from nelbo.data.base import Dataset
from nelbo.data.features import features
from nelbo.data.transforms import colors, cosines


def dataset(rows: torch.Tensor, levels: int | None = 256, binary: bool = False) -> Dataset:
    return Dataset("x", rows, rows, rows, levels, torch.zeros(()), 1.0, {}, binary=binary)


def picture(n: int, channels: int, size: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, size, size), generator=draws).to(torch.uint8)


def test_rough_images_are_longer_rougher_and_have_higher_frequencies() -> None:
    noise = picture(4, 3, 32)
    flat = torch.full_like(noise, 100)
    ramp = (torch.arange(32) * 4).to(torch.uint8).expand_as(noise)
    rows = torch.cat([flat, ramp, noise])
    found = features(dataset(rows), rows)
    assert bool(torch.isfinite(found).all()) and len(found) == 12
    bytes_, along, across = found[::4, 0], found[::4, 1], found[::4, 2]
    assert max(bytes_[0], bytes_[1]) < bytes_[2]
    assert along[0] == along[1] < along[2], "a ramp along rows is flat along columns"
    assert across[0] < across[1] < across[2]
    assert found[0, 4] == 0 and found[8, 4] > 0, "noise touches the ends of the scale"


def test_examples_do_not_depend_on_their_companions() -> None:
    rows = picture(7, 1, 8)
    whole = features(dataset(rows), rows)
    for k in range(7):
        torch.testing.assert_close(features(dataset(rows), rows[k : k + 1])[0], whole[k])


def test_sizes_and_channels() -> None:
    for channels, size in ((1, 8), (2, 5), (3, 16), (7, 12), (1, 1)):
        rows = picture(3, channels, size)
        assert bool(torch.isfinite(features(dataset(rows), rows)).all())


def test_bits_and_vectors() -> None:
    bits = (torch.rand(5, 40, generator=torch.Generator().manual_seed(1)) < 0.3).to(torch.uint8)
    found = features(dataset(bits, 2, True), bits)
    assert found.shape == (5, 2)
    torch.testing.assert_close(found[:, 1], bits.double().mean(1))
    images = bits.reshape(5, 1, 5, 8)
    assert torch.equal(features(dataset(images, 2, True), images), found)
    vectors = torch.randn(6, 3).double()
    assert features(dataset(vectors, None), vectors).shape == (6, 0)


def test_transforms_are_orthonormal() -> None:
    for table in (cosines(1), cosines(5), cosines(8), colors(1), colors(3), colors(4)):
        eye = torch.eye(len(table), dtype=torch.float64)
        torch.testing.assert_close(table @ table.T, eye)
