"""Progressive coding and progressive generation: what x̂_0 is on the way, and what it costs."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from nelbo import console, progressive, ratedistortion
from nelbo.commands import Evaluate, Sample
from nelbo.data.base import Dataset
from nelbo.errors import UsageError
from nelbo.estimate import Estimate
from nelbo.figures import WIDE, png_of
from nelbo.files import write_json_atomic
from nelbo.pictures import sample_grid
from nelbo.processes.gaussian import Gaussian
from nelbo.progressive import Progressive
from nelbo.randomness import seeded
from nelbo.recipes.recipe import Subject
from nelbo.samplers import sample
from nelbo.walks import conditional
from nelbo.walks.evaluate import entry
from nelbo.walks.sample import grid_of, sampler_of
from nelbo.walks.stored import Stored, device_of, open_run, save_arrays

CALLS = 64
"""Network calls per example of a curve, unless --calls says otherwise."""
FRAMES, ROWS = 11, 8
"""Guesses of a strip before its sample, and strips of a picture."""


def asked(options: Sample) -> bool:
    """Whether the options speak of a strip of guesses."""
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


# --- rate and distortion -------------------------------------------------------------------------


def run_evaluate(options: Evaluate) -> dict[str, Any]:
    """`nelbo evaluate --progressive`: open, measure, write, draw, print."""
    device = device_of(options.device)
    stored = open_run(options.run, options.checkpoint, device)
    subject = stored.subject
    refuse_others(subject, "--progressive", {"--importance": options.importance})
    rows = getattr(subject.dataset, options.split)[: options.limit]
    with console.Meter("progressive", 1, "calls", options.quiet) as meter:
        result = progressive.measure(
            subject.model,
            rows,
            subject.times,
            CALLS if options.calls is None else options.calls,
            encode=subject.dataset.encode,
            batch=options.batch,
            seed=options.seed,
            device=device,
            track=lambda done, total: meter.update(done, total=total),
        )
    value = document(stored, options, result)
    write(stored, options, result, value)
    print(json.dumps(value, indent=1) if options.json else lines(value))
    return value


def document(stored: Stored, options: Evaluate, result: Progressive) -> dict[str, Any]:
    """The JSON document of a rate-distortion curve (schema 1)."""
    dataset, n = stored.subject.dataset, len(result.decoder)
    size, unit = _unit(dataset)
    distortion = Estimate.of(result.decoder + dataset.offset())
    total = Estimate.of(result.rate[:, -1] + result.decoder + dataset.offset())
    points = _points(stored, result)
    return {
        "schema": 1,
        "kind": "progressive",
        "data": {
            "name": dataset.name,
            "split": options.split,
            "n": n,
            "dims": dataset.dims,
            "levels": dataset.levels,
            "sha256": dataset.record.get("sha256"),
        },
        "model": {**stored.subject.description, "weights": "ema", "step": stored.step},
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
    folder.mkdir(exist_ok=True)
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


# --- generation ----------------------------------------------------------------------------------


def run(options: Sample) -> None:
    """`nelbo sample --progressive`: the guesses of x_0 along walks from noise."""
    device = device_of(options.device)
    stored = open_run(options.run, options.checkpoint, device)
    subject = stored.subject
    refuse_others(subject, "--progressive", {})
    if conditional.asked(options):
        raise UsageError("--progressive shows free walks: leave out the condition")
    if len(subject.dataset.shape()) != 3:
        raise UsageError("--progressive is a strip of pictures, and this run's data are vectors")
    times = grid_of(subject, options.steps)
    name = f"progressive-step{stored.step:08d}-grid{len(times)}-seed{options.seed}"
    folder = options.out or stored.directory.samples / name
    if options.out is not None and folder.exists():
        raise UsageError(f"{folder} exists, and nothing in it is overwritten: name another --out")
    guesses, latents, logsnr = strip(subject, options, times, device)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"guesses": guesses.numpy(), "latents": latents.numpy(), "logsnr": logsnr.numpy()}
    save_arrays(folder / "progressive.npz", arrays)
    sheet = guesses.transpose(0, 1).flatten(0, 1).numpy()
    picture = folder / "progressive.png"
    picture.write_bytes(png_of(sample_grid(sheet, None, columns=len(guesses))))
    paths = {"picture": str(picture), "array": str(folder / "progressive.npz")}
    about = {"schema": 1, "n": guesses.shape[1], "logsnr": logsnr.tolist()[:-1], **paths}
    said = "  ".join(f"{x:.1f}" for x in logsnr.tolist()[:-1])
    words = ["a row for each walk: guesses of x_0 at log-SNR", f"  {said}", "and the sample"]
    print(json.dumps(about) if options.json else "\n".join([*words, *paths.values()]))


@torch.no_grad()
def strip(
    subject: Subject, options: Sample, times: Tensor, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Guesses x̂_0 and latents (k, n, *shape), the sample last, and their log-SNR (k,), ∞ last."""
    count = ROWS if options.n is None else options.n
    last = len(times) - 1
    marks = {round(k * last / (FRAMES - 1)) for k in range(FRAMES)}
    sampler = sampler_of(options.sampler, options.eta)
    guesses, latents, levels = [], [], []
    model, schedule = subject.model, subject.model.process.schedule
    with (
        console.Meter("sample", last + 1, "steps", options.quiet) as meter,
        seeded(options.seed, "progressive"),
    ):
        walk = sample(model, sampler, times, (count, *subject.dataset.shape()), device)
        for k, (t, x_t) in enumerate(walk):
            meter.update(min(k, last + 1))
            if k in marks or t is None:
                guesses.append((x_t if t is None else model.predict(x_t, t)).cpu())
                latents.append(x_t.cpu())
                levels.append(torch.tensor(math.inf) if t is None else schedule.logsnr(t).cpu())
    return torch.stack(guesses), torch.stack(latents), torch.stack([v.double() for v in levels])
