"""The pictures of the derivation: each a PNG, drawn from the numbers of `curves`.

Blue is what one computes, vermilion what one might take for it, ink a value that both are held
against. Sums are drawn as stairs: each bar begins where the one before it ended.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from nelbo.derivation.curves import Density, Duel, Errors, Telescope
from nelbo.figures import (
    BLUE,
    DPI,
    GREEN,
    INK,
    MUTED,
    NARROW,
    SKY,
    VERMILION,
    Axes,
    canvas,
    ends,
    png,
    styled,
)

Array = NDArray[Any]
DASHED: Any = (0, (4, 3))


@styled
def telescope(found: Telescope, width: float) -> bytes:
    """Left: the pairs' log-ratios as stairs between the ends. Right: the bound as a sum of terms.

    Returns:
        PNG.
    """
    figure, left, right = _panels(width)
    _stairs(left, np.asarray(found.marginals))
    _sum(right, np.asarray(found.terms), found.likelihood, width <= NARROW)
    return png(figure)


def _panels(width: float) -> tuple[Figure, Axes, Axes]:
    """Two pairs of axes, side by side or, on a phone, one above the other."""
    narrow = width <= NARROW
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04, wspace=0.06, hspace=0.08)
    figure = Figure(figsize=(width, 5.4 if narrow else 3.1), dpi=DPI, layout=layout)
    one, two = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    return figure, one, two


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9.5, pad=9, x=0)


def _stairs(axes: Axes, levels: Array) -> None:
    """log q(x_t|x_0) of every latent, a bar for each pair, and one bar for all."""
    n = len(levels)
    axes.plot(range(1, n + 1), levels, "o", color=INK, ms=4.5, zorder=3)
    for i in range(1, n):
        axes.bar(i + 0.5, levels[i - 1] - levels[i], bottom=levels[i], width=0.62, color=SKY)
        value = levels[i - 1] - levels[i]
        _beside(axes, i + 0.5, max(levels[i - 1], levels[i]), value)
    axes.bar(n + 1, levels[0] - levels[-1], bottom=levels[-1], width=0.62, color=BLUE)
    _beside(axes, n + 1, max(levels[0], levels[-1]), levels[0] - levels[-1])
    for level in (levels[0], levels[-1]):
        axes.plot([1, n + 1.31], [level, level], color=MUTED, lw=0.8, ls=DASHED, zorder=0)
    names = [f"x_{i}" for i in range(1, n + 1)]
    axes.set_xticks([*range(1, n + 1), n + 1], [*names, "sum"])
    _title(axes, "log q(x_t|x_0), nats; a bar for each pair")
    low, high = float(levels.min()), float(levels.max())
    axes.set_ylim(low - 0.12 * (high - low), high + 0.16 * (high - low))


def _beside(axes: Axes, x: float, top: float, value: float) -> None:
    text = f"{value:+.2f}".replace("-", "−")
    axes.annotate(
        text, (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=8.5, zorder=3,
        bbox={"fc": "white", "ec": "none", "pad": 0.6},
    )  # fmt: skip


def _sum(axes: Axes, terms: Array, likelihood: float, narrow: bool) -> None:
    """The terms, each on top of those before it, and what they bound."""
    n = len(terms)
    colours = [MUTED, *[SKY] * (n - 2), VERMILION]
    starts = np.concatenate([[0.0], np.cumsum(terms)[:-1]])
    for place, (term, start, colour) in enumerate(zip(terms, starts, colours, strict=True)):
        axes.bar(place, term, bottom=start, width=0.68, color=colour)
        _beside(axes, place, max(start, start + term), term)
    total = float(terms.sum())
    axes.bar(n, total, width=0.68, color=BLUE)
    _beside(axes, n, total, total)
    axes.axhline(likelihood, color=INK, lw=0.9, ls=DASHED, zorder=0)
    axes.annotate(
        f"−log p(x_0) = {likelihood:.2f}", (-0.4, likelihood), (0, 3), textcoords="offset points",
        fontsize=8.5,
    )  # fmt: skip
    names = [f"KL_{i}" for i in range(n - 1, 1, -1)]
    axes.set_xticks(range(n + 1), ["prior", *names, "dec." if narrow else "decoder", "L"])
    axes.tick_params(axis="x", labelsize=8 if narrow else 8.5)
    axes.set_ylim(min(0.0, float(starts.min())), float((starts + terms).max()) * 1.13)
    _title(axes, "the bound L by term, nats")


@styled
def density(found: Density, width: float) -> bytes:
    """Where the nats are along log-SNR: the integrand, and the pairs of a chain as bars.

    Returns:
        PNG.
    """
    narrow = width <= NARROW
    figure, axes = canvas(width, 2.8 if narrow else 3.1)
    edges, heights = np.asarray(found.edges), np.asarray(found.chain)
    middles, widths = (edges[:-1] + edges[1:]) / 2, edges[:-1] - edges[1:]
    axes.bar(
        middles, heights, widths, color=SKY, alpha=0.45, lw=0.8, edgecolor="white",
        label=f"a chain of {len(edges)} latents",
    )  # fmt: skip
    axes.plot(found.logsnr, found.continuous, color=BLUE, label="continuous time")
    axes.set_xlim(float(edges[-1]), float(edges[0]))
    axes.set_ylim(0, float(heights.max()) * 1.1)
    _title(axes, "nats per unit of log-SNR")
    axes.xaxis.set_major_locator(MaxNLocator(8 if not narrow else 6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    ends(axes, "log-SNR")
    axes.legend(loc="upper left", handlelength=1.6, borderaxespad=0.1)
    return png(figure)


@styled
def errors(found: Errors, width: float) -> bytes:
    """KL against squared error: over a mean they agree on the best, over a deviation they do not.

    Returns:
        PNG.
    """
    figure, left, right = _panels(width)
    _over_means(left, found)
    _over_deviations(right, found)
    return png(figure)


def _over_means(axes: Axes, found: Errors) -> None:
    for style, w, kl in zip(
        (":", "-", "-."), found.widths, np.asarray(found.kl_mean), strict=True
    ):
        axes.plot(found.means, kl, color=BLUE, ls=style, lw=1.4, label=f"KL, σ = {w:g}")
    own = found.widths.index(1.0)
    axes.plot(
        found.means, found.square_mean[own], color=VERMILION, lw=1.4, label="½ E(X − Y)², σ = 1"
    )
    axes.plot([0, 0], [0, 2.2], color=MUTED, lw=0.8, ls=DASHED, zorder=0)
    axes.set_ylim(0, 3.6)
    axes.set_xlim(-2, 2)
    axes.set_xlabel("mean of Q (that of P is 0)")
    _title(axes, "over the mean: one minimiser")
    axes.legend(loc="upper center", fontsize=8.5, handlelength=1.8, borderaxespad=0.1)


def _over_deviations(axes: Axes, found: Errors) -> None:
    x, kl, square = (
        np.asarray(v) for v in (found.deviations, found.kl_deviation, found.square_deviation)
    )
    axes.plot(x, kl, color=BLUE, label="KL")
    axes.plot(x, square, color=VERMILION, label="½ E(X − Y)²")
    least = int(kl.argmin())
    axes.plot(x[least], kl[least], "o", color=BLUE, ms=5)
    best = math.sqrt(1 + found.off**2)
    axes.annotate(
        f"σ² = 1 + {found.off:g}² = {best**2:g}", (x[least], kl[least]), (0, 16),
        textcoords="offset points", fontsize=8.5, color=BLUE,
    )  # fmt: skip
    axes.plot(0, 0.5 * (1 + found.off**2), "o", color=VERMILION, ms=5, clip_on=False, zorder=4)
    axes.annotate(
        "σ = 0", (0, 0.5 * (1 + found.off**2)), (8, -11), textcoords="offset points",
        fontsize=8.5, color=VERMILION,
    )  # fmt: skip
    axes.set_ylim(0, 3.6)
    axes.set_xlim(0, float(x[-1]))
    axes.set_xlabel(f"deviation σ of Q (of P it is 1; means {found.off:g} apart)")
    _title(axes, "over the deviation: two")
    axes.legend(loc="upper center", handlelength=1.8, borderaxespad=0.1)


@styled
def duel(found: Duel, width: float) -> bytes:
    """Above: p, g and D*. Below: what each place pays, whose area is JSD.

    Returns:
        PNG.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, hspace=0.06)
    figure = Figure(figsize=(width, 4.9), dpi=DPI, layout=layout)
    above, below = figure.subplots(2, 1, sharex=True)
    _densities(above, found, width <= NARROW)
    _payoffs(below, found, width <= NARROW)
    return png(figure)


def _densities(axes: Axes, found: Duel, narrow: bool) -> None:
    for values, colour, name in ((found.p, BLUE, "p, data"), (found.g, VERMILION, "g, generator")):
        axes.fill_between(found.x, values, color=colour, alpha=0.22, lw=0)
        axes.plot(found.x, values, color=colour, lw=1.2, label=name)
    axes.plot(found.x, found.best, color=INK, lw=1.4, label="D* = p/(p + g)")
    axes.plot(found.x, found.other, color=GREEN, lw=1.2, ls=DASHED, label="another D")
    axes.axhline(0.5, color=MUTED, lw=0.7, ls=DASHED, zorder=0)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(float(found.x[0]), float(found.x[-1]))
    axes.set_yticks([0, 0.5, 1], ["0", "½", "1"])
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2 if narrow else 4,
        handlelength=1.6, borderaxespad=0.2, columnspacing=1.4,
    )  # fmt: skip


def _payoffs(axes: Axes, found: Duel, narrow: bool) -> None:
    paid = np.asarray(found.paid)
    axes.fill_between(found.x, paid, color=SKY, alpha=0.3, lw=0)
    label = f"D*: the area is JSD = {found.jsd:.3f}"
    axes.plot(found.x, paid, color=INK, lw=1.4, label=label)
    label = f"another D: log 2 + V/2 = {found.reached:.3f}"
    axes.plot(found.x, found.paid_other, color=GREEN, lw=1.2, ls=DASHED, label=label)
    axes.axhline(0, color=MUTED, lw=0.7)
    axes.set_ylim(top=float(paid.max()) * (1.45 if narrow else 1.1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("x")
    _title(axes, "paid at x, nats per unit of x")
    axes.legend(loc="upper left", handlelength=1.6, borderaxespad=0.1)
