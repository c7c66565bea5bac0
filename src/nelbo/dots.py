"""Values on one axis, a dot each: codes, bounds, entropies and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes as Axes
from matplotlib.ticker import MaxNLocator

from nelbo.figures import BLUE, INK, NARROW, RULE, VERMILION, canvas, png, styled


@dataclass(frozen=True)
class Row:
    """One line of a comparison, with the text beside its dot."""

    label: str
    value: float
    se: float
    """0 if the value is exact, nan if unknown."""
    text: str
    ours: bool = False

    @property
    def reach(self) -> float:
        """Length of the bar to either side, 2 se where it is known."""
        return 2 * self.se if self.se > 0 else 0.0


@styled
def comparison(rows: Sequence[Row], from_zero: bool, unit: str, width: float) -> bytes:
    """Values on one axis, a dot each with ± 2 se, the text beside it.

    Arguments:
        rows: from top to bottom.
        from_zero: lines lead from 0 to the dots, for code lengths, whose ratios mean something.
        unit: of all values.
        width: inches.
    Returns:
        PNG.
    """
    narrow = width <= NARROW
    figure, axes = canvas(width, 0.75 + len(rows) * (0.5 if narrow else 0.36))
    values = [row.value for row in rows]
    for place, row in enumerate(rows):
        _dot(axes, place, row, from_zero, narrow)
    low, high = (0.0, max(values)) if from_zero else _spread(rows)
    axes.set_xlim(low, high + (high - low) * (0.06 if narrow else 0.30))
    axes.set_ylim(len(rows) - 0.5, -0.72 if narrow else -0.55)
    axes.set_yticks([] if narrow else range(len(rows)), [] if narrow else [r.label for r in rows])
    axes.tick_params(axis="y", length=0, pad=8)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 6))
    axes.set_xlabel(unit)
    return png(figure)


def _dot(axes: Axes, place: int, row: Row, from_zero: bool, narrow: bool) -> None:
    colour = VERMILION if row.ours else BLUE
    if from_zero:
        axes.plot([0, row.value], [place, place], color=RULE, lw=1.4, zorder=1)
    if row.se == 0:
        axes.plot(row.value, place, "D", color=INK, ms=4.5)
    else:
        bar: dict[str, Any] = {"fmt": "o", "color": colour, "ms": 5.5, "capsize": 3, "lw": 1.2}
        axes.errorbar(row.value, place, xerr=row.reach or None, **bar)
    if narrow:
        above: dict[str, Any] = {
            "textcoords": "offset points",
            "xycoords": ("axes fraction", "data"),
        }
        axes.annotate(row.label, (0, place), xytext=(0, 7), ha="left", fontsize=9, **above)
        axes.annotate(row.text, (1, place), xytext=(0, 7), ha="right", fontsize=9, **above)
    else:
        end = (row.value + row.reach, place)
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center_baseline"}
        axes.annotate(row.text, end, xytext=(9, 0), **beside)


def _spread(rows: Sequence[Row]) -> tuple[float, float]:
    low = min(row.value - row.reach for row in rows)
    high = max(row.value + row.reach for row in rows)
    margin = 0.12 * (high - low) or 0.5
    return low - margin, high + margin
