"""One self-contained page from the files of a run directory, and its figures as PNGs beside it.

Nothing is computed here but changes of unit, nats/example = dims · log 2 · bits/dim, and nothing
is read but the run's own files: the page says what was written down, with its errors. It holds no
script and asks the network for nothing; whatever comes from the run (names, paths, messages) is
text, escaped, without control characters. Parts whose files are not there yet are named with the
command that makes them.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nelbo import figures, pictures
from nelbo.errors import InputRefused
from nelbo.estimate import Estimate
from nelbo.files import exhausted, hidden, write_file
from nelbo.runfiles import Array, Json, Run, load

FIGURES = ("baselines", "truth", "integrand", "learning", "real", "samples", "strip")
BASELINES = {"uniform": "uniform coding", "histogram": "training histogram"}
ASIDE = frozenset({"path", "out", "resume"})
IMAGES, POINTS = 64, 4000
NEGLIGIBLE = 0.0001  # errors below half of it are not spelled out, only in the data elements


@dataclass(frozen=True)
class Picture:
    """One figure as PNGs: for the page, and for a phone where that needs another layout."""

    wide: bytes
    narrow: bytes | None = None

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height, from the PNG's header."""
        return int.from_bytes(self.wide[16:20], "big"), int.from_bytes(self.wide[20:24], "big")


def write(run: Path) -> Path:
    """Write report.html and report/*.png from the files of a run directory.

    Arguments:
        run: the run directory; only its own files are read.
    Returns:
        Path of the page.
    Raises:
        InputRefused: it is no run directory, or a file in it cannot be understood.
        ResourceExhausted: no room to write.
    """
    source = load(run)
    drawn = draw(source)
    page = render(source, drawn)
    (run / "report").mkdir(exist_ok=True)
    for name in FIGURES:
        _replace(run / "report" / f"{name}.png", drawn[name].wide if name in drawn else None)
    _replace(run / "report.html", page.encode())
    return run / "report.html"


def _replace(path: Path, data: bytes | None) -> None:
    """Write a file in one rename; without data, remove the one of an earlier report."""
    if data is None:
        path.unlink(missing_ok=True)
        return
    temporary = hidden(path, "tmp")
    try:
        with exhausted(path, len(data)):
            write_file(temporary, data)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def draw(run: Run) -> dict[str, Picture]:
    """Every figure that the run's files allow, by name."""
    drawn: dict[str, Picture] = {}
    document = run.evaluation
    if document.get("baselines"):
        drawn["baselines"] = _both(partial(figures.comparison, _baselines(document), True))
    if document.get("truth"):
        drawn["truth"] = _both(partial(figures.comparison, _truth(document), False))
    if document and len(run.per_example.get("integrand_logsnr", ())) > 1:
        drawn["integrand"] = _both(partial(figures.integrand, *_integrand(run)))
    if len(run.training) + len(run.validation):
        curves = (run.training, run.validation, run.data.get("levels") is not None)
        drawn["learning"] = _both(partial(figures.learning, *curves))
    return drawn | _examples(run)


def _both(drawing: Callable[[float], bytes]) -> Picture:
    return Picture(drawing(figures.WIDE), drawing(figures.NARROW))


def _examples(run: Run) -> dict[str, Picture]:
    drawn: dict[str, Picture] = {}
    arrays = {name: _some(array) for name, array in run.samples.items() if name in FIGURES}
    vectors = arrays and arrays["samples"].ndim == 2
    limits = pictures.frame(*arrays.values()) if vectors else None
    for name, array in arrays.items():
        drawn[name] = Picture(pictures.picture(array, run.data.get("levels"), limits))
    if run.strip:
        walks = (_one(run.strip["forward"]), _one(run.strip["reverse"]), run.strip["logsnr"])
        drawn["strip"] = _both(partial(pictures.strip, *walks))
    return drawn


def _one(walk: Array) -> Array:
    """(k, C, H, W): the first of several trajectories of images; clouds (k, m, D) stay."""
    return walk[:, 0] if walk.ndim == 5 else walk


def _some(samples: Array) -> Array:
    """As many as the page has room for: a square of images, or a cloud of points."""
    if samples.ndim == 2:
        return samples[:POINTS]
    side = max(2, min(math.isqrt(IMAGES), pictures.GRID // samples.shape[-1]))
    return samples[: side * side]


def _integrand(run: Run) -> tuple[Array, Array, Array]:
    """Log-SNR, and the integrand with its se in bits/dim per unit of it."""
    unit = run.evaluation["data"]["dims"] * math.log(2)
    logsnr, mean, se = (run.per_example[f"integrand_{name}"] for name in ("logsnr", "mean", "se"))
    return logsnr, mean / unit, se / unit


def _baselines(document: Json) -> list[figures.Row]:
    rows = [(BASELINES.get(name, name), entry) for name, entry in document["baselines"].items()]
    return _rows(sorted(rows, key=lambda row: -row[1]["mean"]), document)


def _truth(document: Json) -> list[figures.Row]:
    truth = document["truth"]
    rows = [("entropy (exact)", truth["entropy"])]
    if "exact_denoiser" in truth:
        rows.append(("bound, exact denoiser", truth["exact_denoiser"]["total"]))
    return _rows(rows, document)


def _rows(others: list[tuple[str, Json]], document: Json) -> list[figures.Row]:
    rows = [*others, ("bound, this model", document["terms"]["total"])]
    return [
        figures.Row(label, entry["mean"], estimate(entry).se, shown(entry), entry is rows[-1][1])
        for label, entry in rows
    ]


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


def duration(seconds: float) -> str:
    """`48 s`, `12 min 5 s`, `3 h 20 min`: the two largest units."""
    t = round(seconds)
    parts = ((t // 3600, "h"), (t // 60 % 60, "min"), (t % 60, "s"))
    first = next((i for i, (n, _) in enumerate(parts) if n), 2)
    return " ".join(f"{n} {unit}" for n, unit in parts[first : first + 2] if n) or "0 s"


def render(run: Run, drawn: dict[str, Picture]) -> str:
    """The page as HTML.

    Raises:
        InputRefused: a file of the run lacks something that the page shows.
    """
    environment = _environment()
    style = environment.get_template("report.css").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    try:
        return environment.get_template("report.html.j2").render(
            run=run,
            name=run.path.resolve().name,
            drawn=drawn,
            nats=math.log(2) * run.evaluation["data"]["dims"] if run.evaluation else None,
            where=figures.interval(*_integrand(run)[:2]) if "integrand" in drawn else None,
            commands=commands(run),
            training=training(run),
            here=shlex.quote(str(run.path)),
            style=Markup(style),  # from the package: no text of the run is in it
            digest=digest,
        )
    except (jinja2.UndefinedError, KeyError) as error:
        raise InputRefused(f"{run.path}: a file of this run lacks a part ({error})") from error


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nelbo"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=shown, noise=noise, flat=flat, duration=duration, uri=_uri)
    return environment


def _finalize(value: Any) -> Any:
    """Text without control, direction and surrogate characters; markup of our own stays."""
    if isinstance(value, Markup):
        return value
    return "".join(c for c in str(value) if c in "\t\n" or unicodedata.category(c)[0] != "C")


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


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


def commands(run: Run) -> list[str]:
    """What to type, in a clone of the repository, to make this run and its figures again."""
    commit, here = run.environment.get("commit"), shlex.quote(str(run.path))
    calls = re.search(r"-calls(\d+)-", run.measured.name)
    return [
        *([f"git checkout {shlex.quote(commit)}"] if commit else []),
        "pip install -c constraints.txt .",
        training(run),
        f"nelbo evaluate {here}" + (f" --calls {calls[1]}" if calls else ""),
        f"nelbo sample {here}",
        f"nelbo report {here}",
    ]


def training(run: Run) -> str:
    """The command that was typed, if the run kept it, else one of the same options."""
    typed = shlex.split(run.environment.get("command", ""))
    if typed[:2] == ["nelbo", "train"]:
        return shlex.join(word for word in typed if word != "--resume")
    options = run.recipe.get("options", {})
    path = [str(options["path"])] if options.get("path") is not None else []
    words = ["nelbo", "train", run.recipe["recipe"], *path, "--out", str(run.path)]
    for name, value in options.items():
        words += [] if name in ASIDE else _option(name, value)
    return shlex.join(words)


def _option(name: str, value: Any) -> Iterator[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        yield f"--{flag}" if value else f"--no-{flag}"
    elif isinstance(value, Mapping):
        for part, inner in value.items():
            yield from _option(f"{name}.{part}", inner)
    else:
        yield from (f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value)]))
