"""Recipes of the 2015 experiments, from training to the comparison at their end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import silent

from nelbo.data.embedded import digits
from nelbo.errors import InputRefused, UsageError
from nelbo.processes.bernoulli import Bernoulli
from nelbo.recipes import limits
from nelbo.recipes.build import build
from nelbo.recipes.options import Bits, DeadLeaves, Mnist, SwissRoll, Texture
from nelbo.walks.comparison import deviation

SHORT = [
    *("--steps", "6", "--batch", "8", "--latents", "10", "--save-every", "3", "--calls", "4"),
    *("--validate-every", "0", "--samples", "4", "--threads", "1", "--quiet"),
]
NET = ["--channels", "8", "--multipliers", "1", "2", "--layers", "1", "--attention"]
SMALL: dict[str, Any] = {
    "channels": 8,
    "multipliers": (1, 2),
    "layers": 1,
    "attention": (),
    "latents": 10,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph, an IDX file of images that are mostly black, and rows of bits."""
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (20, 120, 3), dtype=np.uint8)).save(
        folder / "photo.png"
    )
    images = random.integers(0, 256, (60, 8, 8)) * (random.random((60, 8, 8)) < 0.3)
    head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
    (folder / "images-idx3").write_bytes(head + images.astype(np.uint8).tobytes())
    np.save(folder / "bits.npy", random.random((200, 5)) < 0.3)
    return folder


def trained(out: Path, *words: str) -> tuple[str, dict[str, Any]]:
    """Screen and evaluation of a run."""
    code, text, err = silent(["train", *words, "--out", str(out)])
    assert code == 0, err
    document = next((out / "evaluation").glob("test-*.json")).read_text()
    assert (out / "report.html").is_file()
    return text, json.loads(document)


# --- Swiss roll ----------------------------------------------------------------------------------


def test_the_swiss_roll_ends_with_its_gap(tmp_path: Path) -> None:
    """K, −h, the gap, and the gap of the exact denoiser on the same grid of 40 latents."""
    text, document = trained(
        tmp_path / "run",
        *("swissroll", *SHORT, "--latents", "40", "--examples", "400", "--width", "16"),
        *("--calls", "8", "--steps", "30", "--rate", "3e-3"),
    )
    found = document["comparison"]
    truth, optimum = (
        found["references"][name] for name in ("truth", "exact optimum of this set-up")
    )
    exact = document["truth"]["exact_denoiser"]["total"]
    apart = exact["mean_bits_per_example"] - document["terms"]["total"]["mean_bits_per_example"]
    assert found["gap_optimum"] == pytest.approx(found["gap"]["mean"] + apart)
    # the optimum among the references is measured on draws of its own
    assert abs(found["gap_optimum"] - (truth - optimum)) < 6 * 2 * exact["se"]
    assert found["gap_ratio"] == pytest.approx(found["gap"]["mean"] / found["gap_optimum"])
    # the gap leaves out how the test examples differ from the truth: the plain one is close
    plain = truth - found["minus_bound"]["mean"]
    assert abs(plain - found["gap"]["mean"]) < 6 * found["minus_bound"]["se"]
    entropy = document["truth"]["entropy"]["mean"]
    other = 2 * (exact["mean"] - entropy)
    assert abs(other - found["gap_optimum"]) < 6 * 2 * exact["se"]
    assert 0 < found["gap_optimum"] < found["gap"]["mean"]
    assert found["K"]["unit"] == "bits/example"
    for words in ("K (entropy form)", "ratio of the two gaps", "same draws", "truth"):
        assert words in text


def test_the_truth_is_minus_the_entropy_on_the_models_scale() -> None:
    recipe = build(SwissRoll(latents=4, width=16, depth=1, examples=400))
    known = {reference.name: reference.bits for reference in recipe.references()}
    mixture = recipe.dataset.scaled_components()
    assert known["truth"] == pytest.approx(-mixture.entropy()[0] / math.log(2), abs=1e-6)


# --- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["deadleaves", "texture", "digits"])
def test_images_end_with_k(recipe: str, files: Path, tmp_path: Path) -> None:
    """bits/dim = log2 σ − K/c, and the paper's figure where it has one."""
    words = {
        "deadleaves": ["deadleaves", "--size", "8", "--examples", "40"],
        "texture": ["texture", str(files / "photo.png"), *("--size", "8", "--color")],
        "digits": ["digits"],
    }[recipe]
    more = ["--fourier"] if recipe != "digits" else []
    more += ["--logsnr-max", "6", "--rate", "1e-3"]
    text, document = trained(tmp_path / "run", *words, *SHORT, *NET, *more)
    found, total = document["comparison"], document["terms"]["total"]
    channels = 3 if recipe == "texture" else 1
    k = channels * (math.log2(found["sigma_levels"]) - total["mean"])
    assert found["K"]["mean"] == pytest.approx(k, rel=1e-6)
    assert found["K"]["unit"] == "bits/pixel" and found["dims_per_pixel"] == channels
    assert found["null"]["mean"] == pytest.approx(-2.047 * channels, abs=1e-3 * channels)
    assert "bits/dim = log2(sigma) - K/channels" in text
    assert (1.489 in found["references"].values()) == (recipe == "deadleaves")


def test_sigma_is_that_of_the_dequantised_levels() -> None:
    """Against the standard deviation of all levels plus a uniform number."""
    data = digits()
    assert deviation(data) ** 2 == pytest.approx(
        float(data.train.double().var(correction=0)) + 1 / 12, rel=1e-12
    )


def test_the_known_figure_is_the_conversion_of_cifar10() -> None:
    """K = 5.4 bits/pixel at σ = .2516·255 levels is 4.2 bits/dim."""
    assert math.log2(0.2516 * 255) - 5.4 / 3 == pytest.approx(4.20, abs=0.01)


def test_a_hole_in_the_middle_is_filled_in(files: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ["--size", "8", "--examples", "40", "--fourier", "--logsnr-max", "6"]
    trained(run, "texture", str(files / "photo.png"), *small, *SHORT, *NET)
    out = tmp_path / "filled"
    ask = ["sample", str(run), "--hole", "4", "--n", "2", "--particles", "3", "--quiet"]
    code, _, err = silent([*ask, "--out", str(out)])
    assert code == 0, err
    with np.load(out / "samples.npz") as arrays, np.load(run / "samples/samples.npz") as other:
        mask = arrays["mask"][0]
        assert mask.sum() == 48 and not mask[2:6, 2:6].any()
        first = other["real"][0]
        assert (arrays["samples"][:, :, mask] == first[:, mask]).all()
    assert (out / "conditional.png").is_file()
    for words, message in (
        (["--hole", "8"], "smaller than their sides"),
        (["--hole", "0"], "at least 1"),
        (["--hole", "2", "--denoise", "x.png", "--noise", "3"], "--hole is a mask of its own"),
    ):
        code, _, err = silent(["sample", str(run), *words, "--quiet"])
        assert code == 2 and message in err


# --- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["threshold", "stochastic"])
def test_binarised_images(rule: str, files: Path, tmp_path: Path) -> None:
    """Bernoulli diffusion under a U-Net: the bound in nats too, and the run resumes."""
    out = tmp_path / "run"
    words = ["mnist", str(files / "images-idx3"), "--binarize", rule, *SHORT, *NET]
    text, document = trained(out, *words, "--stationary", "data")
    found, total = document["comparison"], document["terms"]["total"]
    nats = total["mean"] * 64 * math.log(2)
    assert found["bound_nats"]["mean"] == pytest.approx(nats, rel=1e-6)
    assert found["bound_nats"]["unit"] == "nats/image" and "nats/image" in text
    assert document["model"]["process"].startswith("Bernoulli diffusion")
    stored = json.loads((out / "recipe.json").read_text())
    assert rule in stored["data"]["binarize"]["rule"]
    with np.load(out / "samples" / "samples.npz") as arrays:
        assert arrays["samples"].shape == (4, 1, 8, 8) and arrays["samples"].max() <= 1
    code, again, err = silent(["train", *words, "--out", str(out), "--resume"])
    assert code == 0 and again == text, err


def test_options_of_grey_levels_say_nothing_of_bits(files: Path) -> None:
    path = files / "images-idx3"
    for more in ({"predict": "levels"}, {"augment": 0.1}, {"schedule": "linear"}, {"fourier": ()}):
        name = f"--{next(iter(more))}"
        with pytest.raises(UsageError, match=name):
            build(Mnist(path=path, binarize="threshold", **SMALL, **more))  # type: ignore[arg-type]
    for more in ({"stationary": 0.2}, {"bits": "logits"}, {"bit_schedule": "linear"}):
        with pytest.raises(UsageError, match="--binarize"):
            build(Mnist(path=path, **SMALL, **more))  # type: ignore[arg-type]


def test_rows_of_bits_train_and_are_measured(files: Path, tmp_path: Path) -> None:
    words = ["bits", str(files / "bits.npy"), *SHORT, "--width", "16", "--depth", "1"]
    text, document = trained(tmp_path / "run", *words)
    assert "-L (the bound)" in text and document["data"]["levels"] == 2
    assert document["baselines"]["uniform"]["mean"] == pytest.approx(1)
    code, _, err = silent(["sample", str(tmp_path / "run"), "--n", "3", "--quiet"])
    assert code == 0, err


@pytest.mark.parametrize("stationary", [0.3, "data"])
def test_the_rate_of_pure_noise(stationary: Any, files: Path) -> None:
    """A number, or the share of ones in the training part."""
    options = Bits(path=files / "bits.npy", latents=10, width=16, stationary=stationary)
    recipe = build(options)
    ones = float(recipe.dataset.train.double().mean())
    process = recipe.model.process
    assert isinstance(process, Bernoulli)
    expected = ones if stationary == "data" else 0.3
    assert float(process.log_rate.exp()) == pytest.approx(expected)
    prior = process.prior(torch.zeros(2, 5)).mean
    assert torch.allclose(prior, torch.full((2, 5), expected), atol=1e-6)


def test_rates_outside_the_unit_interval_are_refused(files: Path) -> None:
    with pytest.raises(UsageError, match="--stationary"):
        limits.check(Bits(path=files / "bits.npy", stationary=1.0))
    limits.check(Bits(path=files / "bits.npy", stationary="data"))


def test_what_does_not_fit(files: Path) -> None:
    with pytest.raises(InputRefused, match="too few for crops"):
        build(Texture(path=files / "photo.png", **SMALL))
    with pytest.raises(InputRefused, match="radii"):
        build(DeadLeaves(**SMALL, radius_min=20.0))
    with pytest.raises(InputRefused, match="neither an .npy"):
        build(Bits(path=files / "photo.png", latents=10))
