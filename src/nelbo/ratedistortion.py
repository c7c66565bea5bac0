"""The figure of progressive coding: what is left to guess against what has been sent."""

from __future__ import annotations

from typing import Any

import numpy as np

from nelbo.figures import BLUE, MUTED, NARROW, SKY, UNIT, canvas, png, styled
from nelbo.runfiles import Json


@styled
def curve(document: Json, width: float) -> bytes:
    """Root mean squared error of x̂_0 against the rate, ± 2 se both ways, log-SNR beside points.

    Arguments:
        document: of `nelbo evaluate --progressive`. width: inches.
    Returns:
        PNG.
    """
    points = document["points"]
    rate, rmse = ([p[name]["mean"] for p in points] for name in ("rate", "rmse"))
    wide, high = ([2 * p[name]["se"] for p in points] for name in ("rate", "rmse"))
    figure, axes = canvas(width, 3.2 if width > NARROW else 2.9)
    line = {"color": BLUE, "marker": "o", "ms": 3.2, "lw": 1.2}
    bars: dict[str, Any] = {**line, "ecolor": SKY, "elinewidth": 1.1, "capsize": 0}
    axes.errorbar(rate, rmse, yerr=high, xerr=wide, **bars)
    for k in _labelled(rate, rmse, 7 if width > NARROW else 5):
        text = f"{points[k]['logsnr']:.1f}".replace("-", "−")
        axes.annotate(text, (rate[k], rmse[k]), (5, 4), textcoords="offset points", color=MUTED,
                      fontsize=8.5)  # fmt: skip
    axes.set_ylim(0, 1.08 * max(rmse))
    axes.set_xlim(-0.02 * max(rate), 1.06 * max(rate))
    axes.set_xlabel(f"rate, {UNIT}")
    axes.set_title(f"RMSE, {points[0]['rmse']['unit']}", loc="left", fontsize=9.5, pad=9, x=0)
    axes.text(1, 0.98, "beside points: log-SNR", transform=axes.transAxes, ha="right", va="top",
              color=MUTED, fontsize=8.5)  # fmt: skip
    return png(figure)


def _labelled(rate: list[float], rmse: list[float], most: int) -> list[int]:
    """Points whose labels have room: evenly far apart along the curve."""
    x, y = (np.asarray(v) / max(max(v), 1e-12) for v in (rate, rmse))
    way = np.concatenate([[0.0], np.hypot(np.diff(x), np.diff(y)).cumsum()])
    marks = np.linspace(0, way[-1], most)
    return sorted({int(np.abs(way - mark).argmin()) for mark in marks})
