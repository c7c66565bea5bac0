"""Evaluate: a run's model, its test data, and a document in which every figure has its error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from nelbo import console
from nelbo.commands import Evaluate
from nelbo.data.base import Dataset
from nelbo.data.part import head
from nelbo.errors import UsageError
from nelbo.estimate import Estimate
from nelbo.evaluation import TERMS, Evaluation
from nelbo.files import write_json_atomic
from nelbo.likelihood import ImportanceWeighted
from nelbo.recipes.recipe import Subject
from nelbo.walks import comparison, devices, weighted
from nelbo.walks.documents import marked, opening, show
from nelbo.walks.measuring import Request, measure
from nelbo.walks.stored import (
    Stored,
    device_of,
    opened,
    save_arrays,
)


def document(subject: Subject, step: int, request: Request, result: Evaluation) -> dict[str, Any]:
    """The JSON document of an evaluation (schema 1)."""
    dataset = subject.dataset
    return {
        **opening(subject, step, request.split, len(result.table["prior"])),
        "calls_per_example": result.calls,
        "pilot_calls": result.pilot_calls,
        **few_entry(result, dataset.dims),
        **target_entry(request, result, dataset.dims),
        "seed": request.seed,
        "terms": _terms(result, dataset.dims),
        "interval95": intervals(result, dataset.dims),
        "baselines": baselines(dataset, request),
    }


def few_entry(result: Evaluation, dims: int) -> dict[str, Any]:
    """What each device of a few-call evaluation saved."""
    scale = dims * math.log(2)
    rows = [
        {"name": s.name, "se_mc": s.se_mc / scale, "calls_ratio": s.calls} for s in result.savings
    ]
    return {"savings": rows} if rows else {}


def target_entry(request: Request, result: Evaluation, dims: int) -> dict[str, Any]:
    """Whether the error that was asked for is reached, and if not, why."""
    if request.until is None:
        return {}
    total = result.estimates()["total"].bits_per_dim(dims)
    reached = getattr(total, request.error) <= request.until
    beyond = math.sqrt(max(total.se**2 - total.se_mc**2, 0.0))
    why = None
    if not reached and request.error == "se" and beyond > request.until:
        why = f"these examples alone make {beyond:.2g}, which only more examples can lower"
    elif not reached:
        why = f"stopped at --calls {request.calls or result.calls:g}"
    asked = {"target": request.until, "of": request.error}
    return {"until": {**asked, "reached": reached, "why": why}}


def intervals(result: Evaluation, dims: int) -> dict[str, list[float] | None]:
    """95 % of the total in bits/dim: for this very set, and for the population that it is from."""
    scale = dims * math.log(2)
    return {
        name: [low / scale, high / scale] if math.isfinite(high - low) else None
        for name, (low, high) in result.intervals().items()
    }


def _terms(result: Evaluation, dims: int) -> dict[str, Any]:
    estimates = result.estimates()
    return {name: entry(estimates[name], dims) for name in TERMS}


def entry(estimate: Estimate, dims: int) -> dict[str, Any]:
    """bits/dim with errors, and the same mean in bits per example."""
    return {
        **estimate.bits_per_dim(dims).as_json(),
        "mean_bits_per_example": estimate.mean / math.log(2),
    }


def baselines(dataset: Dataset, request: Request) -> dict[str, Any]:
    """Uniform coding and the training histogram of each dimension, where data has levels."""
    if dataset.levels is None or request.split != "test":
        return {}
    histogram = Estimate.of(dataset.histogram_baseline()[: request.limit], exact=True)
    uniform = dataset.uniform_baseline()
    exact = Estimate(uniform, 0.0, 0.0, histogram.n)
    return {
        "uniform": entry(exact, dataset.dims),
        "histogram": entry(histogram, dataset.dims),
    }


def truth(subject: Subject, request: Request) -> dict[str, Any]:
    """What is known exactly of a toy: its entropy, and the bound of the exact denoiser."""
    known = subject.dataset.truth
    if known is None or subject.exact is None:
        return {}
    dims = subject.dataset.dims
    # betas that were learned are the exact model's too
    subject.exact.process.load_state_dict(subject.model.process.state_dict())
    (exact,) = measure(subject, [subject.exact], request, "exact denoiser")
    entropy = Estimate(known.entropy, 0.0, 0.0, exact.estimates()["total"].n)
    return {"truth": {"entropy": entry(entropy, dims), "exact_denoiser": _terms(exact, dims)}}


def write(
    stored: Stored,
    request: Request,
    result: Evaluation,
    extra: dict[str, Any],
    found: ImportanceWeighted | None = None,
) -> dict[str, Any]:
    """Write evaluation/*.json and *.npz; returns the document.

    The name holds what was measured, so that another measurement never replaces this one.

    Arguments:
        extra: what else the document says. found: the weights of joint trajectories, if drawn.
    """
    subject = stored.subject
    rows = head(getattr(subject.dataset, request.split), request.limit)
    known = comparison.entry(subject, rows, result)
    tighter = {} if found is None else weighted.entry(found, subject.dataset.dims)
    value = {**document(subject, stored.step, request, result), **extra, **tighter, **known}
    comparison.pair_gaps(value)
    value = marked(stored, value)
    if not stored.keeps:
        return value
    name = name_of(request, stored.step, len(subject.times))
    folder = stored.directory.evaluation
    folder.mkdir(parents=True, exist_ok=True)
    more = comparison.arrays(subject, rows) | ({} if found is None else weighted.arrays(found))
    _write_npz(folder / f"{name}.npz", result, more)
    write_json_atomic(folder / f"{name}.json", value)
    return value


def name_of(request: Request, step: int, latents: int) -> str:
    """What was measured, in a file name."""
    part = request.split if request.limit is None else f"{request.split}{request.limit}"
    many = "" if request.importance is None else f"-importance{request.importance}"
    without = "".join(f"-no-{name}" for name in sorted(request.without))
    calls = "full"
    if request.few(latents):
        calls = "" if request.calls is None else f"calls{request.calls:g}"
        if request.until is not None:
            calls = f"until{request.until:g}{request.error}{calls}"
    return f"{part}-step{step:08d}-{calls}{many}{without}-seed{request.seed}"


def _write_npz(path: Path, result: Evaluation, more: dict[str, Tensor]) -> None:
    named = {**result.values(), **more}
    arrays: dict[str, Any] = {name: value.numpy() for name, value in named.items()}
    if result.integrand is not None:
        for field in ("logsnr", "mean", "se"):
            arrays[f"integrand_{field}"] = getattr(result.integrand, field).numpy()
    save_arrays(path, arrays)


def lines(value: dict[str, Any]) -> str:
    """The document as a table for people."""
    data, model = value["data"], value["model"]
    rows = [[name, *_row(value["terms"][name])] for name in TERMS]
    rows += [[f"baseline {name}", *_row(row)] for name, row in value["baselines"].items()]
    for name, row in value.get("truth", {}).items():
        label = "entropy of the data" if name == "entropy" else "exact denoiser"
        rows.append([label, *_row(row if name == "entropy" else row["total"])])
    head = (
        f"{data['name']}, {data['split']} split, n = {data['n']}, {data['dims']} dimensions\n"
        f"{model['parameterization']}, variance {model['variance']}, decoder {model['decoder']}\n"
        f"{model['grid']}; {_weights(value)}\n"
        f"{_calls(value)}\n"
    )
    header = ["bound", "bits/dim", "± se", "± se_mc", "bits/example"]
    table = console.clean(head) + "\n" + console.table(rows, header)
    parts = [table]
    target = value.get("until")
    if target is not None and not target["reached"]:
        parts += [f"--until {target['target']:g} ({target['of']}) is not reached: {target['why']}"]
    parts += [_saved(value["savings"])] if "savings" in value else []
    parts += [weighted.lines(value)] if "importance" in value else []
    parts += [comparison.lines(value)] if "comparison" in value else []
    return "\n\n".join(parts)


def _saved(rows: list[dict[str, Any]]) -> str:
    """What each device saved, as a table."""
    header = ["the same calls", "± se_mc", "calls for the same error"]
    body = [[r["name"], f"{r['se_mc']:.5f}", f"{r['calls_ratio']:.3g}x"] for r in rows]
    return console.table(body, header)


def _calls(value: dict[str, Any]) -> str:
    calls, pilot = value["calls_per_example"], value["pilot_calls"]
    more = f", and {pilot} in all for the pilot" if pilot else ""
    return f"{calls:.4g} network call{'s' * (calls != 1)} per example{more}"


def _weights(value: dict[str, Any]) -> str:
    model = value["model"]
    if "assumed" in value:
        return f"weights {model['weights']}, clip {model['clip']}"
    return f"weights {model['weights']} of step {model['step']}"


def _row(term: dict[str, Any]) -> list[str]:
    def number(x: float | None, digits: int = 4) -> str:
        return "?" if x is None else f"{x:.{digits}f}"

    return [
        number(term["mean"]),
        number(term["se"]),
        number(term["se_mc"]),
        number(term["mean_bits_per_example"], 2),
    ]


def run(options: Evaluate) -> dict[str, Any]:
    """`nelbo evaluate`: open, measure, write, print."""
    device = device_of(options.device)
    stored, options = opened(options, device)
    request = request_of(options)
    found = _weigh(stored.subject, request, device)
    (result,) = measure(stored.subject, [stored.subject.model], request)
    value = write(stored, request, result, truth(stored.subject, request), found)
    show(value, lines(value), options.json)
    return value


def request_of(options: Evaluate) -> Request:
    """What the options ask for.

    Raises:
        UsageError: one of them would have no effect.
    """
    few = options.calls is not None or options.until is not None
    idle = {
        "--error": options.error != "se_mc" and options.until is None and "--until",
        "--without": options.without and not few and "--calls or --until",
        "--against-checkpoint": options.against_checkpoint != "newest"
        and options.against is None
        and "--against",
    }
    for name, needed in idle.items():
        if needed:
            raise UsageError(f"{name} does nothing without {needed}: give it too")
    return Request(
        options.split or "test",
        options.calls,
        options.seed,
        options.batch,
        options.limit,
        options.quiet,
        options.importance,
        without=devices.parse(options.without),
        until=options.until,
        error=options.error,
    )


def _weigh(subject: Subject, request: Request, device: str) -> ImportanceWeighted | None:
    if request.importance is None:
        return None
    rows = head(getattr(subject.dataset, request.split), request.limit)
    weighing = weighted.Weighing(
        request.importance, request.seed, request.batch, request.quiet, device
    )
    return weighted.measure(subject, rows, weighing)
