"""Pictures of examples: grids of images, clouds of vectors, film strips of trajectories.

Images are enlarged by whole factors without smoothing: what looks like a pixel is a pixel. Integer
images are levels 0..levels - 1; floats are on the model's scale [-1, 1], and what lies outside is
shown as its edge. Of vectors the first two dimensions are shown.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nelbo.figures import BLUE, MUTED, NARROW, RULE, Axes, blank, canvas, png, png_of, styled

Array = NDArray[Any]
Limits = tuple[tuple[float, float], tuple[float, float]]
GRID = 960
"""Width of a grid in pixels, unless its images are larger."""
ROWS = 64
"""Sequences on a sheet."""


def pixels(images: Array, levels: int | None) -> Array:
    """8-bit colours: 255 level/(levels - 1), or 255 (x + 1)/2 limited to 0..255.

    Arguments:
        images: (n, C, H, W), integer levels or floats on the model's scale. With neither one nor
            three channels, the channels stand side by side in grey.
        levels: number of levels, for integers.
    Returns:
        (n, H, W, 3) uint8.
    """
    if np.issubdtype(images.dtype, np.integer):
        assert levels is not None and levels > 1, "integer images need their number of levels"
        unit = images / (levels - 1)
    else:
        unit = (images + 1) / 2
    colours = np.rint(255 * unit).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    if colours.shape[3] not in (1, 3):
        colours = np.concatenate(np.split(colours, colours.shape[3], axis=3), axis=2)
    return np.broadcast_to(colours, (*colours.shape[:3], 3))


def sample_grid(images: ArrayLike, levels: int | None, columns: int | None = None) -> Array:
    """Images in a grid on white, near-square by default, each pixel enlarged by a whole factor.

    Arguments:
        images: (n, C, H, W), as in `pixels`; tensors too.
        levels: number of levels, for integers.
        columns: images in a row.
    Returns:
        (height, width, 3) uint8.
    """
    tiles = pixels(np.asarray(images), levels)
    count, height, width, _ = tiles.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    factor = max(1, GRID // (columns * max(height, width)))
    gap = max(1, factor * width // 16)
    tiles = tiles.repeat(factor, axis=1).repeat(factor, axis=2)
    empty = rows * columns - count
    tiles = np.pad(tiles, ((0, empty), (0, gap), (0, gap), (0, 0)), constant_values=255)
    height, width = tiles.shape[1:3]
    grid = tiles.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    flat: Array = grid.reshape(rows * height, columns * width, 3)
    return flat[:-gap, :-gap]


def picture(samples: ArrayLike, levels: int | None, limits: Limits | None = None) -> bytes:
    """Samples as a PNG: a grid of images, a scatter of vectors, a sheet of sequences.

    Arguments:
        samples: (n, C, H, W) images, as in `pixels`, (n, D) vectors, or (n, D) integer levels,
            of which the first ones are shown, each as a row.
        levels: number of levels, for integer images.
        limits: of a scatter, from `frame`, so that two can be compared.
    """
    array = np.asarray(samples)
    if array.ndim == 2 and levels is not None:
        return png_of(sample_grid(array[None, None, :ROWS], levels))
    if array.ndim == 2:
        return _scatter(array, limits or frame(array))
    return png_of(sample_grid(array, levels))


def save_grid(path: Path, images: ArrayLike, levels: int | None) -> None:
    """Write the `picture` of samples to a PNG file.

    Arguments:
        path: of the file. images, levels: as in `picture`.
    """
    path.write_bytes(picture(images, levels))


def frame(*clouds: Array) -> Limits:
    """The square ((left, right), (bottom, top)) that holds all points of all clouds (..., D)."""
    points = np.concatenate([_plane(cloud).reshape(-1, 2) for cloud in clouds])
    centre = (points.max(0) + points.min(0)) / 2
    half = 0.54 * max(float(np.ptp(points, axis=0).max()), 1e-9)
    (left, bottom), (right, top) = (centre - half).tolist(), (centre + half).tolist()
    return (left, right), (bottom, top)


def _plane(cloud: Array) -> Array:
    """The first two dimensions; a single one lies on a line."""
    plane: Array = np.concatenate([cloud, np.zeros_like(cloud)], axis=-1)[..., [0, 1]]
    return plane


@styled
def _scatter(cloud: Array, limits: Limits) -> bytes:
    figure, axes = canvas(NARROW, NARROW)
    size = float(np.clip(110 / np.sqrt(len(cloud)), 2, 5))
    axes.plot(*_plane(cloud).T, ".", color=BLUE, ms=size, alpha=0.6, mew=0)
    axes.set(xlim=limits[0], ylim=limits[1], aspect="equal")
    axes.locator_params(nbins=5)
    return png(figure)


@styled
def strip(forward: Array, reverse: Array, logsnr: ArrayLike, width: float) -> bytes:
    """One forward trajectory above (data to noise), one reverse below (noise to data).

    Arguments:
        forward, reverse: (k, C, H, W) on the model's scale, or (k, m, D), in walking order.
        logsnr: of the frames, in either order; infinite, or one missing, means the data itself,
            minus infinity pure noise.
        width: inches.
    Returns:
        PNG.
    """
    most = 10 if width > NARROW else 5
    chosen = np.linspace(0, len(forward) - 1, min(most, len(forward))).round().astype(int)
    limits = None if forward.ndim == 4 else frame(forward, reverse)
    rising = np.sort(np.asarray(logsnr, float))
    rising = np.pad(rising, (0, len(forward) - len(rising)), constant_values=np.inf)
    columns = max(5, len(chosen))
    cell, line = width / columns, 0.24
    height = 2 * cell + 4.5 * line
    figure = blank(width, height)
    back = ("reverse: noise → data", reverse, rising)
    forth = ("forward: data → noise", forward, rising[::-1])
    for row, (title, frames, levels) in enumerate((back, forth)):
        bottom = line + row * (cell + 2.5 * line)
        figure.text(0, (bottom + cell + 0.05) / height, title)
        for column, index in enumerate(chosen):
            box = (column / columns, bottom / height, 0.94 / columns, 0.94 * cell / height)
            _still(figure.add_axes(box), frames[index], levels[index], limits)
    return png(figure)


def _still(axes: Axes, values: Array, logsnr: float, limits: Limits | None) -> None:
    """One frame: an image, or a small scatter within limits; its log-SNR below."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=limits is not None, color=RULE)
    if limits is None:
        axes.imshow(pixels(values[None], None)[0], interpolation="nearest")
    else:
        axes.plot(*_plane(values).T, ".", color=BLUE, ms=2, alpha=0.6, mew=0)
        axes.set(xlim=limits[0], ylim=limits[1])
    # Adding 0 turns a rounded -0 into 0.
    label = f"{round(logsnr, 1) + 0:.1f}".replace("-", "−")
    if not np.isfinite(logsnr):
        label = "data" if logsnr > 0 else "noise"
    axes.set_xlabel(label, fontsize=9, labelpad=3, color=MUTED)
