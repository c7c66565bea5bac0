"""Figures and records as words: values with their errors, durations, nested records as rows."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from nelbo.estimate import Estimate
from nelbo.runfiles import Json

NEGLIGIBLE = 0.0001  # errors below half of it are not spelled out, only in the data elements


def estimate(entry: Json, factor: float = 1.0) -> Estimate:
    """An entry {"mean", "se", "se_mc", "n"} times a factor; no se is exact, null is unknown."""
    numbers = (entry["mean"], entry.get("se", 0.0), entry.get("se_mc", 0.0))
    mean, se, se_mc = (math.nan if x is None else factor * x for x in numbers)
    return Estimate(mean, se, se_mc, entry.get("n", 0), "")


def shown(entry: Json, factor: float = 1.0) -> str:
    """`1.764 ± 0.012`: two digits of the error; `4.087` where there is none."""
    value = estimate(entry, factor)
    if value.se == 0:
        text = f"{value.mean:.4g}"
    elif value.se < NEGLIGIBLE / 2:
        text = f"{value.mean:.4f} ± <{NEGLIGIBLE:g}"
    else:
        text = str(value).partition("  (n=")[0]
    return text.replace("-", "−")


def noise(entry: Json, factor: float = 1.0) -> str:
    """The part of the error from noise and time draws, with two digits; ? if unknown."""
    se_mc = estimate(entry, factor).se_mc
    if not math.isfinite(se_mc):
        return "?"
    return f"{se_mc:.{max(0, 1 - int(f'{se_mc:.1e}'.partition('e')[2]))}f}" if se_mc else "0"


def nats(value: float | None, digits: int = 4) -> str:
    """`0.1014`, `−0.0003`; ? where it is not known."""
    if value is None or not math.isfinite(value):
        return "?"
    return f"{value:z.{digits}f}".replace("-", "−")


def spread(entry: Json) -> str:
    """`0.0123 ± 0.0045` of {"mean", "sd"}: two digits of the deviation, at most eight places."""
    sd = entry["sd"]
    if not sd:
        return shown(entry)
    digits = min(8, max(0, 1 - math.floor(math.log10(sd))))
    return f"{entry['mean']:z.{digits}f} ± {sd:.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """`48 s`, `12 min 5 s`, `3 h 20 min`: the two largest units."""
    t = round(seconds)
    parts = ((t // 3600, "h"), (t // 60 % 60, "min"), (t % 60, "s"))
    first = next((i for i, (n, _) in enumerate(parts) if n), 2)
    return " ".join(f"{n} {unit}" for n, unit in parts[first : first + 2] if n) or "0 s"


def flat(record: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Rows (dotted name, text) of a nested record, in its order."""
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from flat(dict(value), f"{prefix}{name}.")
        else:
            yield prefix + name, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)) and value:
        return ", ".join(map(_text, value))
    return "none" if value in (None, [], {}, "") else str(value)


def printable(value: Any) -> Any:
    """Text without control, direction and surrogate characters; markup of our own stays."""
    if isinstance(value, Markup):
        return value
    return "".join(c for c in str(value) if c in "\t\n" or unicodedata.category(c)[0] != "C")
