"""`nelbo sample --progressive`: what the model guesses of the data along walks from noise."""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from nelbo import console
from nelbo.commands import Sample
from nelbo.errors import UsageError
from nelbo.figures import png_of
from nelbo.pictures import sample_grid
from nelbo.randomness import seeded
from nelbo.reverse import Reverse
from nelbo.samplers import sample
from nelbo.walks import conditional, fitting
from nelbo.walks.progressive import refuse_others
from nelbo.walks.sample import folder_of, sampler_of
from nelbo.walks.stored import device_of, open_checkpoint, save_arrays

FRAMES, ROWS = 11, 8
"""Guesses of a strip before its sample, and strips of a picture."""


def asked(options: Sample) -> bool:
    """Whether the options speak of a strip of guesses."""
    return options.progressive


def run(options: Sample) -> None:
    """`nelbo sample --progressive`: the guesses of x_0 along walks from noise."""
    device = device_of(options.device)
    stored = open_checkpoint(options, device)
    subject = stored.subject
    refuse_others(subject, "--progressive", {})
    if conditional.asked(options):
        raise UsageError("--progressive shows free walks: leave out the condition")
    if len(subject.dataset.shape()) != 3:
        raise UsageError("--progressive is a strip of pictures, and this run's data are vectors")
    model, times = fitting.sampled(stored, options, device)
    name = f"progressive-step{stored.step:08d}-{fitting.words(options, len(times))}"
    folder = folder_of(options, stored, name)
    guesses, latents, logsnr = strip(model, subject.dataset.shape(), options, times, device)
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
    model: Reverse, shape: tuple[int, ...], options: Sample, times: Tensor, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Guesses x̂_0 and latents (k, n, *shape), the sample last, and their log-SNR (k,), ∞ last."""
    count = ROWS if options.n is None else options.n
    last = len(times) - 1
    marks = {round(k * last / (FRAMES - 1)) for k in range(FRAMES)}
    sampler = sampler_of(options.sampler, options.eta)
    guesses, latents, levels = [], [], []
    schedule = model.process.schedule
    with (
        console.Meter("sample", last + 1, "steps", options.quiet) as meter,
        seeded(options.seed, "progressive"),
    ):
        walk = sample(model, sampler, times, (count, *shape), device)
        for k, (t, x_t) in enumerate(walk):
            meter.update(min(k, last + 1))
            if k in marks or t is None:
                guesses.append((x_t if t is None else model.predict(x_t, t)).cpu())
                latents.append(x_t.cpu())
                levels.append(torch.tensor(math.inf) if t is None else schedule.logsnr(t).cpu())
    return torch.stack(guesses), torch.stack(latents), torch.stack([v.double() for v in levels])
