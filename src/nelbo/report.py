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
import shlex
from functools import partial
from pathlib import Path

import jinja2
from markupsafe import Markup

from nelbo import (
    compared,
    dots,
    figures,
    gamefigures,
    pictures,
    ratedistortion,
    remake,
    shown,
    wording,
)
from nelbo.errors import InputRefused
from nelbo.estimate import at_least, at_most
from nelbo.files import exhausted, hidden, write_file
from nelbo.runfiles import Array, Json, Run, load
from nelbo.shown import Picture, both

FIGURES = ("baselines", "truth", "comparison", "steps", "integrand", "learning", "real", "samples",
           "strip", "progressive", *shown.FIGURES)  # fmt: skip
BASELINES = {"uniform": "uniform coding", "histogram": "training histogram"}
IMAGES, POINTS, SEQUENCES = 64, 4000, 32


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
    drawn = _codes(run.evaluation)
    if "step_entropy_lower" in run.per_example:
        nats = run.per_example["step_entropy_lower"], run.per_example["step_entropy_upper"]
        lower, upper = (values / math.log(2) for values in nats)
        unit = compared.unit(run.evaluation)
        drawn["steps"] = both(partial(figures.entropies, lower, upper, unit))
    if run.evaluation and len(run.per_example.get("integrand_logsnr", ())) > 1:
        drawn["integrand"] = both(partial(figures.integrand, *_integrand(run)))
    if run.game and len(run.played) + len(run.certified):
        drawn["learning"] = both(partial(gamefigures.learning, run.played, run.certified))
    if not run.game and len(run.training) + len(run.validation):
        curves = (run.training, run.validation, run.data.get("levels") is not None)
        drawn["learning"] = both(partial(figures.learning, *curves))
    if run.progressive:
        drawn["progressive"] = both(partial(ratedistortion.curve, run.progressive))
    return drawn | shown.pictures(run) | _examples(run)


def _codes(document: Json) -> dict[str, Picture]:
    """The charts of code lengths against others."""
    charts: dict[str, tuple[list[dots.Row], bool, str]] = {}
    if document.get("baselines"):
        charts["baselines"] = _baselines(document), True, figures.UNIT
    if document.get("truth"):
        charts["truth"] = _truth(document), False, figures.UNIT
    if len(compared.ranked(document)) > 1:
        charts["comparison"] = compared.dots(document), False, compared.unit(document)
    return {name: both(partial(dots.comparison, *chart)) for name, chart in charts.items()}


def _examples(run: Run) -> dict[str, Picture]:
    drawn: dict[str, Picture] = {}
    levels = run.data.get("levels")
    room = POINTS if levels is None else SEQUENCES
    arrays = {name: _some(x, room) for name, x in run.samples.items() if name in FIGURES}
    vectors = arrays and arrays["samples"].ndim == 2
    limits = pictures.frame(*arrays.values()) if vectors else None
    for name, array in arrays.items():
        drawn[name] = Picture(pictures.picture(array, levels, limits))
    if run.strip:
        walks = (_one(run.strip["forward"]), _one(run.strip["reverse"]), run.strip["logsnr"])
        drawn["strip"] = both(partial(pictures.strip, *walks))
    return drawn


def _one(walk: Array) -> Array:
    """(k, C, H, W): the first of several trajectories of images; clouds (k, m, D) stay."""
    return walk[:, 0] if walk.ndim == 5 else walk


def _some(samples: Array, room: int) -> Array:
    """As many as the page has room for: a square of images, or so many vectors."""
    if samples.ndim == 2:
        return samples[:room]
    side = max(2, min(math.isqrt(IMAGES), pictures.GRID // samples.shape[-1]))
    return samples[: side * side]


def _integrand(run: Run) -> tuple[Array, Array, Array]:
    """Log-SNR, and the integrand with its se in bits/dim per unit of it."""
    unit = run.evaluation["data"]["dims"] * math.log(2)
    logsnr, mean, se = (run.per_example[f"integrand_{name}"] for name in ("logsnr", "mean", "se"))
    return logsnr, mean / unit, se / unit


def _baselines(document: Json) -> list[dots.Row]:
    rows = [(BASELINES.get(name, name), entry) for name, entry in document["baselines"].items()]
    return _rows(sorted(rows, key=lambda row: -row[1]["mean"]), document)


def _truth(document: Json) -> list[dots.Row]:
    truth = document["truth"]
    rows = [("entropy (exact)", truth["entropy"])]
    if "exact_denoiser" in truth:
        rows.append(("bound, exact denoiser", truth["exact_denoiser"]["total"]))
    return _rows(rows, document)


def _rows(others: list[tuple[str, Json]], document: Json) -> list[dots.Row]:
    rows = [*others, ("bound, this model", document["terms"]["total"])]
    return [
        dots.Row(
            label,
            entry["mean"],
            wording.estimate(entry).se,
            wording.shown(entry),
            entry is rows[-1][1],
        )
        for label, entry in rows
    ]


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
            commands=remake.commands(run),
            training=remake.training(run),
            comparing=remake.comparison(run),
            compared=compared,
            here=shlex.quote(str(run.path)),
            derivation=(run.path / "derivation.html").is_file(),
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
        finalize=wording.printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (wording.shown, wording.noise, wording.flat, wording.duration, wording.nats,
               wording.spread, at_least, at_most)  # fmt: skip
    environment.filters.update({f.__name__: f for f in filters}, uri=_uri, rejection=_rejection)
    return environment


def _rejection(alpha: float) -> float:
    """The log e-value from which on p = g is rejected."""
    return -math.log(alpha)


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
