"""The identities as text: figures with their errors, sides with their relation, and a verdict.

    I7 telescoping: the log-ratios of a trajectory telescope
      Gaussian, the worst of 64 trajectories                    agree, apart by 4e-16
          sum_pairs [log q(x_s|x_0) - log q(x_t|x_0)]                     -3.14159265
        = log q(x_1|x_0) - log q(x_N|x_0)                                 -3.14159265

Rows are wrapped to a width, so that a narrow terminal shows the same. A row is text and the name
of a style.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence

from rich.cells import cell_len

from nelbo.console import clean, figure
from nelbo.derivation.chain import Wrong
from nelbo.derivation.identity import Line, Result, Side
from nelbo.estimate import Estimate

GOOD, BAD, HEAD, QUIET, PLAIN = "green", "bold red", "bold", "dim", ""
"""Styles."""
Row = tuple[str, str]
_LEAST = 16
"""Columns that the words beside a figure are given; with fewer the figure has its own row."""


def number(side: Side) -> str:
    """`3.0210 ± 0.0040`, or nine digits of a value without an error beyond rounding."""
    if side.se <= 1e-12 * abs(side.value) or not math.isfinite(side.value):
        return f"{side.value:.9g}"
    if not 1e-7 < side.se < 1e7:
        return f"{side.value:.4g} ± {side.se:.1g}"
    return figure(Estimate(side.value, side.se, math.nan, 0))


def verdict(line: Line) -> str:
    """`agree, apart by 4e-16` or `agree, 0.7 se apart`; `DISAGREE, ...`."""
    word = "agree" if line.agrees else "DISAGREE"
    gap, se = _apart(line)
    if line.relation != "=" and line.agrees:
        return word
    if not math.isfinite(gap):
        return f"{word}, not finite"
    if se > 0:
        return f"{word}, {gap / se:.1f} se apart"
    return f"{word}, to the last digit" if gap == 0 else f"{word}, apart by {gap:.1g}"


def _apart(line: Line) -> tuple[float, float]:
    """The largest difference of two neighbouring sides in standard errors, and that error."""
    found = []
    for a, b in zip(line.sides, line.sides[1:], strict=False):
        se = math.hypot(a.se, b.se) if line.paired_se is None else line.paired_se
        found.append((abs(a.value - b.value), se))
    return max(found, key=lambda pair: pair[0] / pair[1] if pair[1] > 0 else pair[0])


def beside(left: str, right: str, width: int, first: str = "", then: str = "") -> Iterator[str]:
    """Text with something at the right edge of its first row.

    Arguments:
        width: columns. first, then: what the first row begins with, and the others.
    """
    room = width - len(right) - 2 * bool(right)
    if right and room - len(first) < _LEAST:
        yield from _wrapped(left, width, initial_indent=first, subsequent_indent=then)
        yield right.rjust(width)
        return
    rows = _wrapped(left, room, initial_indent=first, subsequent_indent=then)
    rows = rows or [first]
    # an accent over a letter takes no column of its own
    gap = " " * (room - cell_len(rows[0]) + 2)
    yield f"{rows[0]}{gap}{right}" if right else rows[0]
    yield from rows[1:]


def _wrapped(
    text: str, width: int, initial_indent: str = "", subsequent_indent: str = ""
) -> list[str]:
    """Rows of at most `width` columns; a minus sign is no place to break."""
    return textwrap.wrap(
        text,
        max(width, 30),
        initial_indent=initial_indent,
        subsequent_indent=subsequent_indent,
        break_on_hyphens=False,
    )


def _at_spaces(latex: str, width: int) -> list[str]:
    """Rows that are broken where LaTeX has a space, which a line break is as well."""
    return textwrap.wrap(latex, width, break_long_words=False, break_on_hyphens=False)


def line_rows(line: Line, width: int) -> Iterator[Row]:
    """Family, verdict, and a row for each side."""
    what = f"{line.family}, {line.note}" if line.note else line.family
    what += f" ({line.unit})" if line.unit not in ("nats", "") else ""
    style = GOOD if line.agrees else BAD
    for row in beside(clean(what), verdict(line), width, "  ", "    "):
        yield row, style
    for place, side in enumerate(line.sides):
        sign = line.relation if place else ""
        for row in beside(clean(side.what), number(side), width, f"  {sign:>5} ", " " * 10):
            yield row, PLAIN


def head(result: Result, width: int) -> Iterator[Row]:
    """`I7 telescoping: ...`."""
    one = result.identity
    for row in _wrapped(f"{one.id} {one.name}: {one.title}", width, subsequent_indent="   "):
        yield row, HEAD


def result_rows(result: Result, width: int) -> Iterator[Row]:
    """An identity as one of the chain."""
    yield from head(result, width)
    if not result.lines:
        yield "  DISAGREE, there is no line that would show it", BAD
    for line in result.lines:
        yield from line_rows(line, width)


def whole_rows(
    result: Result,
    wrong: Sequence[Wrong],
    width: int,
    named: Sequence[Wrong] = (),
    wrap: bool = False,
) -> Iterator[Row]:
    """An identity with its statement, its steps and the wrong variants that belong to it.

    Arguments:
        wrong: after it. named: before it. wrap: LaTeX too, at its spaces; else it is one row.
    """
    one = result.identity
    for other in named:
        yield from wrong_rows(other, width)
        yield "", PLAIN
    yield from head(result, width)
    yield "", PLAIN
    yield from _paragraph(one.text, width)
    if one.assumes:
        yield from _paragraph(f"Holds where: {one.assumes}", width)
    yield "", PLAIN
    for place, step in enumerate(one.steps, 1):
        yield from _paragraph(f"{place}. {step}", width, "   ")
    yield "", PLAIN
    yield "LaTeX:", QUIET
    yield from ((row, QUIET) for row in (_at_spaces(one.latex, width) if wrap else [one.latex]))
    yield from _paragraph(f"Computed by: {', '.join(_functions(result))}", width, style=QUIET)
    yield from _paragraph(f"Source: {one.source}", width, style=QUIET)
    yield "", PLAIN
    for line in result.lines:
        yield from line_rows(line, width)
    for other in wrong:
        yield "", PLAIN
        yield from wrong_rows(other, width)


def _functions(result: Result) -> list[str]:
    """What computed the sides that are shown, or what the identity names."""
    found = [side.by for line in result.lines for side in line.sides if side.by]
    names = [name for by in found for name in by.split(", ") if name.startswith("nelbo.")]
    return list(dict.fromkeys(names)) or list(result.identity.functions)


def wrong_rows(wrong: Wrong, width: int) -> Iterator[Row]:
    """A wrong variant: as printed, as it should be, and by how far it misses."""
    one = wrong.erratum
    yield from _paragraph(f"{one.id}, a wrong variant of {one.identity}", width, style=HEAD)
    yield from _paragraph(f"  as printed: {one.printed}", width, "    ")
    yield from _paragraph(f"  right: {one.right}", width, "    ")
    yield from _paragraph(f"  why: {one.why}", width, "    ")
    rows = line_rows(wrong.line, width)
    if wrong.caught:
        yield from ((row, PLAIN) for row, _ in rows)
        yield "  it disagrees, as it has to", GOOD
    else:
        yield from ((row, BAD) for row, _ in rows)
        yield "  it AGREES: the check does not see it", BAD


def _paragraph(text: str, width: int, indent: str = "", style: str = PLAIN) -> Iterator[Row]:
    lead = " " * (len(text) - len(text.lstrip()))
    rows = _wrapped(text.strip(), width, initial_indent=lead, subsequent_indent=lead + indent)
    yield from ((row, style) for row in rows)
