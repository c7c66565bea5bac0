"""Sample under a condition: fill in what a mask leaves open, or take noise off.

Every draw comes from a population of particles of its own, so that draws are independent; within
one, weights and resampling make the particle that is drawn right in the limit of many particles.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nelbo import console
from nelbo.commands import Sample
from nelbo.conditioning import Particles, posterior_samples
from nelbo.data.base import Dataset
from nelbo.errors import UsageError
from nelbo.files import exhausted, write_file
from nelbo.pictures import save_grid
from nelbo.randomness import key
from nelbo.recipes.foreign import is_foreign
from nelbo.reverse import Reverse
from nelbo.walks import fitting
from nelbo.walks.conditions import Condition, check, condition_of, source
from nelbo.walks.sample import folder_of
from nelbo.walks.stored import Stored, device_of, open_run

DRAWS = 8
"""How many, unless --n says otherwise."""
ROOM = 2**24
"""Masses of levels that may be in memory at once."""
FEW = 4.0
"""Below this effective sample size the particles are too few."""


def asked(options: Sample) -> bool:
    """Whether the options speak of a condition."""
    parts = (options.observe, options.mask, options.hole, options.denoise, options.noise)
    return any(part is not None for part in parts)


def run(options: Sample) -> None:
    """`nelbo sample` with a condition: open, read, draw, write, print.

    Raises:
        UsageError: options that contradict each other, or a folder that exists.
        InputRefused: a file that is not what it should be.
    """
    check(options)
    if is_foreign(options.run):
        raise UsageError(
            f"{options.run} is a checkpoint of another code base: filling in and taking noise off "
            "are done with runs of nelbo"
        )
    if options.out is not None and options.out.exists():
        raise UsageError(
            f"{options.out} exists, and nothing in it is overwritten: name another --out"
        )
    device = device_of(options.device)
    stored = open_run(options.run, options.checkpoint, device)
    condition = condition_of(options, stored.subject.dataset)
    model, times = fitting.sampled(stored, options, device)
    found = draw(stored, model, condition, times, options, device)
    hole = f"-hole{options.hole}" if options.hole else ""
    what = f"{condition.kind}-{source(options).stem}{hole}"
    name = f"{what}-step{stored.step:08d}-{fitting.words(options, len(times))}"
    folder = folder_of(options, stored, name)
    paths = write(folder, stored.subject.dataset, condition, found, options.seed)
    value = summary(found, condition)
    about = {"grid": len(times), "seed": options.seed, "step": stored.step}
    if options.json:
        print(json.dumps({"schema": 1, **value, **about, **paths}))
    else:
        print("\n".join([*words(value), *paths.values()]))


def draw(
    stored: Stored,
    model: Reverse,
    condition: Condition,
    times: Tensor,
    options: Sample,
    device: str,
) -> Particles:
    """All populations, in groups that fit in memory."""
    dataset = stored.subject.dataset
    count = DRAWS if options.n is None else options.n
    width = options.particles * dataset.dims * (dataset.levels or 1)
    size = max(1, ROOM // width)
    calls = count * options.particles * len(times)
    groups: list[Particles] = []
    with console.Meter("sample", calls, "calls", options.quiet) as meter:
        for start in range(0, count, size):
            past = start * options.particles * len(times)

            def track(done: int, total: int, past: int = past) -> None:
                meter.update(past + done)

            group = posterior_samples(
                model,
                condition.factor,
                times,
                options.particles,
                populations=min(size, count - start),
                seed=key(options.seed, "conditional", start),
                device=device,
                track=track,
            )
            groups.append(dataclasses.replace(group, x_0=group.x_0.cpu()))
    return joined(groups)


def joined(groups: list[Particles]) -> Particles:
    """Populations of one condition side by side; the decoder is that of the last group."""
    return Particles(
        torch.cat([g.x_0 for g in groups]),
        torch.cat([g.log_weights for g in groups]),
        torch.cat([g.log_evidence for g in groups]),
        torch.cat([g.ess for g in groups], 1),
        torch.cat([g.resampled for g in groups], 1),
        groups[-1].decoder,
    )


def write(
    folder: Path, dataset: Dataset, condition: Condition, found: Particles, seed: int
) -> dict[str, str]:
    """Write samples.npz, and the pictures conditional.png and spread.png."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = found.choose(1, seed)[:, 0]
    # equal weights: one particle-poor population with a large evidence would stand for all
    mean = found.mean().mean(0)
    spread = (found.average(found.x_0.double() ** 2).mean(0) - mean**2).clamp(min=0).sqrt()
    spread = torch.where(condition.mask & (condition.kind == "observe"), 0.0, spread)
    unit = _unit(dataset)
    arrays = {
        "samples": dataset.decode(draws).numpy(),
        "given": np.where(condition.mask, _decoded(dataset, condition.given), np.nan),
        "mask": condition.mask.numpy(),
        "mean": _decoded(dataset, mean),
        "spread": (spread * unit).numpy(),
        "log_evidence": (found.log_evidence + condition.offset).numpy(),
        "ess": found.ess.numpy(),
        "resampled": found.resampled.numpy(),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    _replace(folder / "samples.npz", buffer.getvalue())
    paths = {"array": str(folder / "samples.npz")}
    return paths | _pictures(folder, dataset, condition, (mean.float(), spread), draws)


def _pictures(
    folder: Path,
    dataset: Dataset,
    condition: Condition,
    moments: tuple[Tensor, Tensor],
    draws: Tensor,
) -> dict[str, str]:
    """Before and after in one sheet: what was given, the mean, the draws. Then the spread."""
    mean, spread = moments
    after, path = folder / "spread.png", folder / "conditional.png"
    if len(dataset.shape()) != 3:
        levels = dataset.levels
        save_grid(path, dataset.decode(draws).numpy(), levels)
        return {"picture": str(path)}
    sheet = torch.cat([torch.stack([condition.given, mean]), draws.float()])
    if dataset.binary:
        sheet = 2 * sheet - 1
    hidden = ~condition.mask
    sheet[0] = torch.where(hidden, 0.0, sheet[0])
    save_grid(path, sheet.numpy(), None)
    most = max(float(spread.max()), 1e-12)
    save_grid(after, (2 * spread / most - 1).float()[None].numpy(), None)
    return {"picture": str(path), "spread": str(after)}


def _unit(dataset: Dataset) -> Tensor:
    """How many of the data's own units are one on the model's scale."""
    if dataset.levels is None:
        return torch.as_tensor(dataset.scale, dtype=torch.float64)
    return torch.tensor(1.0 if dataset.binary else (dataset.levels - 1) / 2).double()


def _decoded(dataset: Dataset, x: Tensor) -> np.ndarray:
    """(*shape) in the data's own units, not rounded."""
    if dataset.levels is None:
        return dataset.decode(x[None])[0].numpy()
    shift = 0.0 if dataset.binary else 1.0
    return ((x.double() + shift) * _unit(dataset)).numpy()


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    with exhausted(path, len(data)):
        write_file(temporary, data)
        temporary.replace(path)


def summary(found: Particles, condition: Condition) -> dict[str, Any]:
    """What is printed: sizes, effective sample sizes, evidence in the units of the file."""
    count, particles = found.log_weights.shape
    log_z, error = found.evidence()
    return {
        "condition": condition.kind,
        "known": int(condition.mask.sum()),
        "unknown": int((~condition.mask).sum()),
        "n": count,
        "particles": particles,
        "ess": float(found.ess[-1].median()),
        "ess_least": float(found.ess.min()),
        "resampled": float(found.resampled.double().sum(0).median()),
        "log_evidence": {
            "mean": log_z + condition.offset,
            "se": error if math.isfinite(error) else None,
            "unit": "nats",
        },
    }


def words(value: dict[str, Any]) -> list[str]:
    """The summary for a person, with what it is not."""
    known = "known values" if value["condition"] == "observe" else "noisy values"
    log_z, error = value["log_evidence"]["mean"], value["log_evidence"]["se"]
    reach = "one population tells no error" if error is None else f"± {error:.2f}"
    lines = [
        f"{value['n']} independent draws, each from {value['particles']} weighted particles, "
        f"resampled {value['resampled']:.0f} times",
        f"effective sample size {value['ess']:.1f} of {value['particles']} at the end (median), "
        f"{value['ess_least']:.1f} at the least",
        f"log evidence of the {value['known']} {known}: {log_z:.2f} nats ({reach})",
        "weighted samples are right in the limit of many particles; with few they vary too little",
    ]
    if value["ess"] < FEW:
        lines.append("few particles carry the weights: take more --particles")
    return lines
