r"""Dead leaves: grey disks that fall on each other and occlude, with a power law of radii.

Disks arrive at uniform places and times, each with a radius of density ∝ r⁻³ on [r_min, r_max] and
one grey level of its own; a pixel shows the last disk that covers its centre. The cube makes the
pictures nearly invariant to scale, as natural images are, and the edges are sharp at every size.

Looking from above, the last disk comes first: an image is drawn exactly, with no burn-in, by
laying disks *under* those that are there until every pixel is covered. Centres lie anywhere from
where a disk can reach the image, so that the law is the same at every pixel. Levels are uniform on
0..255, one per disk.

References:
    Lee, Mumford, Huang 2001, Occlusion models for natural images, section 3;
    Kendall, Thönnes 1999, Perfect simulation in stochastic geometry (from above);
    Sohl-Dickstein et al. 2015, table 2 (another set of dead leaves).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nelbo.data.base import Dataset
from nelbo.data.provenance import Provenance
from nelbo.data.sums import digests
from nelbo.errors import InputRefused
from nelbo.randomness import generator

TRAIN, VALIDATION, TEST = 10_000, 500, 1_000
LEVELS = 256
AT_ONCE = 512
"""Images drawn together; a part of the meaning of a seed."""


def deadleaves(
    n_train: int = TRAIN,
    n_test: int = TEST,
    seed: int = 0,
    *,
    n_validation: int = VALIDATION,
    size: int = 32,
    radius_min: float = 2.0,
    radius_max: float = 16.0,
) -> Dataset:
    """Independent grey images (1, size, size) with 256 levels.

    Arguments:
        n_train, n_validation, n_test: number of images in each part.
        seed: of the draws.
        size: side of an image, pixels.
        radius_min, radius_max: of the disks, pixels.

    Raises:
        InputRefused: radii or numbers that make no images.
    """
    if not 0 < radius_min < radius_max:
        raise InputRefused(
            f"deadleaves: radii from {radius_min:g} to {radius_max:g}; take a least one above 0 "
            "and a larger greatest one"
        )
    if n_train < 2 or n_test < 2 or n_validation < 0 or size < 1:
        raise InputRefused("deadleaves: ask for at least 2 training and 2 test images, size 1")
    sizes = {"train": n_train, "validation": n_validation, "test": n_test}
    parts = {
        part: draws(count, size, (radius_min, radius_max), generator(seed, "deadleaves", part))
        for part, count in sizes.items()
    }
    origin = Provenance("deadleaves", None, levels=LEVELS, licence="generated: free of rights")
    sums = [digest for rows in parts.values() for digest in digests(rows.numpy())]
    record = origin.record(parts, "independent draws of the model", sums, seed)
    record["model"] = {
        "radius density": f"r^-3 on [{radius_min:g}, {radius_max:g}] pixels",
        "levels of disks": f"uniform on 0..{LEVELS - 1}",
    }
    return Dataset.of_levels("deadleaves", parts, LEVELS, record)


def radii(count: int, limits: tuple[float, float], random: torch.Generator) -> Tensor:
    """(count,) draws of density ∝ r⁻³ on the limits: r⁻² is uniform between r_min⁻² and r_max⁻².

    Arguments:
        limits: r_min and r_max.
    """
    high, low = limits[0] ** -2, limits[1] ** -2
    uniform = torch.rand(count, generator=random, dtype=torch.float64)
    return (high - (high - low) * uniform) ** -0.5


def draws(count: int, size: int, limits: tuple[float, float], random: torch.Generator) -> Tensor:
    """(count, 1, size, size) uint8 images.

    Arguments:
        limits: r_min and r_max, pixels. random: is advanced.
    """
    groups = [min(AT_ONCE, count - start) for start in range(0, count, AT_ONCE)]
    images = [_group(n, size, limits, random) for n in groups]
    empty = torch.empty(0, size * size, dtype=torch.uint8)
    return torch.cat([empty, *images]).view(count, 1, size, size)


def _group(count: int, size: int, limits: tuple[float, float], random: torch.Generator) -> Tensor:
    """(count, size²): one disk under each image per round, looked up by uncovered pixels only."""
    out = torch.zeros(count * size * size, dtype=torch.uint8)
    place = torch.arange(count * size * size)
    line = torch.arange(size, dtype=torch.float32) + 0.5
    y, x = (axis.flatten().repeat(count) for axis in torch.meshgrid(line, line, indexing="ij"))
    image = place // (size * size)
    while len(place):
        centres, radius = _disks(count, size, limits, random)
        level = torch.randint(LEVELS, (count,), generator=random).to(torch.uint8)
        across, down = x - centres[0][image], y - centres[1][image]
        inside = across * across + down * down <= (radius * radius)[image]
        out[place[inside]] = level[image[inside]]
        left = ~inside
        place, image, x, y = place[left], image[left], x[left], y[left]
    return out.view(count, size * size)


def _disks(
    count: int, size: int, limits: tuple[float, float], random: torch.Generator
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Centres (x, y) and radii of disks that may touch the image, one for each.

    Only those disks count that reach the square of the image: a disk of radius r does so with a
    probability ∝ (size + 2 r)², by which its radius is accepted; its centre is uniform there.
    """
    radius = torch.empty(0, dtype=torch.float64)
    while len(radius) < count:
        some = radii(2 * count, limits, random)
        chance = ((size + 2 * some) / (size + 2 * limits[1])) ** 2
        kept = torch.rand(2 * count, generator=random, dtype=torch.float64) < chance
        radius = torch.cat([radius, some[kept]])
    radius = radius[:count]
    uniform = torch.rand(2, count, generator=random, dtype=torch.float64)
    centres = uniform * (size + 2 * radius) - radius
    return (centres[0].float(), centres[1].float()), radius.float()
