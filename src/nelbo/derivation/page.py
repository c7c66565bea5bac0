"""The derivation as a page: prose, every identity with its figures, pictures; Markdown and HTML.

The words are in `templates/derivation.j2`, once; two files beside it say how they look in Markdown
(formulas in LaTeX, links into the source) and in HTML (formulas as plain text, pictures inside,
nothing loaded). The figures are those of `nelbo derive`, of the results that are passed in. Exact
values have six digits, so that rounding does not show.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import nelbo
from nelbo.derivation import chain, curves, drawings, printed
from nelbo.derivation.chain import Wrong
from nelbo.derivation.identity import Identity, Line, Result, Side
from nelbo.files import exhausted, hidden, write_file
from nelbo.shown import Picture, both

NAME = "derivation"
WIDTH = 84
"""Columns of figures in Markdown."""
ROUNDING = 1e-9
"""Exact values below it are shown as 0."""
TESTS = {
    "likelihood": "test_derivation_bound.py",
    "gaussian": "test_derivation_algebra.py",
    "objectives": "test_derivation_algebra.py",
    "estimation": "test_derivation_algebra.py",
    "tighter": "test_derivation_tighter.py",
    "conditioning": "test_derivation_tighter.py",
    "game": "test_derivation_game.py",
    "instrument": "test_derivation_game.py",
}
"""By chapter, the file in tests/ that runs its identities and breaks them."""
_OPPOSITE = {"=": "≠", "<=": "≰", ">=": "≱"}
"""What a line that disagrees shows."""


@dataclass(frozen=True)
class Measured:
    """The run whose figures a page shows.

    Arguments:
        name: of its directory. said: one line of what was measured on what. skipped: why there are
            no figures of an identity, by id.
    """

    name: str
    said: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)


@cache
def pictures() -> dict[str, Picture]:
    """The four pictures by name, for the page and for a phone; some seconds."""
    names = ("telescope", "density", "errors", "duel")
    return {
        name: both(partial(getattr(drawings, name), getattr(curves, name)())) for name in names
    }


def write(results: Sequence[Result], wrong: Sequence[Wrong], folder: Path) -> Path:
    """Write derivation.html, derivation.md and the pictures as PNGs.

    Arguments:
        results: of `chain.run`. wrong: of `chain.errata`. folder: is made if it is missing; the
            links of the Markdown are right for docs/ of the repository.
    Returns:
        Path of the HTML page.
    Raises:
        ResourceExhausted: no room to write.
    """
    drawn = pictures()
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        _replace(folder / f"{NAME}-{name}.png", picture.wide)
    _replace(folder / f"{NAME}.md", markdown(results, wrong).encode())
    return _written(folder, as_html(results, wrong, drawn))


def write_beside(
    results: Sequence[Result], run: Path, said: str = "", skipped: Mapping[str, str] | None = None
) -> Path:
    """Write derivation.html into a run directory: the page with the figures of that run.

    Arguments:
        results: of the run's own model and data. run: the directory.
        said, skipped: as of `Measured`.
    Returns:
        Path of the page.
    Raises:
        ResourceExhausted: no room to write.
    """
    about = Measured(run.resolve().name, said, skipped or {})
    return _written(run, as_html(results, (), pictures(), about))


def markdown(results: Sequence[Result], wrong: Sequence[Wrong]) -> str:
    """The page in Markdown, for docs/."""
    environment = _environment()
    environment.filters["prose"] = _linked
    return re.sub(r"\n{3,}", "\n\n", _render(environment, "derivation.md.j2", results, wrong))


def as_html(
    results: Sequence[Result],
    wrong: Sequence[Wrong],
    drawn: dict[str, Picture],
    run: Measured | None = None,
) -> str:
    """The page in HTML; `run` is the run whose figures these are."""
    environment = _environment()
    environment.filters["prose"] = _paragraphs
    style = "".join(
        environment.get_template(name).render() for name in ("report.css", "derivation.css")
    )
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    body = _render(environment, "derivation.html.j2", results, wrong, drawn=drawn, run=run)
    shell = environment.get_template("derivation.page.html.j2")
    return shell.render(body=Markup(body), style=Markup(style), digest=digest, run=run)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nelbo"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        figure=figure, rows=_rows, few=_few, link=_link, cell=_cell, test=_test, uri=_uri,
        code=_code, sentence=_sentence, opposite=_OPPOSITE.get,
    )  # fmt: skip
    return environment


def _render(
    environment: jinja2.Environment,
    dialect: str,
    results: Sequence[Result],
    wrong: Sequence[Wrong],
    **more: Any,
) -> str:
    return environment.get_template("derivation.j2").render(
        dialect=dialect,
        chapters=chain.CHAPTERS,
        identities={one.id: one for one in chain.IDENTITIES},
        results={result.identity.id: result for result in results},
        wrong=wrong,
        computed={one.erratum.id for one in wrong},
        later=chain.LATER,
        **{"run": None, **more},
    )


# --- figures -------------------------------------------------------------------------------------


def figure(side: Side) -> str:
    """A side's value: with its error, or six digits of an exact one."""
    if side.se:
        return printed.number(side)
    return "0" if abs(side.value) < ROUNDING else f"{side.value:.6g}"


def _few(result: Result) -> list[Line]:
    """The first line of every family, at most three."""
    first: dict[str, Line] = {}
    for line in result.lines:
        first.setdefault(line.family, line)
    return list(first.values())[:3]


def _rows(line: Line) -> str:
    """A line as text, the sides under each other."""
    unit = f" ({line.unit})" if line.unit not in ("nats", "") else ""
    what = f"{line.family}, {line.note}{unit}" if line.note else f"{line.family}{unit}"
    verdict = "agree" if line.agrees else "DISAGREE"
    rows = list(printed.beside(what, verdict, WIDTH, then=" " * 4))
    for place, side in enumerate(line.sides):
        sign = line.relation if place else ""
        rows += printed.beside(side.what, figure(side), WIDTH, f"{sign:>4} ", " " * 9)
    return "\n".join(rows)


# --- the source ----------------------------------------------------------------------------------


def _place(function: str) -> tuple[str, str]:
    """The file of a dotted name, as `bound.py`, and what it is called there.

    "nelbo.processes.gaussian.Gaussian.pair" -> "processes/gaussian.py", "Gaussian.pair".
    """
    parts, root = function.split(".")[1:], Path(nelbo.__file__).parent
    for size in range(len(parts), 0, -1):
        file = Path(*parts[:size]).with_suffix(".py")
        if (root / file).is_file():
            return file.as_posix(), ".".join(parts[size:])
    raise LookupError(f"no module of nelbo holds {function}")


def _link(function: str) -> str:
    """A function as a link of docs/*.md."""
    file, name = _place(function)
    return f"[`{name or file}`](../src/nelbo/{file})"


def _linked(text: str) -> str:
    """Prose in Markdown: [[nelbo.bound.bound]] becomes a link."""
    return re.sub(r"\[\[([\w.]+)\]\]", lambda found: _link(found[1]), text.strip())


def _code(text: str) -> str:
    """Text as code in Markdown."""
    return f"`{text}`"


def _sentence(text: str) -> str:
    """With a full stop, and a capital where it begins with a word and not with a letter."""
    word = re.match(r"[a-z]+(?=[ ,;:])", text)
    return f"{text[0].upper() if word else text[0]}{text[1:].rstrip('.')}."


def _cell(text: str) -> str:
    """Text as code in a cell of a Markdown table, where a bar would end it."""
    return f"`{text}`".replace("|", "\\|")


def _test(identity: Identity) -> str:
    """The file in tests/ of an identity."""
    chapter = next(c for c in chain.CHAPTERS if identity in c.identities)
    return TESTS[chapter.name]


# --- HTML ----------------------------------------------------------------------------------------


def _paragraphs(text: str) -> Markup:
    """Prose in HTML: paragraphs, `- ` lists and indented formulas, between empty lines."""
    blocks = re.split(r"\n\s*\n", text.strip("\n"))
    return Markup("\n".join(_block(block) for block in blocks if block.strip()))


def _block(block: str) -> str:
    if block.startswith("    "):
        rows = "\n".join(row[4:] for row in block.splitlines())
        return f'<pre class="formula">{html.escape(rows)}</pre>'
    if block.startswith("- "):
        items = re.split(r"\n- ", block[2:])
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
    return f"<p>{_inline(block)}</p>"


def _inline(text: str) -> str:
    escaped = html.escape(" ".join(text.split()))
    escaped = re.sub(r"\[\[([\w.]+)\]\]", r"<code>\1</code>", escaped)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", escaped)


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _written(folder: Path, page: str) -> Path:
    _replace(folder / f"{NAME}.html", page.encode())
    return folder / f"{NAME}.html"


def _replace(path: Path, data: bytes) -> None:
    """Write a file in one rename."""
    temporary = hidden(path, "tmp")
    try:
        with exhausted(path, len(data)):
            write_file(temporary, data)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
