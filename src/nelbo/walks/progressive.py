"""`nelbo evaluate --progressive`: the rate–distortion curve of progressive coding."""

from __future__ import annotations

import math
from typing import Any

import torch

from nelbo import console, progressive, ratedistortion
from nelbo.commands import Evaluate
from nelbo.data.base import Dataset
from nelbo.errors import UsageError
from nelbo.estimate import Estimate
from nelbo.figures import WIDE
from nelbo.files import write_json_atomic
from nelbo.processes.gaussian import Gaussian
from nelbo.progressive import Progressive
from nelbo.recipes.recipe import Subject
from nelbo.walks.documents import marked, opening, show
from nelbo.walks.evaluate import entry
from nelbo.walks.stored import Stored, device_of, opened, save_arrays

OPTION = "--progressive"
CALLS = 64
"""Network calls per example of a curve, unless --calls says otherwise."""


def asked(options: Evaluate) -> bool:
    """Whether the options ask for the curve."""
    return options.progressive


def refuse_others(subject: Subject, what: str, others: dict[str, Any]) -> None:
    """Refuse what --progressive has no meaning for.

    Raises:
        UsageError: bits, one latent, or another measurement in the same command.
    """
    if not isinstance(subject.model.process, Gaussian):
        raise UsageError(f"{what} follows the guess of Gaussian diffusion, which this run has not")
    if len(subject.times) < 2:
        raise UsageError(f"{what} needs a grid of two latents or more")
    typed = [name for name, value in others.items() if value is not None]
    if typed:
        raise UsageError(f"{what} is a measurement of its own: leave out {', '.join(typed)}")


def run(options: Evaluate) -> dict[str, Any]:
    """`nelbo evaluate --progressive`: open, measure, write, draw, print."""
    device = device_of(options.device)
    stored, options = opened(options, device)
    assert options.split is not None
    subject = stored.subject
    refuse_others(subject, "--progressive", {"--importance": options.importance})
    calls = CALLS if options.calls is None else options.calls
    if calls != int(calls):
        raise UsageError(f"--progressive takes whole calls per example, not --calls {calls:g}")
    rows = getattr(subject.dataset, options.split)[: options.limit]
    with console.Meter("progressive", 1, "calls", options.quiet) as meter:
        result = progressive.measure(
            subject.model,
            rows,
            subject.times,
            int(calls),
            encode=subject.dataset.encode,
            batch=options.batch,
            seed=options.seed,
            device=device,
            track=lambda done, total: meter.update(done, total=total),
        )
    value = document(stored, options, result)
    value = marked(stored, value)
    if stored.keeps:
        write(stored, options, result, value)
    show(value, lines(value), options.json)
    return value


def document(stored: Stored, options: Evaluate, result: Progressive) -> dict[str, Any]:
    """The JSON document of a rate-distortion curve (schema 1)."""
    dataset, n = stored.subject.dataset, len(result.decoder)
    size, unit = _unit(dataset)
    distortion = Estimate.of(result.decoder + dataset.offset())
    total = Estimate.of(result.rate[:, -1] + result.decoder + dataset.offset())
    points = _points(stored, result)
    return {
        **opening(stored.subject, stored.step, options.split or stored.part, n),
        "kind": "progressive",
        "calls_per_example": float(result.calls),
        "seed": options.seed,
        "rate": entry(result.rates()[-1], dataset.dims),
        "distortion": entry(distortion, dataset.dims),
        "total": entry(total, dataset.dims),
        "rmse": _rmse(result.distortions(size)[-1], n, unit),
        "points": points,
    }


def _points(stored: Stored, result: Progressive) -> list[dict[str, Any]]:
    dataset = stored.subject.dataset
    size, unit = _unit(dataset)
    with torch.no_grad():
        logsnr = stored.subject.model.process.schedule.logsnr(result.times).tolist()
    known = zip(
        result.times.tolist(), logsnr, result.rates(), result.distortions(size), strict=True
    )
    return [
        {
            "t": t,
            "logsnr": level if math.isfinite(level) else None,
            "rate": entry(rate, dataset.dims),
            "rmse": _rmse(error, rate.n, unit),
        }
        for t, level, rate, error in known
    ]


def _unit(dataset: Dataset) -> tuple[float, str]:
    """How many units are 1 on the model's scale, and their name."""
    if dataset.levels is None:
        return 1.0, "on the model's scale"
    return (dataset.levels - 1) / 2, f"levels of 0–{dataset.levels - 1}"


def _rmse(value: tuple[float, float], n: int, unit: str) -> dict[str, Any]:
    return {"mean": value[0], "se": value[1], "n": n, "unit": unit}


def write(stored: Stored, options: Evaluate, result: Progressive, value: dict[str, Any]) -> None:
    """Write evaluation/progressive-*.json, .npz (per example, nats) and .png."""
    part = options.split if options.limit is None else f"{options.split}{options.limit}"
    name = f"progressive-{part}-step{stored.step:08d}-calls{result.calls}-seed{options.seed}"
    folder = stored.directory.evaluation
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {k: getattr(result, k).numpy() for k in ("times", "rate", "error", "decoder")}
    save_arrays(folder / f"{name}.npz", arrays)
    (folder / f"{name}.png").write_bytes(ratedistortion.curve(value, WIDE))
    write_json_atomic(folder / f"{name}.json", value)


def lines(value: dict[str, Any]) -> str:
    """The document as a table for people."""
    data, model, unit = value["data"], value["model"], value["rmse"]["unit"]
    rows = [_row(point) for point in value["points"]]
    head = (
        f"{data['name']}, {data['split']} split, n = {data['n']}, {data['dims']} dimensions\n"
        f"{model['parameterization']}, decoder {model['decoder']}; {model['grid']}\n"
        f"weights {model['weights']} of step {model['step']}; "
        f"{value['calls_per_example']:g} network calls per example\n"
    )
    table = console.table(rows, ["t", "log-SNR", "rate, bits/dim", "± se", f"RMSE, {unit}", "± se",
                                 "bits/example"])  # fmt: skip
    parts = [_sum(name, value[name]) for name in ("rate", "distortion", "total")]
    return f"{console.clean(head)}\n{table}\n\n" + "\n".join(parts)


def _row(point: dict[str, Any]) -> list[str]:
    rate, rmse, level = point["rate"], point["rmse"], point["logsnr"]
    return [
        f"{point['t']:.3f}",
        "none" if level is None else f"{level:.2f}",
        f"{rate['mean']:.4f}",
        f"{rate['se']:.4f}",
        f"{rmse['mean']:.3f}",
        f"{rmse['se']:.3f}",
        f"{rate['mean_bits_per_example']:.1f}",
    ]


def _sum(name: str, found: dict[str, Any]) -> str:
    what = {"rate": "rate, prior and all pairs", "distortion": "distortion, L_0"}.get(name, name)
    return f"{what}: {found['mean']:.4f} ± {found['se']:.4f} bits/dim"
