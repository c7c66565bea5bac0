"""Sample: draws from a run's model, beside real data, and a strip of one walk each way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nelbo import console
from nelbo.commands import Sample
from nelbo.data.base import Dataset
from nelbo.errors import UsageError
from nelbo.parameterizations import Epsilon
from nelbo.pictures import save_grid
from nelbo.processes.gaussian import Gaussian
from nelbo.randomness import seeded
from nelbo.recipes.recipe import Subject
from nelbo.reverse import Reverse
from nelbo.samplers import Ancestral, Sampler, sample
from nelbo.solvers import sampler_named
from nelbo.walks import fitting
from nelbo.walks.stored import (
    Stored,
    assumptions,
    device_of,
    open_checkpoint,
    save_arrays,
)

STRIP = 9
"""States of a strip."""


def sampler_of(name: str, eta: float) -> Sampler:
    """The sampler that --sampler names."""
    return Ancestral() if name == "ancestral" else sampler_named(name, eta)


def draw(
    subject: Subject,
    model: Reverse,
    count: int,
    sampler: Sampler,
    times: Tensor,
    seed: int,
    device: str,
    quiet: bool = False,
    batch: int = 256,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`count` samples as stored data, and the reverse strip of the first eight.

    A sample is a function of (seed, batch number), not of how many are asked for.
    """
    marks = _marks(len(times))
    out: list[Tensor] = []
    strip: list[Tensor] = []
    done, total = 0, -(-count // batch) * (len(times) + 1)
    with console.Meter("sample", total, "steps", quiet) as meter:
        for number in range(-(-count // batch)):
            with seeded(seed, "sample", number):
                shape = (batch, *subject.dataset.shape())
                walk = enumerate(sample(model, sampler, times, shape, device))
                for k, (_, x_t) in walk:
                    done += 1
                    meter.update(done)
                    if number == 0 and (k in marks or k == len(times)):
                        strip.append(x_t.cpu())
            out.append(subject.dataset.decode(x_t.cpu()))
    return torch.cat(out)[:count], {"reverse": torch.stack([s[:512] for s in strip])}


def _marks(n: int) -> set[int]:
    return {round(k * (n - 1) / (STRIP - 2)) for k in range(STRIP - 1)}


def forward_strip(subject: Subject, times: Tensor, count: int, seed: int) -> Tensor:
    """(k, count, *shape) one trajectory of the forward process, from data to noise."""
    process = subject.model.process
    marks = sorted(len(times) - 1 - k for k in _marks(len(times)))
    x = subject.dataset.encode(subject.dataset.test[:count])
    states, before = [x], None
    with seeded(seed, "forward"):
        for k in marks:
            law = (
                process.marginal(x, times[k])
                if before is None
                else process.transition(x, times[before], times[k])
            )
            x, before = law.sample(), k
            states.append(x)
    return torch.stack(states)


@torch.no_grad()
def write(
    stored: Stored,
    folder: Path,
    samples: Tensor,
    strip: dict[str, Tensor],
    times: Tensor,
    seed: int,
) -> dict[str, Any]:
    """Write samples.npz with real data beside it, strip.npz and two pictures into a folder."""
    dataset = stored.subject.dataset
    folder.mkdir(parents=True, exist_ok=True)
    if not len(dataset.test):
        return _write_alone(folder, samples, dataset.levels)
    process = stored.subject.model.cpu().process
    marks = sorted(len(times) - 1 - k for k in _marks(len(times)))
    count = 512 if dataset.levels is None else 8
    forward = forward_strip(stored.subject, times, count, seed)
    states = {
        "forward": _stills(dataset, forward).numpy(),
        "reverse": _stills(dataset, strip["reverse"][:, :count]).numpy(),
        "logsnr": np.r_[np.inf, process.schedule.logsnr(times[torch.tensor(marks)]).numpy()],
    }
    save_arrays(folder / "strip.npz", states)
    return write_beside(folder, dataset, samples)


def write_beside(folder: Path, dataset: Dataset, samples: Tensor) -> dict[str, Any]:
    """Write samples.npz with real data beside it and a picture of each into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    real = dataset.test[: len(samples)]
    arrays = {"samples": samples.numpy(), "real": real.numpy()}
    save_arrays(folder / "samples.npz", arrays)
    save_grid(folder / "samples.png", samples[:100].numpy(), dataset.levels)
    save_grid(folder / "real.png", real[:100].numpy(), dataset.levels)
    return {"picture": str(folder / "samples.png"), "array": str(folder / "samples.npz")}


def _write_alone(folder: Path, samples: Tensor, levels: int | None) -> dict[str, Any]:
    """The samples of a checkpoint that came without data to put beside them."""
    save_arrays(folder / "samples.npz", {"samples": samples.numpy()})
    save_grid(folder / "samples.png", samples[:100].numpy(), levels)
    return {"picture": str(folder / "samples.png"), "array": str(folder / "samples.npz")}


def _stills(dataset: Dataset, walk: Tensor) -> Tensor:
    """(k, m, *shape) on the scale of pictures; m sequences of levels as one (k, 1, m, D)."""
    scaled = 2 * walk - 1 if dataset.binary else walk
    sequences = dataset.levels is not None and len(dataset.shape()) == 1
    return scaled[:, None] if sequences else scaled


def _check_flow(name: str, model: Reverse, times: Tensor) -> None:
    """Refuse a sampler that follows the probability flow where there is none."""
    if not isinstance(model.process, Gaussian):
        raise UsageError(
            f"--sampler {name} moves along the noise of Gaussian diffusion, which this run has "
            "not: take --sampler ancestral"
        )
    if float(model.process.schedule.keep(times[-1]).detach()) == 0 and isinstance(
        model.parameterization, Epsilon
    ):
        raise UsageError(
            f"--sampler {name}: the last step of this chain keeps nothing of the data (keep = 0), "
            "so that predicted noise says nothing about it; train with --predict x0 or velocity"
        )


def check(options: Sample) -> None:
    """Refuse options that would have no effect.

    Raises:
        UsageError: names the option that is missing.
    """
    idle = {
        "--eta": options.eta != 0 and options.sampler != "ddim" and "--sampler ddim",
        "--grid": options.grid != "even" and options.steps is None and "--steps",
        "--at": options.at != Sample.at and options.interpolate is None and "--interpolate",
    }
    for name, needed in idle.items():
        if needed:
            raise UsageError(f"{name} does nothing without {needed}: give it too")


def run(options: Sample) -> None:
    """`nelbo sample`: open, draw, write, print where."""
    device = device_of(options.device)
    stored = open_checkpoint(options, device)
    subject = stored.subject
    model, times = fitting.sampled(stored, options, device)
    sampler = sampler_of(options.sampler, options.eta)
    if options.sampler != "ancestral":
        _check_flow(options.sampler, subject.model, times)
    name = f"{options.sampler}-step{stored.step:08d}-{fitting.words(options, len(times))}"
    folder = folder_of(options, stored, name)
    samples, strip = draw(
        subject,
        model,
        options.n or 64,
        sampler,
        times,
        options.seed,
        device,
        options.quiet,
    )
    paths = write(stored, folder, samples, strip, times, options.seed)
    about = {"schema": 1, "n": len(samples), "sampler": options.sampler, "grid": len(times)}
    chain = {"kept": options.grid, "variance": options.variance}
    known = {} if stored.assumed is None else {"assumed": stored.assumed}
    value = {**about, **chain, "seed": options.seed, "step": stored.step, **paths, **known}
    lines = [*paths.values(), *([assumptions(stored.assumed)] if stored.assumed else [])]
    print(json.dumps(value) if options.json else "\n".join(lines))


def folder_of(options: Sample, stored: Stored, name: str) -> Path:
    """A new folder for samples: --out, or a free name in the run (for a checkpoint of another code
    base in ./samples, under its own name).

    Raises:
        UsageError: --out exists.
    """
    place = stored.directory.samples / name
    if stored.assumed is not None:
        place = Path("samples") / f"{options.run.resolve().name}-{name}"
    return free(options.out, place)


def free(asked: Path | None, place: Path) -> Path:
    """The folder that was asked for, or `place` with the first number that is free.

    Raises:
        UsageError: the folder that was asked for exists.
    """
    if asked is not None:
        if asked.exists():
            raise UsageError(
                f"{asked} exists, and nothing in it is overwritten: name another --out"
            )
        return asked
    found, number = place, 1
    while found.exists():
        number += 1
        found = place.with_name(f"{place.name}-{number}")
    return found
