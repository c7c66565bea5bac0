"""The figures of the game: what was certified, where D sees a difference, what holds from above.

Divergences are in nats up to log 2, where two laws do not meet. What is certified is
drawn in blue, what is known in ink, what is neither (the figure of the training D) dashed. D is
shown by two colours that meet in white at 1/2, where real and fake cannot be told apart.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes as Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from nelbo.estimate import at_least, at_most
from nelbo.figures import (
    BLUE,
    DPI,
    INK,
    MUTED,
    NARROW,
    RULE,
    SKY,
    VERMILION,
    blank,
    canvas,
    ends,
    png,
    smoothed,
    styled,
)
from nelbo.pictures import pixels

Array = NDArray[Any]

LOG2 = math.log(2)
UNIT = "nats"
POINTS = 400
"""Points of each side over a witness."""
SHADES = LinearSegmentedColormap.from_list("real or fake", [VERMILION, "#ffffff", BLUE])


@styled
def ladder(logsnr: ArrayLike, lower: ArrayLike, exact: ArrayLike, width: float) -> bytes:
    """Certified lower bounds on JSD at each log-SNR, exact values where known, and log 2.

    Arguments:
        logsnr, lower: (m,), lower in nats. exact: (m,) nats, nan where it is not known.
        width: inches.
    Returns:
        PNG.
    """
    x = np.asarray(logsnr, float)
    order = np.argsort(x)
    x, bound, known = (np.asarray(v, float)[order] for v in (logsnr, lower, exact))
    figure, axes = canvas(width, 2.9 if width > NARROW else 2.7)
    top = _ceiling(axes, np.concatenate([bound, known[np.isfinite(known)]]), x[0])
    axes.fill_between(x, bound, min(top, LOG2), color=SKY, alpha=0.16, lw=0)
    if np.isfinite(known).any():
        axes.plot(x, known, "D--", color=INK, ms=4, lw=1, label="exact")
    axes.plot(x, bound, "o-", color=BLUE, ms=5, label="certified: JSD is at least")
    axes.set_ylim(-0.03 * top, top)
    axes.margins(x=0.03)
    axes.set_title(UNIT, loc="left", fontsize=9.5, pad=9, x=0)
    axes.xaxis.set_major_locator(MaxNLocator(8 if width > NARROW else 6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    ends(axes, "log-SNR")
    _legend_above(axes)
    return png(figure)


def _ceiling(axes: Axes, values: Array, left: float) -> float:
    """Mark log 2 and return the end of the axis; values far below it get an axis of their own."""
    most = float(values.max())
    # Equal laws have no scale: a hundredth of log 2 stands in for it.
    inside = most > 0.3 * LOG2
    top = 1.12 * LOG2 if inside else 1.35 * max(most, 0.01 * LOG2)
    height = LOG2 if inside else 0.93 * top
    if inside:
        axes.axhline(LOG2, color=MUTED, lw=0.8, ls=(0, (3, 3)))
    word: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": MUTED}
    axes.annotate("log 2" if inside else "↑ log 2 = 0.69", (left, height), (0, 3), **word)
    return top


def _legend_above(axes: Axes) -> None:
    """In the strip of the title, where no curve can run under it."""
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, handlelength=1.8,
        borderaxespad=0.2, columnspacing=1.2,
    )  # fmt: skip


@styled
def learning(plug_in: Array, certified: Array, width: float) -> bytes:
    """The training D's own plug-in figure, dashed, and certificates of the validation part.

    Arguments:
        plug_in: (m, 2) of step, nats. certified: (k, 2) of step, certified nats.
        width: inches.
    Returns:
        PNG.
    """
    figure, axes = canvas(width, 2.9 if width > NARROW else 2.7)
    if len(plug_in):
        axes.plot(*plug_in.T, color=MUTED, lw=0.6, alpha=0.35)
        smooth = smoothed(plug_in[:, 1])
        label = "training D, not certified"
        axes.plot(plug_in[:, 0], smooth, color=MUTED, lw=1.4, ls=(0, (4, 2)), label=label)
    if len(certified):
        label = "certified, validation part"
        axes.plot(*certified.T, "o-", color=BLUE, ms=4.5, lw=1.2, label=label)
    steps = np.concatenate([plug_in[:, 0], certified[:, 0]])
    seen = np.concatenate([plug_in[:, 1], certified[:, 1]])
    axes.set_ylim(min(-0.02, 1.05 * float(seen.min())), max(0.15, 1.15 * float(seen.max())))
    if axes.get_ylim()[1] > LOG2:
        _ceiling(axes, seen, float(steps.min()))
    axes.axhline(0, color=RULE, lw=0.8, zorder=0)
    axes.set_xlabel("step")
    axes.set_title(f"JSD, {UNIT}", loc="left", fontsize=9.5, pad=9, x=0)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(8 if width > NARROW else 4))
    if width > NARROW:
        _legend_above(axes)
    else:
        axes.legend(loc="upper right", handlelength=1.8, borderaxespad=0.1)
    return png(figure)


@styled
def sandwich(
    lower: float, known: tuple[str, float | None], upper: float | None, width: float
) -> bytes:
    """What a divergence may be, on one axis from 0 to log 2.

    Arguments:
        lower: certified. known: a value known otherwise, and what it is called.
        upper: from above, where it is known; all in nats.
        width: inches.
    Returns:
        PNG.
    """
    rows = [("certified from below", lower, LOG2, f"≥ {at_least(lower)}")]
    name, value = known
    if value is not None:
        rows.append((name, value, value, f"{value:.4f}"))
    if upper is not None:
        rows.append(("bound from above", 0.0, upper, f"≤ {at_most(upper)}"))
    narrow = width <= NARROW
    figure, axes = canvas(width, 0.7 + len(rows) * (0.52 if narrow else 0.38))
    axes.axvspan(lower, LOG2 if upper is None else upper, color=SKY, alpha=0.22, lw=0)
    for place, (label, low, high, text) in enumerate(rows):
        _extent(axes, place, low, high)
        _beside(axes, place, label, text, narrow)
    axes.set_xlim(-0.004, LOG2 + 0.004)
    axes.set_ylim(len(rows) - 0.6, -0.75 if narrow else -0.6)
    names = [] if narrow else [row[0] for row in rows]
    axes.set_yticks([] if narrow else range(len(rows)), names)
    axes.tick_params(axis="y", length=0, pad=8)
    axes.spines["left"].set_visible(False)
    marks = [0.0, 0.2, 0.4, 0.6, LOG2] if not narrow else [0.0, 0.2, 0.4, LOG2]
    axes.set_xticks(marks, [f"{m:g}" if m < LOG2 else "log 2" for m in marks])
    axes.set_xlabel(f"JSD, {UNIT}")
    return png(figure)


def _extent(axes: Axes, place: int, low: float, high: float) -> None:
    """A bar over the values that one side leaves, its own end marked; a diamond for one value."""
    if low == high:
        axes.plot(low, place, "D", color=INK, ms=5.5)
        return
    colour, end = (BLUE, low) if high == LOG2 else (VERMILION, high)
    axes.plot([low, high], [place, place], color=colour, lw=2.2, alpha=0.75, solid_capstyle="butt")
    axes.plot(end, place, "|", color=colour, ms=13, mew=2.4)


def _beside(axes: Axes, place: int, label: str, text: str, narrow: bool) -> None:
    over: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    if narrow:
        axes.annotate(label, (0, place), (0, 8), ha="left", fontsize=9, **over)
        axes.annotate(text, (1, place), (0, 8), ha="right", fontsize=9, **over)
    else:
        axes.annotate(text, (1, place), (9, 0), va="center_baseline", **over)


@styled
def witness(
    x: Array, y: Array, learned: Array, optimal: Array | None, clouds: tuple[Array, Array],
    width: float,
) -> bytes:  # fmt: skip
    """D over the plane, the best D beside it where it is known, real and fake points over both.

    Arguments:
        x, y: (gx,), (gy,). learned, optimal: (gy, gx), the probability of real.
        clouds: real and fake points, (n, 2) each or empty.
        width: inches.
    Returns:
        PNG.
    """
    titles = {"learned D": learned} | ({} if optimal is None else {"best D": optimal})
    narrow, both = width <= NARROW, len(titles) == 2
    shape = (2, 1) if both and narrow else (1, len(titles))
    height = 1.0 + (width - 0.5) / shape[1] * shape[0] if both or narrow else 0.66 * width
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.05)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    panels = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, (title, values) in zip(panels, titles.items(), strict=True):
        shades = _plane(axes, x, y, values, clouds)
        axes.set_title(title, loc="left", fontsize=9.5, pad=6)
    bar = figure.colorbar(
        shades, ax=list(panels), location="bottom", fraction=0.05, pad=0.02, aspect=45, shrink=0.8
    )
    bar.set_ticks([0.0, 0.5, 1.0], labels=["D = 0, fake (×)", "1/2", "D = 1, real (•)"])
    bar.outline.set_visible(False)
    return png(figure)


def _plane(axes: Axes, x: Array, y: Array, values: Array, clouds: tuple[Array, Array]) -> Any:
    """A heat map with its contour of 1/2, points thinly over it."""
    shades = axes.pcolormesh(x, y, values, cmap=SHADES, vmin=0, vmax=1, shading="gouraud")
    if values.min() < 0.5 < values.max():
        axes.contour(x, y, values, levels=[0.5], colors=[INK], linewidths=0.8)
    for cloud, (mark, colour) in zip(clouds, (("o", "#00304d"), ("x", "#8a2b00")), strict=True):
        axes.plot(*_thin(cloud).T, mark, color=colour, ms=2.4, mew=0.8, alpha=0.7, ls="none")
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), aspect="equal")
    axes.xaxis.set_major_locator(MaxNLocator(5, prune="both"))
    axes.yaxis.set_major_locator(MaxNLocator(5, prune="both"))
    return shades


def _thin(cloud: Array) -> Array:
    return np.asarray(cloud, float).reshape(-1, 2)[:POINTS]


@styled
def convincing(
    most: Array, least: Array, logits: tuple[ArrayLike, ArrayLike], levels: int | None,
    width: float,
) -> bytes:  # fmt: skip
    """The samples that D takes for real most and least, with their logits below.

    Arguments:
        most, least: (m, C, H, W), integer levels or floats on the model's scale.
        logits: of both, (m,) each.
        levels: number of levels, for integers.
        width: inches.
    Returns:
        PNG.
    """
    columns = min(max(len(most), len(least)), 8 if width > NARROW else 4)
    blocks = (("most convincing", most, logits[0]), ("least convincing", least, logits[1]))
    cell = width / columns
    line, title = cell * most.shape[2] / most.shape[3] * 0.94 + 0.24, 0.3
    rows = [math.ceil(len(images) / columns) for _, images, _ in blocks]
    height = sum(rows) * line + len(blocks) * title
    figure, top = blank(width, height), height
    for (name, images, values), count in zip(blocks, rows, strict=True):
        figure.text(0, (top - 0.2) / height, name, fontsize=9.5)
        top -= title
        colours = pixels(images, levels)
        for index, value in enumerate(np.asarray(values, float)):
            row, column = divmod(index, columns)
            bottom = top - (row + 1) * line + 0.24
            box = (column / columns, bottom / height, 0.94 / columns, (line - 0.24) / height)
            axes = figure.add_axes(box)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.imshow(colours[index], interpolation="nearest")
            axes.set_xlabel(f"{value:+.2f}".replace("-", "−"), fontsize=9, labelpad=2, color=MUTED)
        top -= count * line
    return png(figure)
