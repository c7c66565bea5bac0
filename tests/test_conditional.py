"""`nelbo sample` under a condition: files, pictures, refusals; and inpainting of real digits."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Exact, GaussianData
from PIL import Image
from tiny import silent
from torch import Tensor, nn

from nelbo.commands import Sample
from nelbo.conditioning import Observed, Particles, posterior_samples
from nelbo.data.embedded import digits
from nelbo.decoders import Discretized
from nelbo.distributions import level_of
from nelbo.estimate import Estimate
from nelbo.parameterizations import X0
from nelbo.processes.base import along
from nelbo.processes.gaussian import Gaussian
from nelbo.recipes.build import build
from nelbo.recipes.options import Heartbeat
from nelbo.reverse import Reverse
from nelbo.schedules import LogSNRLinear
from nelbo.walks.conditional import joined
from nelbo.walks.conditions import condition_of, grain_of, moments_of

DIGITS = digits(100)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A digit as picture and array, noisy, and masks of its upper half."""
    level = DIGITS.test[3, 0].numpy().astype(float)
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    save(tmp_path / "digit.png", np.rint(level * 255 / 16))
    save(tmp_path / "mask.png", mask)
    save(tmp_path / "off.png", np.rint(level * 255 / 16) // 4 * 4 + 3)
    save(tmp_path / "white.png", mask * 0 + 255)
    save(tmp_path / "black.png", mask * 0)
    save(tmp_path / "tall.png", np.zeros((9, 8)))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8) + 200).save(tmp_path / "rgb.png")
    (tmp_path / "text.png").write_text("not a picture")
    hidden = level.copy()
    hidden[4:] = np.nan
    arrays = {
        "hidden": hidden[None],
        "flat": hidden,
        "half": (mask > 0)[None],
        "nothing": hidden * np.nan,
        "large": level * 0 + 17,
        "wide": np.zeros((2, 8, 8)),
        "endless": level / 0.0 if level.all() else np.full((8, 8), np.inf),
        "gaps": np.where(mask > 0, 1.0, np.nan),
    }
    for name, values in arrays.items():
        np.save(tmp_path / f"{name}.npy", values)
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "hidden.npy").read_bytes()[:-9])
    return tmp_path


def save(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def call(run: Path, files: Path, arguments: str) -> tuple[int, str, str]:
    """`nelbo sample RUN arguments`, where FILES/ stands for the folder of files."""
    words = shlex.split(arguments.replace("FILES", shlex.quote(str(files))))
    return silent(["sample", str(run), *words, "--quiet"])


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "--observe FILES/digit.png --mask FILES/mask.png",
        "--observe FILES/digit.png --mask FILES/half.npy",
        "--observe FILES/hidden.npy",
        "--observe FILES/flat.npy",
    ],
)
def test_fill_in_the_lower_half(source: str, finished_run: Path, files: Path) -> None:
    more = " --n 3 --particles 4 --json --out FILES/out"
    code, out, err = call(finished_run, files, source + more)
    assert code == 0 and err == "", err
    value = json.loads(out)
    level = DIGITS.test[3].numpy()
    with np.load(files / "out" / "samples.npz") as arrays:
        samples, spread, mean = (arrays[k] for k in ("samples", "spread", "mean"))
        assert samples.shape == (3, 1, 8, 8) and samples.max() <= 16
        assert (samples[:, :, :4] == level[None, :, :4]).all()
        assert (samples[0, :, 4:] != samples[1, :, 4:]).any()
        assert (spread[:, :4] == 0).all() and (spread[:, 4:] > 0).any() and spread.max() < 9
        assert np.abs(mean[:, :4] - level[:, :4]).max() < 1e-4
        assert np.isnan(arrays["given"][:, 4:]).all()
        assert np.abs(arrays["given"][:, :4] - level[:, :4]).max() < 1e-4
        assert arrays["mask"].tolist() == (np.arange(64) < 32).reshape(1, 8, 8).tolist()
        assert arrays["ess"].shape == (20, 3) and arrays["log_evidence"].shape == (3,)
    assert (value["known"], value["unknown"], value["n"], value["particles"]) == (32, 32, 3, 4)
    assert value["log_evidence"]["unit"] == "nats" and 1 <= value["ess_least"] <= value["ess"] <= 4
    for key in ("picture", "spread"):
        assert Image.open(value[key]).size[0] > 100
    assert sorted(p.name for p in (files / "out").iterdir()) == [
        "conditional.png",
        "samples.npz",
        "spread.png",
    ]


def test_denoise_says_what_it_is_and_what_not(finished_run: Path, files: Path) -> None:
    source = "--denoise FILES/off.png --noise 40 --n 2 --particles 3 --steps 9 --out FILES/out"
    code, out, err = call(finished_run, files, source)
    assert code == 0, err
    assert "2 independent draws, each from 3 weighted particles" in out
    assert "effective sample size" in out and "limit of many particles" in out
    assert "log evidence of the 64 noisy values" in out and "take more --particles" in out
    with np.load(files / "out" / "samples.npz") as arrays:
        assert arrays["samples"].shape == (2, 1, 8, 8) and arrays["mask"].all()
        pixels = np.asarray(Image.open(files / "off.png")).astype(float)
        assert np.abs(arrays["given"] - pixels * 16 / 255).max() < 1e-4


def test_draws_are_a_function_of_the_seed(finished_run: Path, files: Path) -> None:
    found = []
    for k, seed in enumerate((0, 0, 1)):
        source = f"--observe FILES/hidden.npy --n 2 --particles 2 --seed {seed} --out FILES/{k}"
        assert call(finished_run, files, source)[0] == 0
        with np.load(files / str(k) / "samples.npz") as arrays:
            found.append(arrays["samples"])
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any()


def test_levels_that_the_model_lacks_are_said_to_be_rounded(
    finished_run: Path, files: Path
) -> None:
    source = "--observe FILES/off.png --mask FILES/mask.png --n 1 --particles 1 --out FILES/out"
    code, _, err = call(finished_run, files, source)
    assert code == 0 and "off.png" in err and "17 levels" in err and "rounded" in err


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("--observe FILES/digit.png", 2, "give --mask"),
        ("--mask FILES/mask.png", 2, "--observe"),
        ("--denoise FILES/digit.png", 2, "--noise S"),
        ("--noise 3", 2, "--denoise"),
        ("--denoise FILES/digit.png --noise 0", 2, "--noise 0"),
        ("--denoise FILES/digit.png --noise nan", 2, "above 0"),
        ("--denoise FILES/digit.png --noise 1 --observe FILES/digit.png", 2, "take one"),
        ("--observe FILES/hidden.npy --particles 0", 2, "--particles 0"),
        ("--observe FILES/hidden.npy --sampler ddim", 2, "--sampler ancestral"),
        ("--observe FILES/hidden.npy --n 0", 2, "--n 0"),
        ("--observe FILES/hidden.npy --steps 21", 2, "grid of 20"),
        ("--observe FILES/hidden.npy --out FILES", 2, "exists"),
        ("--observe FILES/none.png --mask FILES/mask.png", 3, "none.png: does not exist"),
        ("--observe FILES/text.png --mask FILES/mask.png", 3, "text.png: cannot be decoded"),
        ("--observe FILES/tall.png --mask FILES/mask.png", 3, "8 x 9 pixels"),
        ("--observe FILES/digit.png --mask FILES/tall.png", 3, "tall.png: is 8 x 9 pixels"),
        ("--observe FILES/digit.png --mask FILES/white.png", 3, "white.png: everything is known"),
        ("--observe FILES/digit.png --mask FILES/black.png", 3, "black.png: nothing is known"),
        ("--observe FILES/digit.png --mask FILES/gaps.npy", 3, "gaps.npy: a mask is 1"),
        ("--observe FILES/nothing.npy", 3, "nothing.npy: nothing is known"),
        ("--observe FILES/large.npy --mask FILES/mask.png", 3, "levels of this model are 0 to 16"),
        ("--observe FILES/wide.npy", 3, "wide.npy: has shape (2, 8, 8)"),
        ("--observe FILES/endless.npy", 3, "endless.npy: holds infinite"),
        ("--observe FILES/words.npy", 3, "words.npy: is not an .npy array of numbers"),
        ("--observe FILES/cut.npy", 3, "cut.npy: is not an .npy array"),
        ("--observe FILES/missing.npy", 3, "missing.npy: does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    source: str, code: int, words: str, finished_run: Path, files: Path
) -> None:
    before = sorted((finished_run / "samples").iterdir())
    found, out, err = call(finished_run, files, source)
    assert found == code and out == "" and words in err, err
    assert "Traceback" not in err and sorted((finished_run / "samples").iterdir()) == before


def test_colours_become_grey_and_it_is_said(finished_run: Path, files: Path) -> None:
    source = "--denoise FILES/rgb.png --noise 30 --n 1 --particles 1 --out FILES/out"
    code, _, err = call(finished_run, files, source)
    assert code == 0 and "RGB to grey" in err


# --- vectors -------------------------------------------------------------------------------------


def test_vectors_take_arrays_in_their_own_units(tmp_path: Path) -> None:
    """The known coordinate comes back to rounding, and the evidence has the units of the data."""
    torch.manual_seed(0)
    data = torch.randn(60, 2).numpy().astype(np.float64) * [3.0, 3.0] + [10.0, -5.0]
    np.save(tmp_path / "data.npy", data)
    run = tmp_path / "run"
    small = ["--steps", "2", "--latents", "12", "--width", "8", "--depth", "1", "--samples", "4"]
    words = ["train", "vectors", str(tmp_path / "data.npy"), *small, "--out", str(run), "--quiet"]
    assert silent([*words, "--calls", "4", "--batch", "8", "--threads", "1"])[0] == 0
    np.save(tmp_path / "y.npy", np.array([11.5, np.nan]))
    arguments = ["sample", str(run), "--observe", str(tmp_path / "y.npy"), "--json", "--quiet"]
    code, out, err = silent([*arguments, "--n", "4", "--particles", "8"])
    assert code == 0, err
    value = json.loads(out)
    with np.load(value["array"]) as arrays:
        assert np.abs(arrays["samples"][:, 0] - 11.5).max() < 1e-5
        assert len(set(arrays["samples"][:, 1])) == 4 and arrays["spread"][0] == 0
        assert arrays["given"][0] == pytest.approx(11.5) and np.isnan(arrays["given"][1])
    # a density of one number with standard deviation near 3
    assert -12 < value["log_evidence"]["mean"] < 1
    np.save(tmp_path / "y.npy", np.array([11.5, -4.0]))
    more = ["--denoise", str(tmp_path / "y.npy"), "--noise", "0.5", "--n", "2", "--quiet"]
    code, out, err = silent(["sample", str(run), *more])
    assert code == 0, err
    assert "noisy values" in out


def test_groups_of_populations_are_joined() -> None:
    def group(seed: int) -> Particles:
        torch.manual_seed(seed)
        law = torch.distributions.Bernoulli(torch.full((6, 2), 0.5))
        weights = torch.randn(3, 2).double().log_softmax(1)
        steps = torch.ones(4, 3).double()
        return Particles(torch.randn(3, 2, 2), weights, torch.randn(3), steps, steps > 0, law)

    both = joined([group(0), group(1)])
    assert both.x_0.shape == (6, 2, 2) and both.ess.shape == (4, 6)
    assert torch.equal(both.log_evidence[3:], group(1).log_evidence)
    torch.testing.assert_close(both.mean()[3:], group(1).mean())


# --- real digits ---------------------------------------------------------------------------------


class Linear(nn.Module):
    """The best linear denoiser of the training digits, with its error variances."""

    def __init__(self, schedule: LogSNRLinear) -> None:
        super().__init__()
        x = DIGITS.encode(DIGITS.train).flatten(1).double()
        grain = grain_of(DIGITS) ** 2 / 12 * torch.eye(64, dtype=torch.float64)
        self.data = GaussianData(x.mean(0), x.T.cov() + grain)
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        flat = x_t.flatten(1)
        keep, lose = (along(v, flat) for v in (self.schedule.keep(t), self.schedule.lose(t)))
        parts = self.data.posterior(flat, keep, lose)
        return torch.cat([part.view_as(x_t) for part in parts], 1)


def loss(found: Particles, x: Tensor, draws: int) -> Tensor:
    """(n, 1, 8, 8) nats per pixel: the mean of an image's draws with one uniform observation."""
    mass = found.predictive().unflatten(1, (len(x), draws)).mean(2)
    smooth = (draws * mass + 1 / 17) / (draws + 1)
    return -smooth.gather(0, level_of(x, 17)[None])[0].log()


def test_inpainted_digits_predict_the_half_that_was_held_out() -> None:
    """Log-loss of the lower half given the upper half, against that of free samples.

    The model is the best linear denoiser of the training digits, the images are test images; the
    gain per held-out pixel must be above zero by 4 standard errors over images.
    """
    q = LogSNRLinear(6.0, -6.0)
    model = Reverse(Gaussian(q), Linear(q), X0(Exact()), Discretized(17))
    x, draws = DIGITS.encode(DIGITS.test[:48]), 12
    mask = torch.arange(64).view(1, 8, 8) < 32
    many = x.repeat_interleave(draws, 0)
    factor = Observed(many, mask, moments_of(DIGITS), grain_of(DIGITS))
    given = posterior_samples(model, factor, q.grid(50), 6, batch=10**6)
    free = Observed(many, torch.zeros_like(mask))
    alone = posterior_samples(model, free, q.grid(50), 1, seed=1, batch=10**6)
    assert not bool(alone.resampled.any()) and float(alone.log_evidence.abs().max()) < 1e-5
    with_, without = (loss(found, x, draws)[:, ~mask].mean(1) for found in (given, alone))
    gain = Estimate.of((without - with_) / math.log(2), unit="bits/pixel")
    assert gain.mean > 4 * gain.se and gain.mean > 0.15, gain
    inside = loss(given, x, draws)[:, mask]
    assert float(inside.max()) < 0.1


def test_moments_are_those_of_the_training_data() -> None:
    mean, variance = moments_of(DIGITS)
    x = DIGITS.encode(DIGITS.train).double()
    torch.testing.assert_close(mean, x.mean(0))
    assert float(variance.min()) == pytest.approx((2 / 16) ** 2 / 12)
    assert float((variance - x.var(0)).abs().max()) < 1e-2


def test_bits_are_conditions_too(tmp_path: Path) -> None:
    """Three known bits of a heartbeat come back as they are, from an untrained model."""
    recipe = build(Heartbeat(latents=10))
    y = np.full(20, np.nan)
    y[[2, 7, 3]] = [1, 1, 0]
    np.save(tmp_path / "y.npy", y)
    found = condition_of(Sample(run=tmp_path, observe=tmp_path / "y.npy"), recipe.dataset)
    rate, _ = moments_of(recipe.dataset)
    assert bool(((rate > 0) & (rate < 1)).all()) and grain_of(recipe.dataset) == 0
    assert found.offset == 0 and found.given[[2, 7, 3]].tolist() == [1.0, 1.0, 0.0]
    particles = posterior_samples(recipe.model, found.factor, recipe.times, 16, populations=3)
    known = particles.x_0[..., found.mask]
    assert bool((known == found.given[found.mask]).all())
    assert set(particles.x_0.unique().tolist()) == {0.0, 1.0}
    assert bool((particles.log_evidence < 0).all())


def test_conditions_are_read_on_the_models_scale(files: Path) -> None:
    options = Sample(run=files, denoise=files / "digit.png", noise=25.5)
    found = condition_of(options, DIGITS)
    torch.testing.assert_close(found.given, DIGITS.encode(DIGITS.test[3:4])[0], atol=4e-3, rtol=0)
    assert float(found.factor.scale.mean()) == pytest.approx(0.2)  # type: ignore[attr-defined]
    assert found.offset == pytest.approx(64 * math.log(2 / 255))
    array = condition_of(Sample(run=files, denoise=files / "flat.npy", noise=1.6), DIGITS)
    assert float(array.factor.scale.max()) == pytest.approx(0.2)  # type: ignore[attr-defined]
    assert int(array.mask.sum()) == 32
