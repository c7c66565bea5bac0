"""Random crops of one photograph, from regions that share no pixel.

The photograph is cut across its longer side into three regions: the first is trained on, the
second validates, the last tests, with crops at distinct random places inside each. Crops of one
region overlap, so a standard error over them speaks of choosing crops of this photograph, not of
choosing photographs; the record says so.

References:
    Sohl-Dickstein et al. 2015, section 3.2.2 (bark).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nelbo.data.base import Dataset
from nelbo.data.decoding import Reader
from nelbo.data.images import PIXEL_LIMIT
from nelbo.data.provenance import Provenance
from nelbo.errors import InputRefused
from nelbo.randomness import generator

TRAIN, VALIDATION, TEST = 20_000, 500, 2_000
SHARES = (0.7, 0.1, 0.2)
LEVELS = 256
PARTS = ("train", "validation", "test")


def texture(
    path: str | Path,
    size: int = 32,
    channels: int = 1,
    n_train: int = TRAIN,
    n_test: int = TEST,
    seed: int = 0,
    *,
    n_validation: int = VALIDATION,
) -> Dataset:
    """Crops (channels, size, size) with 256 levels.

    A region with fewer places than crops are asked for gives one crop of each place.

    Arguments:
        path: the photograph.
        size: side of a crop, pixels.
        channels: 1 (grey) or 3 (RGB).
        n_train, n_validation, n_test: most crops of each part.
        seed: of the places.

    Raises:
        InputRefused: a file that is no image, or a photograph too small to be cut in three.
    """
    if channels not in (1, 3):
        raise InputRefused(f"channels {channels}: give 1 (grey) or 3 (RGB)")
    if min(n_train, n_test, n_validation) < 2 or size < 1:
        raise InputRefused("texture: ask for at least 2 crops in every part, size 1")
    path = Path(path)
    reader = Reader(None, channels, False, PIXEL_LIMIT)
    pixels, key = reader.read(path)
    regions = _regions(pixels.shape[:2], size, path)
    sizes = {"train": n_train, "validation": n_validation, "test": n_test}
    planes = torch.from_numpy(
        np.array(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
    )
    parts = {
        part: _crops(planes, regions[part], size, sizes[part], generator(seed, "texture", part))
        for part in PARTS
    }
    if len(parts["train"].flatten(1).unique(dim=0)) < 2:
        raise InputRefused(f"{path}: all training crops are the same; there is nothing to learn")
    origin = Provenance(
        "texture",
        path,
        levels=LEVELS,
        conversions=reader.conversions,
        warnings=[
            "crops of a part overlap: errors speak of choosing crops of this photograph, not of "
            "choosing photographs"
        ],
    )
    rule = f"crops at distinct random places in disjoint regions of {_across(pixels)} pixels"
    record = origin.record(parts, rule, [key], seed)
    for part, region in regions.items():
        record["split"][part]["region"] = region
    return Dataset.of_levels("texture", parts, LEVELS, record)


def _regions(shape: tuple[int, ...], size: int, path: Path) -> dict[str, dict[str, int]]:
    """Rectangles by part: top, left, height, width; disjoint, and each larger than a crop."""
    height, width = shape
    along, across = max(height, width), min(height, width)
    cuts = [0, round(SHARES[0] * along), round((SHARES[0] + SHARES[1]) * along), along]
    spans = dict(zip(PARTS, zip(cuts[:-1], cuts[1:], strict=True), strict=True))
    if across < size or min(end - start for start, end in spans.values()) <= size:
        raise InputRefused(
            f"{path}: {width} x {height} pixels are too few for crops of {size} from three "
            f"regions; take a photograph of at least {11 * size} x {size}, or a smaller --size"
        )
    found = {}
    for part, (start, end) in spans.items():
        wide = width >= height
        found[part] = {
            "top": 0 if wide else start,
            "left": start if wide else 0,
            "height": height if wide else end - start,
            "width": end - start if wide else width,
        }
    return found


def _crops(
    planes: Tensor, region: dict[str, int], size: int, count: int, random: torch.Generator
) -> Tensor:
    """(n, C, size, size) at distinct places of a region."""
    rows, columns = region["height"] - size + 1, region["width"] - size + 1
    chosen = torch.randperm(rows * columns, generator=random)[:count]
    top, left = region["top"] + chosen // columns, region["left"] + chosen % columns
    step = torch.arange(size)
    down, right = (top[:, None] + step)[:, :, None], (left[:, None] + step)[:, None, :]
    return planes[:, down, right].transpose(0, 1).contiguous()


def _across(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
