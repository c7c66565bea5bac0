"""The comparison block of an evaluation as rows: K and −L, what they are compared with, L_null.

Everything is in the unit of the block, the larger the better. Figures without an error are exact
or published; they come from the evaluation's document, nothing is looked up here.
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
}


@dataclass(frozen=True)
class Line:
    """One figure of the comparison."""

    label: str
    entry: Json
    ours: bool = False


def ranked(document: Json) -> list[Line]:
    """What can be put on one axis, the best first: this model's figures and the references."""
    block = document.get("comparison", {})
    lines = [Line(OURS[name], block[name], True) for name in OURS if name in block]
    lines += [Line(name, {"mean": x}) for name, x in block.get("references", {}).items()]
    return sorted(lines, key=lambda line: -line.entry["mean"])


def about(document: Json) -> list[Line]:
    """The figures that say what K is worth, and those that this version has no place for."""
    block = {k: v for k, v in document.get("comparison", {}).items() if "mean" in _entry(v)}
    order = [*ABOUT, *(name for name in block if name not in ABOUT and name not in OURS)]
    return [
        Line(ABOUT.get(name, name.replace("_", " ")), block[name])
        for name in order
        if name in block
    ]


def _entry(value: object) -> Json:
    return value if isinstance(value, dict) else {}


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
