"""The figures of the report: each a PNG, drawn from arrays alone.

Axes of noise are log-SNR, noise on the left and data on the right. Bands and bars are two standard
errors wide on either side. Colours are those of Okabe and Ito (2008), told apart by every kind of
colour vision and by their lightness in print. A figure is drawn for a width in inches, at 100 CSS
pixels to the inch and twice that in pixels, so that its letters keep their size on a phone.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes as Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

WIDE, NARROW = 7.2, 3.44
DPI = 200
UNIT = "bits/dim"
PLAIN: dict[str, Any] = {"Software": None}  # the same figure is the same file
INK, MUTED, RULE = "#1c2127", "#5d6673", "#d5dae0"
BLUE, VERMILION, SKY, GREEN = "#0072b2", "#d55e00", "#56b4e9", "#009e73"

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}

styled = matplotlib.rc_context(STYLE)  # decorates what draws


def interval(logsnr: ArrayLike, mean: ArrayLike) -> tuple[float, float, float] | None:
    """The log-SNR below which 10, 50 and 90 % of ∫ mean d(log-SNR) lie; None if it is not > 0.

    Arguments:
        logsnr, mean: (m,), m ≥ 2, in any order.
    """
    order = np.argsort(logsnr)
    x, y = np.asarray(logsnr, float)[order], np.asarray(mean, float)[order].clip(min=0)
    mass = np.concatenate([[0.0], np.cumsum((y[1:] + y[:-1]) / 2 * np.diff(x))])
    if not mass[-1] > 0:
        return None
    low, middle, high = np.interp([0.1, 0.5, 0.9], mass / mass[-1], x)
    return float(low), float(middle), float(high)


@styled
def integrand(logsnr: ArrayLike, mean: ArrayLike, se: ArrayLike, width: float) -> bytes:
    """The bound's density over log-SNR ± 2 se, filled where 80 % of its area lies.

    Arguments:
        logsnr, mean, se: (m,), mean and se in bits/dim per unit of log-SNR.
        width: inches.
    Returns:
        PNG.
    """
    order = np.argsort(logsnr)
    x, y, error = (np.asarray(values, float)[order] for values in (logsnr, mean, se))
    figure, axes = canvas(width, 2.9 if width > NARROW else 2.7)
    axes.fill_between(x, y - 2 * error, y + 2 * error, color=BLUE, alpha=0.28, lw=0)
    axes.plot(x, y, color=BLUE)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(min(0.0, float((y - 2 * error).min())), float((y + 2 * error).max()) * 1.16)
    _mark(axes, x, y)
    _above(axes, f"{UNIT} per unit of log-SNR")
    axes.xaxis.set_major_locator(MaxNLocator(8 if width > NARROW else 6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    ends(axes, "log-SNR")
    return png(figure)


def _mark(axes: Axes, x: Array, y: Array) -> None:
    where = interval(x, y)
    if where is None:
        return
    low, middle, high = where
    inside = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    axes.fill_between(inside, np.interp(inside, x, y), color=SKY, alpha=0.25, lw=0)
    top = axes.get_ylim()[1]
    axes.plot([middle, middle], [0, np.interp(middle, x, y)], color=INK, lw=0.8, ls=(0, (3, 3)))
    axes.annotate("", (low, top * 0.95), (high, top * 0.95), arrowprops=_span())
    axes.annotate(
        "80 % of the bits", ((low + high) / 2, top * 0.95), (0, 4), textcoords="offset points",
        ha="center", fontsize=9,
    )  # fmt: skip


def _span() -> dict[str, Any]:
    return {"arrowstyle": "|-|,widthA=.25,widthB=.25", "lw": 0.8, "color": INK, "shrinkA": 0,
            "shrinkB": 0}  # fmt: skip


@styled
def learning(training: Array, validation: Array, ratios: bool, width: float) -> bytes:
    """Training loss, smoothed, and validation bounds ± 2 se.

    Arguments:
        training: (m, 2) of step, bits/dim. validation: (k, 3) of step, mean, se; nan is unknown.
        ratios: the values are code lengths, whose ratios mean something; densities are not.
        width: inches.
    Returns:
        PNG.
    """
    figure, axes = canvas(width, 2.9 if width > NARROW else 2.7)
    seen = np.concatenate([smoothed(training[:, 1]), validation[:, 1]])
    _learning_axes(axes, np.concatenate([training[:, 0], validation[:, 0]]), seen, ratios)
    if len(training):
        axes.plot(*training.T, color=SKY, lw=0.6, alpha=0.5)
        smooth = smoothed(training[:, 1])
        axes.plot(training[:, 0], smooth, color=BLUE, label="training loss, smoothed")
    if len(validation):
        at, mean, se = validation.T
        bars: dict[str, Any] = {
            "fmt": "o",
            "color": VERMILION,
            "ms": 4.5,
            "capsize": 2.5,
            "lw": 1.1,
        }
        axes.errorbar(at, mean, yerr=2 * se, label="validation bound ± 2 se", **bars)
    axes.set_xlabel("step")
    _above(axes, UNIT)
    axes.legend(loc="upper right", handlelength=1.6, borderaxespad=0.1)
    return png(figure)


@styled
def entropies(lower: ArrayLike, upper: ArrayLike, unit: str, width: float) -> bytes:
    """Bounds on the entropy of every reverse step, the band between them filled.

    Arguments:
        lower, upper: (N − 1,) of the steps from t = 2, ..., N to the one before, in `unit`.
        width: inches.
    Returns:
        PNG.
    """
    low, high = np.asarray(lower, float), np.asarray(upper, float)
    step = np.arange(2, len(low) + 2)
    figure, axes = canvas(width, 2.9 if width > NARROW else 2.7)
    mark = "o" if len(step) <= 40 else ""
    axes.fill_between(step, low, high, color=SKY, alpha=0.25, lw=0)
    axes.plot(step, high, color=VERMILION, marker=mark, ms=3, label="upper bound")
    axes.plot(step, low, color=BLUE, marker=mark, ms=3, label="lower bound")
    margin = 0.03 * (len(step) - 1) or 0.5
    axes.set_xlim(step[-1] + margin, step[0] - margin)
    _above(axes, unit)
    axes.xaxis.set_major_locator(MaxNLocator(8 if width > NARROW else 5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    ends(axes, "step t")
    axes.legend(loc="best", handlelength=1.6, borderaxespad=0.1)
    return png(figure)


def ends(axes: Axes, label: str) -> None:
    """Name the horizontal axis and what lies at its ends."""
    words = ((0.0, "left", "← noise"), (0.5, "center", label), (1.0, "right", "data →"))
    for place, side, word in words:
        below: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "ha": side,
        }
        axes.annotate(word, (place, 0), (0, -29), **below)


def smoothed(values: Array) -> Array:
    """Mean over i ± i/10, a window of one width on a log axis; straight lines stay.

    Arguments:
        values: (m,).
    Returns:
        (m,).
    """
    index = np.arange(len(values))
    reach = np.minimum(1 + index // 10, np.minimum(index, index[::-1]))
    total = np.concatenate([[0.0], np.cumsum(values)])
    smooth: Array = (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)
    return smooth


def _learning_axes(axes: Axes, steps: Array, seen: Array, ratios: bool) -> None:
    """Log scales where the range asks for them; the limits follow what is read, not the noise."""
    low, high = float(np.nanmin(seen)), float(np.nanmax(seen))
    if steps.min() > 0 and steps.max() >= 30 * steps.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    if ratios and low > 0 and high > 3 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / 1.12, high * 1.25)
    else:
        margin = 0.08 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + 2 * margin)


def _above(axes: Axes, label: str) -> None:
    """Name the vertical axis in level letters, at its top."""
    axes.set_title(label, loc="left", fontsize=9.5, pad=9, x=0)


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    return Figure(figsize=(width, height), dpi=DPI)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes that fills it."""
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    return figure, figure.subplots()


def png(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata=PLAIN)
    return buffer.getvalue()


def png_of(colours: Array) -> bytes:
    """(H, W, 3) uint8 as a PNG, one pixel for each."""
    buffer = io.BytesIO()
    imsave(buffer, colours, format="png", metadata=PLAIN)
    return buffer.getvalue()
