"""Interpolation of two images through the latent at a time, as a picture with a row per time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from nelbo import console
from nelbo.commands import Sample
from nelbo.data.base import Dataset
from nelbo.errors import InputRefused, UsageError
from nelbo.figures import png_of
from nelbo.interpolation import interpolate
from nelbo.pictures import sample_grid
from nelbo.processes.gaussian import Gaussian
from nelbo.randomness import seeded
from nelbo.recipes.recipe import Subject
from nelbo.reverse import Reverse
from nelbo.walks import conditional, fitting
from nelbo.walks.conditions import values_of
from nelbo.walks.sample import folder_of
from nelbo.walks.stored import device_of, open_checkpoint, save_arrays

COLUMNS = 8
"""Images of a row between the two, ends included, unless --n says otherwise."""


def asked(options: Sample) -> bool:
    """Whether the options speak of two images."""
    return options.interpolate is not None


def run(options: Sample) -> None:
    """`nelbo sample --interpolate I J`: open, read, walk, write, print.

    Raises:
        UsageError: options that contradict each other, or a folder that exists.
        InputRefused: an image that is not there or does not fit the model.
    """
    assert options.interpolate is not None
    device = device_of(options.device)
    stored = open_checkpoint(options, device)
    subject = stored.subject
    _check(subject, options)
    model, times = fitting.sampled(stored, options, device)
    names = options.interpolate
    ends = torch.stack([image(name, subject.dataset) for name in names])
    places = [place(at, times) for at in options.at]
    rows = draw(model, options, ends.to(device), times, places, device)
    kinds = "-".join(Path(name).stem for name in names)
    name = f"interpolate-{kinds}-step{stored.step:08d}-{fitting.words(options, len(times))}"
    folder = folder_of(options, stored, name)
    with torch.no_grad():
        logsnr = subject.model.process.schedule.logsnr(times[places]).cpu()
    paths = write(folder, subject.dataset, ends, rows, times[places], logsnr)
    said = ", ".join(
        f"{float(times[p]):.3f} ({float(v):.1f})" for p, v in zip(places, logsnr, strict=True)
    )
    words = (
        f"rows: through the latent at t (log-SNR) = {said}; columns: {names[0]}, λ from 0 to 1, "
        f"{names[1]}"
    )
    about = {
        "schema": 1,
        "n": rows.shape[1],
        "t": times[places].tolist(),
        "logsnr": logsnr.tolist(),
    }
    print(json.dumps({**about, **paths}) if options.json else "\n".join([words, *paths.values()]))


def _check(subject: Subject, options: Sample) -> None:
    if options.progressive:
        raise UsageError("--interpolate and --progressive are two pictures: take one of them")
    if conditional.asked(options):
        raise UsageError("--interpolate has two images and no condition: leave out the condition")
    if not isinstance(subject.model.process, Gaussian):
        raise UsageError("--interpolate needs Gaussian diffusion: between two bits is no bit")
    if len(subject.dataset.shape()) != 3:
        raise UsageError("--interpolate is of images, and this run's data are vectors")
    if options.sampler != "ancestral":
        raise UsageError(f"--interpolate walks by --sampler ancestral, not {options.sampler}")


def image(name: str, dataset: Dataset) -> Tensor:
    """(*shape) on the model's scale: a test example by its number, or a file.

    Raises:
        InputRefused: there is no such example or file, or it does not fit.
    """
    if not name.isdigit():
        scaled = values_of(Path(name), dataset).scaled
        if bool(scaled.isnan().any()):
            raise InputRefused(f"{name}: holds NaN; an image to interpolate is known everywhere")
        return scaled.float()
    if int(name) >= len(dataset.test):
        raise InputRefused(
            f"--interpolate {name}: the test part has the examples 0 to {len(dataset.test) - 1}; "
            "or give the path of a picture"
        )
    return dataset.encode(dataset.test[int(name)][None])[0]


def place(at: float, times: Tensor) -> int:
    """Position of the latent next to a fraction of the last time (up to 1), or of the latent with
    a number (from 2).

    Raises:
        UsageError: there is none.
    """
    count = len(times)
    if 0 < at <= 1:
        return int((times - at * times[-1]).abs().argmin())
    if at != round(at) or not 2 <= at <= count:
        raise UsageError(
            f"--at {at:g}: give a fraction above 0 and up to 1, or the number of a latent, 2 to "
            f"{count}"
        )
    return int(at) - 1


def draw(
    model: Reverse,
    options: Sample,
    ends: Tensor,
    times: Tensor,
    places: list[int],
    device: str,
) -> Tensor:
    """(rows, n, *shape) on the model's scale; every row begins with the same noise."""
    count = COLUMNS if options.n is None else options.n
    shares = torch.linspace(0, 1, count, dtype=torch.float64, device=device)
    rows = []
    with console.Meter("interpolate", len(places), "rows", options.quiet) as meter:
        for done, last in enumerate(places):
            with seeded(options.seed, "interpolate"):
                rows.append(interpolate(model, ends, shares, times[: last + 1]).cpu())
            meter.update(done + 1)
    return torch.stack(rows)


def write(
    folder: Path, dataset: Dataset, ends: Tensor, rows: Tensor, times: Tensor, logsnr: Tensor
) -> dict[str, str]:
    """Write interpolation.npz and interpolation.png: each row between its two images."""
    folder.mkdir(parents=True, exist_ok=True)
    decoded = torch.stack([dataset.decode(row) for row in rows])
    first, second = dataset.decode(ends.cpu())[:, None].expand(2, len(rows), *dataset.shape())
    sheet = torch.cat([first[:, None], decoded, second[:, None]], 1)
    arrays = {"images": decoded.numpy(), "ends": dataset.decode(ends.cpu()).numpy(),
              "t": times.numpy(), "logsnr": logsnr.numpy()}  # fmt: skip
    save_arrays(folder / "interpolation.npz", arrays)
    picture = folder / "interpolation.png"
    grid = sample_grid(sheet.flatten(0, 1).numpy(), dataset.levels, columns=sheet.shape[1])
    picture.write_bytes(png_of(grid))
    return {"picture": str(picture), "array": str(folder / "interpolation.npz")}
