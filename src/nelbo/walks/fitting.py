"""Chains of few latents from a run's model: which latents stay, and with which variance.

An optimal grid and the optimal variance are fitted on training examples, by N network calls each.
What was measured is kept in the run directory and read again where it is of the same weights,
data, examples and seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from nelbo import console, curve
from nelbo.binary import Flip
from nelbo.commands import Sample
from nelbo.curve import Curve
from nelbo.distributed import on_main
from nelbo.errors import UsageError
from nelbo.parameterizations import GaussianParameterization, with_variance
from nelbo.recipes.recipe import Subject
from nelbo.reverse import Reverse, gaussian_process, strided
from nelbo.schedules import even
from nelbo.spacing import even_logsnr
from nelbo.variances import Posterior, Transition, Variance
from nelbo.walks.stored import Stored, save_arrays

VARIANCES = ("model", "posterior", "transition", "optimal")
ARRAYS = ("times", "error", "prior", "decoder")


@dataclass(frozen=True)
class Fit:
    """How the error curve is measured.

    Arguments:
        examples: training examples, the first ones.
    """

    examples: int = 128
    seed: int = 0
    batch: int = 512
    device: str = "cpu"
    quiet: bool = False


def check(subject: Subject, sizes: list[int], grids: list[str], variances: list[str]) -> None:
    """Refuse what this model cannot do, before anything is measured.

    Raises:
        UsageError: says what to type instead.
    """
    count, model = len(subject.times), subject.model
    for size in sizes:
        if not 1 <= size <= count:
            raise UsageError(f"--steps {size}: this model has a grid of {count}")
    if sizes and min(sizes) == 1 and curve.follows(model.decoder_rule):
        raise UsageError("--steps 1: the decoder's variance follows a pair; keep 2 or more")
    if isinstance(model.parameterization, Flip) and any(size != count for size in sizes):
        raise UsageError("--steps: --predict flip knows the steps of its own chain only")
    if not gaussian(model) and ("optimal" in grids or variances != ["model"]):
        raise UsageError(
            "--grid optimal and --variance are for Gaussian models: take another --grid and "
            "leave --variance out"
        )
    if "optimal" in grids and "model" in variances and learned(model):
        raise UsageError(
            "--grid optimal: what a learned variance costs is not told by the error curve. Take "
            "--variance posterior or optimal, or --grid even"
        )


def gaussian(model: Reverse) -> bool:
    """Whether the model's kernels have a variance of their own."""
    return isinstance(model.parameterization, GaussianParameterization)


def learned(model: Reverse) -> bool:
    """Whether the network gives the variance."""
    own = model.parameterization
    return isinstance(own, GaussianParameterization) and own.variance.learned


def rule(model: Reverse, name: str, fitted: Curve | None) -> Variance | None:
    """The variance of this name; None is what the model has, where only the network knows it."""
    if name == "optimal":
        assert fitted is not None
        return fitted.optimal()
    if name == "model":
        own = model.parameterization
        known = isinstance(own, GaussianParameterization) and not own.variance.learned
        return own.variance if known else None  # type: ignore[return-value]
    return {"posterior": Posterior, "transition": Transition}[name]()


def chain(
    subject: Subject, kept: Tensor, name: str, fitted: Curve | None, device: str
) -> tuple[Reverse, Tensor]:
    """The model on the kept places of its grid with a variance, and their times (K,)."""
    times = subject.times[kept]
    model = strided(subject.model, times)
    if name != "model":
        variance = rule(subject.model, name, fitted)
        assert variance is not None
        model = with_variance(model, variance)
    return model.to(device), times


def sampled(stored: Stored, options: Sample, device: str) -> tuple[Reverse, Tensor]:
    """The chain that `nelbo sample` walks over; it does not depend on the seed of the samples."""
    subject, count = stored.subject, len(stored.subject.times)
    size = count if options.steps is None else options.steps
    check(subject, [size], [options.grid], [options.variance])
    if options.variance != "model" and options.sampler != "ancestral":
        raise UsageError("--variance is that of the model's own steps: take --sampler ancestral")
    fit = Fit(options.fit, device=device, quiet=options.quiet)
    wanted = "optimal" in (options.grid, options.variance)
    fitted = curve_of(stored, fit) if wanted else None
    kept = spread(subject, options.grid, size)
    if options.grid == "optimal":
        variance = rule(subject.model, options.variance, fitted)
        assert fitted is not None and variance is not None
        kept = fitted.subsets(variance, size).best(size)
    return chain(subject, kept, options.variance, fitted, device)


def spread(subject: Subject, grid: str, size: int) -> Tensor:
    """Places of the model's grid (size,) at even distance in time, or in log-SNR."""
    if grid != "logsnr":
        return even(len(subject.times), size)
    return even_logsnr(subject.model.process.schedule, subject.times, size)


def words(options: Sample, count: int) -> str:
    """The chain and the seed in a folder's name; short for an even grid of the model's own."""
    grid = "" if options.grid == "even" else f"-{options.grid}"
    variance = "" if options.variance == "model" else f"-{options.variance}"
    return f"grid{count}{grid}{variance}-seed{options.seed}"


# --- the curve and its file ----------------------------------------------------------------------


def curve_of(stored: Stored, fit: Fit) -> Curve:
    """The smoothed error curve of a run, from its file where that is of the same model and data.

    Raises:
        UsageError: there are fewer than two training examples.
    """
    subject = stored.subject
    rows = subject.dataset.train[: fit.examples]
    if len(rows) < 2:
        raise UsageError("an optimal grid or variance needs two training examples or more")
    name = f"curve-step{stored.step:08d}-seed{fit.seed}-fit{len(rows)}"
    path = stored.directory.evaluation / f"{name}.npz"
    mark = fingerprint(subject, rows)
    found = _read(path, mark, subject, len(rows)) if stored.keeps else None
    if on_main(lambda: found is not None):
        # what the first rank has, the others read as well
        found = found or _read(path, mark, subject, len(rows))
        assert found is not None, "all ranks see the same files"
        return found.smoothed()
    measured = measure(subject, rows, fit)
    if not stored.keeps:
        return measured.smoothed()
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {field: getattr(measured, field).numpy() for field in ARRAYS}
    save_arrays(path, {**arrays, "mark": np.array(mark)})
    return measured.smoothed()


def measure(subject: Subject, rows: Tensor, fit: Fit) -> Curve:
    """Measure it, with progress on stderr."""
    with console.Meter("error curve", 1, "calls", fit.quiet) as meter:
        return curve.measure(
            subject.model.to(fit.device),
            rows,
            subject.times,
            encode=subject.dataset.encode,
            batch=fit.batch,
            seed=fit.seed,
            offset=subject.dataset.offset(),
            device=fit.device,
            track=lambda done, total: meter.update(done, total=total),
        )


def fingerprint(subject: Subject, rows: Tensor) -> str:
    """SHA-256 of weights, words about the model, and examples."""
    digest = hashlib.sha256(repr(sorted(subject.description.items())).encode())
    for name, tensor in [*subject.model.state_dict().items(), ("rows", rows)]:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path, mark: str, subject: Subject, count: int) -> Curve | None:
    """The curve of a file; None where there is none, or it is damaged or of something else."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
    except (OSError, ValueError, BadZipFile) as problem:
        console.say(f"{path}: not readable ({problem}); measured again")
        return None
    if not _fits(arrays, mark, subject, count):
        console.say(f"{path}: of another model or other data; measured again")
        return None
    times, error, prior, decoder = (torch.from_numpy(arrays[name]) for name in ARRAYS)
    process = curve.on_cpu(gaussian_process(subject.model.process, "the error curve"))
    dataset = subject.dataset
    return Curve(times, process, error, prior, decoder, dataset.dims, dataset.offset())


def _fits(arrays: Mapping[str, Any], mark: str, subject: Subject, count: int) -> bool:
    if not {*ARRAYS, "mark"} <= arrays.keys() or str(arrays["mark"]) != mark:
        return False
    shape = (count, len(subject.times))
    wide = (*shape, curve.NODES) if curve.follows(subject.model.decoder_rule) else shape
    shapes = {"times": shape[1:], "error": shape, "prior": shape[:1], "decoder": wide}
    return all(arrays[n].shape == s and arrays[n].dtype == np.float64 for n, s in shapes.items())
