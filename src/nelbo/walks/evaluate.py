"""Evaluate: a run's model, its test data, and a document in which every figure has its error."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nelbo import console
from nelbo.commands import Evaluate
from nelbo.controls import Control, Wiener
from nelbo.data.base import Dataset
from nelbo.estimate import Estimate
from nelbo.evaluation import TERMS, Evaluation, evaluate
from nelbo.files import write_json_atomic
from nelbo.likelihood import ImportanceWeighted
from nelbo.processes.gaussian import Gaussian
from nelbo.recipes.recipe import Subject
from nelbo.reverse import Reverse
from nelbo.walks import comparison, flow, weighted
from nelbo.walks.stored import Stored, device_of, open_run, save_arrays

FITTED, MOST_DIMS = 20_000, 4096
"""Training examples for the covariance of the control variate, and the largest one."""


@dataclass(frozen=True)
class Request:
    """What to measure."""

    split: str = "test"
    calls: int | None = None
    seed: int = 0
    batch: int = 512
    limit: int | None = None
    control: bool = True
    quiet: bool = False
    importance: int | None = None
    """Joint trajectories per example of the importance-weighted bound."""
    pilot: int = 64
    """Training examples on which the design of a few-call evaluation is fixed."""


def measure(
    subject: Subject, model: Reverse, request: Request, title: str = "evaluate"
) -> Evaluation:
    """The bound of `model` on a part of its data, with progress on stderr."""
    dataset = subject.dataset
    rows = getattr(dataset, request.split)[: request.limit]
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")  # an exact denoiser has none
    with console.Meter(title, 1, "calls", request.quiet) as meter:
        return evaluate(
            model,
            rows,
            subject.times,
            encode=dataset.encode,
            calls=request.calls,
            pilot=dataset.train[: request.pilot],
            control=_control(subject, request),
            batch=request.batch,
            seed=request.seed,
            offset=dataset.offset(),
            device=device,
            track=lambda done, total: meter.update(done, total=total),
        )


def _control(subject: Subject, request: Request) -> Control | None:
    """The Wiener control variate of the training data, where there is one and it is affordable."""
    process, dataset = subject.model.process, subject.dataset
    if not _uses_control(subject, request) or not isinstance(process, Gaussian):
        return None
    return Wiener.of(process, dataset.encode(dataset.train[:FITTED]))


def _uses_control(subject: Subject, request: Request) -> bool:
    few = request.calls is not None and request.calls < len(subject.times)
    gaussian = isinstance(subject.model.process, Gaussian)
    return request.control and few and gaussian and subject.dataset.dims <= MOST_DIMS


def document(subject: Subject, step: int, request: Request, result: Evaluation) -> dict[str, Any]:
    """The JSON document of an evaluation (schema 1)."""
    dataset = subject.dataset
    return {
        "schema": 1,
        "data": {
            "name": dataset.name,
            "split": request.split,
            "n": len(result.prior),
            "dims": dataset.dims,
            "shape": list(dataset.shape()),
            "levels": dataset.levels,
            "sha256": dataset.record.get("sha256"),
        },
        "model": {**subject.description, "weights": "ema", "step": step},
        "calls_per_example": result.calls,
        "pilot_calls": result.pilot_calls,
        "control": "wiener" if _uses_control(subject, request) else "none",
        "seed": request.seed,
        "terms": _terms(result, dataset.dims),
        "baselines": baselines(dataset, request),
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
    exact = measure(subject, subject.exact, request, "exact denoiser")
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
    rows = getattr(subject.dataset, request.split)[: request.limit]
    known = comparison.entry(subject, rows, result)
    tighter = {} if found is None else weighted.entry(found, subject.dataset.dims)
    value = {**document(subject, stored.step, request, result), **extra, **tighter, **known}
    comparison.pair_gaps(value)
    calls = "full" if request.calls is None else f"calls{request.calls}"
    part = request.split if request.limit is None else f"{request.split}{request.limit}"
    many = "" if request.importance is None else f"-importance{request.importance}"
    name = f"{part}-step{stored.step:08d}-{calls}{many}-seed{request.seed}"
    folder = stored.directory.evaluation
    folder.mkdir(exist_ok=True)
    more = comparison.arrays(subject, rows) | ({} if found is None else weighted.arrays(found))
    _write_npz(folder / f"{name}.npz", result, more)
    write_json_atomic(folder / f"{name}.json", value)
    return value


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
        f"{model['grid']}; weights {model['weights']} of step {model['step']}; "
        f"{value['calls_per_example']:g} network calls per example\n"
    )
    header = ["bound", "bits/dim", "± se", "± se_mc", "bits/example"]
    table = console.clean(head) + "\n" + console.table(rows, header)
    parts = [table]
    parts += [weighted.lines(value)] if "importance" in value else []
    parts += [comparison.lines(value)] if "comparison" in value else []
    return "\n\n".join(parts)


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
    if flow.asked(options):
        return flow.run(options)
    device = device_of(options.device)
    stored = open_run(options.run, options.checkpoint, device)
    request = request_of(options)
    found = _weigh(stored.subject, request, device)
    result = measure(stored.subject, stored.subject.model, request)
    value = write(stored, request, result, truth(stored.subject, request), found)
    print(json.dumps(value, indent=1) if options.json else lines(value))
    return value


def request_of(options: Evaluate) -> Request:
    """What the options ask for."""
    return Request(
        options.split,
        options.calls,
        options.seed,
        options.batch,
        options.limit,
        options.control == "wiener",
        options.quiet,
        options.importance,
    )


def _weigh(subject: Subject, request: Request, device: str) -> ImportanceWeighted | None:
    if request.importance is None:
        return None
    rows = getattr(subject.dataset, request.split)[: request.limit]
    weighing = weighted.Weighing(
        request.importance, request.seed, request.batch, request.quiet, device
    )
    return weighted.measure(subject, rows, weighing)
