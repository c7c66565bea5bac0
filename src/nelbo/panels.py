"""Rows of scores with their floor, as JSON and as text.

A score of generated against real rows stands beside the same score of real against real rows, both
with the spread over seeds; n, the features and their hash stand below the table.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from dataclasses import dataclass
from typing import Any

from nelbo.console import table

COLUMNS = 80
BETTER = {
    "kid": "lower",
    "fid": "lower",
    "precision": "higher",
    "recall": "higher",
    "density": "near 1",
    "coverage": "higher",
    "sliced_w2_squared": "lower",
    "mmd2": "lower",
    "mmd_p": "higher",
    "training_distance_ratio": "near 1",
}
"""Which way a perfect sampler lies; its own figures are those of real against real."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    sd: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least two values; the deviation has n - 1 below."""
        return cls(statistics.fmean(values), statistics.stdev(values))

    def __str__(self) -> str:
        """`0.0123 ± 0.0045`: two digits of the deviation."""
        if self.sd == 0:
            return f"{self.mean:.4g} ± 0"
        digits = min(8, max(0, 1 - math.floor(math.log10(self.sd))))
        return f"{self.mean:z.{digits}f} ± {self.sd:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """One score: of fake against real, and of real against real."""

    name: str
    fake: Spread
    real: Spread

    @property
    def better(self) -> str:
        """ "lower", "higher" or "near 1"."""
        return BETTER[self.name]

    def as_json(self) -> dict[str, Any]:
        """{name, fake, real, better}."""
        both = {"fake": self.fake, "real": self.real}
        spreads = {side: {"mean": s.mean, "sd": s.sd} for side, s in both.items()}
        return {"name": self.name, **spreads, "better": self.better}


@dataclass(frozen=True)
class Panel:
    """All scores on one extractor.

    Arguments:
        features: the extractor as JSON. n: rows on either side. seeds: their number.
        skipped: name of a score -> why it has no row.
        spread: what varies between seeds, in words.
    """

    features: dict[str, Any]
    n: int
    seeds: int
    rows: tuple[Row, ...]
    skipped: dict[str, str]
    spread: str

    def row(self, name: str) -> Row:
        """The row of a score.

        Raises:
            KeyError: it has none; see `skipped`.
        """
        found = {row.name: row for row in self.rows}
        return found[name]

    def as_json(self) -> dict[str, Any]:
        """{features, n, seeds, rows, skipped, spread}."""
        return {
            "features": self.features,
            "n": self.n,
            "seeds": self.seeds,
            "rows": [row.as_json() for row in self.rows],
            "skipped": self.skipped,
            "spread": self.spread,
        }

    def text(self) -> str:
        """A table of at most 80 columns, with n, features and hash below it."""
        cells = [[row.name, str(row.fake), str(row.real), row.better] for row in self.rows]
        shown = self.features
        scores = table(cells, ["score", "fake vs. real", "real vs. real", "better"])
        lines = [
            f"n = {self.n} on both sides, mean ± sd over {self.seeds} seeds",
            self.spread,
            f"features: {shown['name']} ({shown['dims']}), sha256 {shown['hash'][:16]}",
            *([shown["note"]] if shown["note"] else []),
            *(f"{name}: not computed. {why}" for name, why in self.skipped.items()),
        ]
        return "\n".join([scores, "", *(part for line in lines for part in _wrapped(line))])


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, COLUMNS) if len(line) > COLUMNS else [line]
