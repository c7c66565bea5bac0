"""The comparison block of an evaluation as rows: K and −L, what they are compared with, L_null.

All but a few are in the unit of the block, the larger the better. Figures without an error are
exact or published; they come from the evaluation's document, nothing is looked up here.
"""

from __future__ import annotations

from dataclasses import dataclass

from nelbo.dots import Row
from nelbo.runfiles import Json
from nelbo.wording import estimate, shown

OURS = {"K": "K of this model", "minus_bound": "−L, the bound of this model"}
ABOUT = {
    "null": "L_null, pure noise alone",
    "K_minus_null": "K − L_null",
    "K_plus_bound": "K + L, expected",
    "gap": "gap: truth − (−L)",
    "gap_optimum": "gap of the exact model, same draws",
    "gap_ratio": "ratio of the two gaps, no unit",
    "bound_nats": "L, the bound in nats",
}
SETTING = ("conversion", "references", "sigma_levels", "dims_per_pixel")


@dataclass(frozen=True)
class Line:
    """One figure of the comparison."""

    label: str
    entry: Json
    ours: bool = False
    unit: str = ""
    """Where it is not that of the others."""


def is_picture(document: Json) -> bool:
    """Whether K is of dequantised images, another object than the bound of the levels."""
    return "conversion" in document.get("comparison", {})


def ranked(document: Json) -> list[Line]:
    """What can be put on one axis, the best first: this model's figures and the references."""
    block = document.get("comparison", {})
    ours = ("K",) if is_picture(document) else tuple(OURS)
    lines = [Line(OURS[name], block[name], True) for name in ours if name in block]
    lines += [Line(name, {"mean": x}) for name, x in block.get("references", {}).items()]
    return sorted(lines, key=lambda line: -line.entry["mean"])


def about(document: Json) -> list[Line]:
    """The figures that say what K is worth, and those that this version has no place for."""
    block = document.get("comparison", {})
    others = [name for name in block if name not in {*ABOUT, *OURS, *SETTING}]
    main = unit(document)
    return [_line(name, block[name], main) for name in [*ABOUT, *others] if name in block]


def _line(name: str, value: Json | float, main: str) -> Line:
    entry = value if isinstance(value, dict) else {"mean": value}
    unit = entry.get("unit", "bits/example")
    other = "" if unit in (main, "bits/example") else str(unit)
    return Line(ABOUT.get(name, name.replace("_", " ")), entry, unit=other)


def unit(document: Json) -> str:
    """bits/sequence for bits in a row, else the unit that is written."""
    written = [line.entry["unit"] for line in ranked(document) if "unit" in line.entry]
    shape = document["data"].get("shape", [])
    if written[:1] == ["bits/example"] and document["data"].get("levels") and len(shape) == 1:
        return "bits/sequence"
    return str(written[0]) if written else "bits/example"


def dots(document: Json) -> list[Row]:
    """The ranked figures for a chart."""
    return [
        Row(x.label, x.entry["mean"], estimate(x.entry).se, shown(x.entry), x.ours)
        for x in ranked(document)
    ]
