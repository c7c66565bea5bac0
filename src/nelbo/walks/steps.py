"""`nelbo evaluate --steps`: the bound on grids of few latents, predicted and evaluated.

For every number of latents, grid and variance: what the error curve of training examples predicts,
how far that is above the limit of refined grids, and what the evaluation of that very chain gives
on the part asked for. The limit, and the whole grid, are predictions alone.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from nelbo import console
from nelbo.commands import Evaluate
from nelbo.curve import Curve
from nelbo.errors import UsageError
from nelbo.estimate import Estimate
from nelbo.evaluation import evaluate
from nelbo.files import write_json_atomic
from nelbo.recipes.recipe import Subject
from nelbo.subsets import Subsets
from nelbo.variances import Posterior
from nelbo.walks import fitting
from nelbo.walks.documents import marked, opening, show
from nelbo.walks.stored import Stored, device_of, opened

OPTION = "--steps"
Combination = tuple[int, str, str]
"""Latents, grid, variance."""


def asked(options: Evaluate) -> bool:
    """Whether the options ask for the table.

    Raises:
        UsageError: they speak of it without --steps.
    """
    if options.steps is not None:
        return True
    if options.grid != "even" or options.variance != "model":
        raise UsageError("--grid and --variance belong to --steps: give it too, as --steps 10,50")
    return False


def sizes_of(text: str) -> list[int]:
    """The numbers of `10,25,50`.

    Raises:
        UsageError: it is no list of different positive numbers.
    """
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        raise UsageError(f"--steps {text}: give numbers of latents with commas, as 10,25,50")
    sizes = [int(part) for part in text.split(",")]
    if len(set(sizes)) < len(sizes):
        raise UsageError(f"--steps {text}: a number stands there twice")
    return sizes


def variances_of(text: str) -> list[str]:
    """The names of `posterior,optimal`.

    Raises:
        UsageError: one is not known, or stands there twice.
    """
    names = text.split(",")
    unknown = [name for name in names if name not in fitting.VARIANCES]
    if unknown or len(set(names)) < len(names):
        known = ", ".join(fitting.VARIANCES)
        raise UsageError(f"--variance {text}: give one or several of {known}, with commas")
    return names


def combinations(options: Evaluate) -> list[Combination]:
    """What is asked for, in the order of the table."""
    assert options.steps is not None
    grids = ["even", "optimal"] if options.grid == "both" else [options.grid]
    names = variances_of(options.variance)
    return [(k, grid, name) for k in sizes_of(options.steps) for grid in grids for name in names]


def run(options: Evaluate) -> dict[str, Any]:
    """`nelbo evaluate --steps`: open, fit, measure, write, print."""
    if options.calls is not None or options.importance is not None:
        raise UsageError("--steps measures every step of short grids: leave out --calls and such")
    asked_for = combinations(options)
    device = device_of(options.device)
    stored, options = opened(options, device)
    sizes, grids, names = (sorted({c[k] for c in asked_for}) for k in range(3))
    fitting.check(stored.subject, sizes, grids, names)  # type: ignore[arg-type]
    fitted = None
    if fitting.gaussian(stored.subject.model):
        fit = fitting.Fit(options.fit, options.seed, options.batch, device, options.quiet)
        fitted = fitting.curve_of(stored, fit)
    value = document(stored, options, asked_for, fitted, device)
    value = marked(stored, value)
    if stored.keeps:
        folder = stored.directory.evaluation
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / f"{name_of(stored, options)}.json", value)
    show(value, lines(value), options.json)
    return value


def name_of(stored: Stored, options: Evaluate) -> str:
    """The file's name: what was measured, so that another measurement never replaces it."""
    part = options.split if options.limit is None else f"{options.split}{options.limit}"
    what = f"{options.steps}-{options.grid}-{options.variance}".replace(",", "_")
    return f"steps-{what[:120]}-{part}-step{stored.step:08d}-fit{options.fit}-seed{options.seed}"


# --- the document --------------------------------------------------------------------------------


def document(
    stored: Stored,
    options: Evaluate,
    asked_for: list[Combination],
    fitted: Curve | None,
    device: str,
) -> dict[str, Any]:
    """The JSON document (schema 1)."""
    subject = stored.subject
    chosen = grids(subject, asked_for, fitted)
    found = [_measured(stored, options, c, chosen[c], fitted, device) for c in asked_for]
    names = list(dict.fromkeys(c[2] for c in asked_for))
    return {
        **opening(subject, stored.step, options.split or stored.part, found[0]["evaluated"]["n"]),
        "fit": None if fitted is None else {"examples": len(fitted.error), "split": "train"},
        "seed": options.seed,
        "steps": found,
        "full": [] if fitted is None else _full(stored, fitted, names),
        "continuous": None if fitted is None else _continuous(fitted),
    }


def grids(
    subject: Subject, asked_for: list[Combination], fitted: Curve | None
) -> dict[Combination, Tensor]:
    """The places that stay, for every combination; one search serves all sizes."""
    found: dict[str, Subsets] = {}
    most = max(c[0] for c in asked_for)
    for name in {c[2] for c in asked_for if c[1] == "optimal"}:
        variance = fitting.rule(subject.model, name, fitted)
        assert fitted is not None and variance is not None
        found[name] = fitted.subsets(variance, most)
    return {
        c: found[c[2]].best(c[0]) if c[1] == "optimal" else fitting.spread(subject, c[1], c[0])
        for c in asked_for
    }


def _measured(
    stored: Stored,
    options: Evaluate,
    what: Combination,
    kept: Tensor,
    fitted: Curve | None,
    device: str,
) -> dict[str, Any]:
    size, grid, name = what
    dataset, dims = stored.subject.dataset, stored.subject.dataset.dims
    assert options.split is not None
    model, times = fitting.chain(stored.subject, kept, name, fitted, device)
    with console.Meter(f"{size} latents, {grid}, {name}", 1, "calls", options.quiet) as meter:
        result = evaluate(
            model,
            getattr(dataset, options.split)[: options.limit],
            times,
            encode=dataset.encode,
            # uneven steps are no smooth sequence from whose roughness noise could be told
            replicates=None if grid == "even" else 2,
            batch=options.batch,
            seed=options.seed,
            offset=dataset.offset(),
            device=device,
            track=lambda done, total: meter.update(done, total=total),
        )
    terms = {n: e.bits_per_dim(dims).as_json() for n, e in result.estimates().items()}
    return {
        "latents": size,
        "grid": grid,
        "variance": name,
        "kept": kept.tolist(),
        **_predicted(stored, fitted, name, kept),
        "evaluated": terms["total"],
        "terms": terms,
        "calls_per_example": result.calls,
    }


def _predicted(stored: Stored, fitted: Curve | None, name: str, kept: Tensor) -> dict[str, Any]:
    """The prediction and its distance from the limit; nothing where only the network knows σ²."""
    variance = fitting.rule(stored.subject.model, name, fitted)
    if fitted is None or variance is None:
        return {"predicted": None, "gap": None}
    values = fitted.values(variance, kept)
    return {
        "predicted": _bits(values, fitted.dims),
        "gap": _bits(values - fitted.continuous(), fitted.dims),
    }


def _full(stored: Stored, fitted: Curve, names: list[str]) -> list[dict[str, Any]]:
    everything = torch.arange(len(fitted.times))
    rows = [
        {
            "latents": len(everything),
            "variance": name,
            **_predicted(stored, fitted, name, everything),
        }
        for name in names
    ]
    return [row for row in rows if row["predicted"] is not None]


def _continuous(fitted: Curve) -> dict[str, Any]:
    dims = fitted.dims
    limit = _bits(fitted.continuous(), dims)
    limit["resolution"] = Estimate(fitted.resolution(), 0.0, 0.0, 1).bits_per_dim(dims).mean
    if len(fitted.times) > 2:
        limit["richardson"] = _bits(fitted.richardson(Posterior())[0], dims)
    return limit


def _bits(values: Tensor, dims: int) -> dict[str, Any]:
    found: dict[str, Any] = Estimate.of(values).bits_per_dim(dims).as_json()
    return found


# --- for people ----------------------------------------------------------------------------------


def lines(value: dict[str, Any]) -> str:
    """The document as a table."""
    data, model, fit = value["data"], value["model"], value["fit"]
    head = (
        f"{data['name']}, {data['split']} split, n = {data['n']}, {data['dims']} dimensions; "
        f"bits/dim ± se\n"
        f"{model['parameterization']}, variance {model['variance']}, decoder {model['decoder']}\n"
        f"{model['grid']}; weights {model['weights']} of step {model['step']}\n"
    )
    fitted = f"predicted from {fit['examples']} training examples\n" if fit else ""
    rows = [_row(row["latents"], row["grid"], row) for row in value["steps"]]
    rows += [_row(row["latents"], "all", row) for row in value["full"]]
    if value["continuous"] is not None:
        limit = {"variance": "any", "predicted": value["continuous"], "gap": None}
        rows.append(_row("infinity", "-", limit))
    header = ["latents", "grid", "variance", "predicted", "gap", "evaluated", "± se_mc"]
    table = console.table(rows, header)
    parts = [console.clean(head + fitted) + "\n" + table]
    parts += [] if value["continuous"] is None else [_limit(value["continuous"])]
    return "\n\n".join(parts)


def _limit(found: dict[str, Any]) -> str:
    """How exact the limit is, and what extrapolation makes of it."""
    text = f"infinity: by trapezoids, off by about {found['resolution']:.4f}"
    if "richardson" not in found:
        return text
    return f"{text}\nextrapolated from two grids (no bound): {_figure(found['richardson'])}"


def _row(latents: int | str, grid: str, row: dict[str, Any]) -> list[str]:
    gap, evaluated = row["gap"], row.get("evaluated")
    noise = "" if evaluated is None else evaluated["se_mc"]
    return [
        str(latents),
        grid,
        row["variance"],
        _figure(row["predicted"]),
        "-" if gap is None else f"{gap['mean']:.4f}",
        _figure(evaluated),
        noise if isinstance(noise, str) else "?" if noise is None else f"{noise:.4f}",
    ]


def _figure(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    se = math.nan if entry["se"] is None else entry["se"]
    return console.figure(Estimate(entry["mean"], se, se, entry["n"], entry["unit"]))
