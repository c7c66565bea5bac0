"""Rate and distortion agree with the bound and with theory; pictures between two images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import GaussianData, assert_mean, exact_model, expected_bound, gaussian_points
from PIL import Image
from tiny import silent
from torch import Tensor

from nelbo import report
from nelbo.errors import NumericalFailure, UsageError
from nelbo.estimate import Estimate
from nelbo.interpolation import between, interpolate
from nelbo.pictures import sample_grid
from nelbo.progressive import cuts, measure, root_mean
from nelbo.reverse import Reverse
from nelbo.runfiles import load
from nelbo.samplers import Ancestral
from nelbo.schedules import LogSNRLinear
from nelbo.variances import Posterior
from nelbo.walks.interpolate import place

DATA = GaussianData([0.5, -0.2], [[0.49, 0.3], [0.3, 1.7]])
SCHEDULE = LogSNRLinear(6.0, -5.0)
TIMES = SCHEDULE.grid(41)


def exact() -> Reverse:
    return exact_model(DATA, SCHEDULE, Posterior())


def examples(n: int) -> Tensor:
    torch.manual_seed(1)
    return torch.distributions.MultivariateNormal(DATA.mean, DATA.cov).sample((n,))


# --- the curve -----------------------------------------------------------------------------------


def test_cuts_hold_both_ends_and_keep_to_the_calls() -> None:
    for latents, calls in ((41, 9), (41, 1000), (2, 3), (1000, 64)):
        places = cuts(latents, calls)
        assert int(places[0]) == 0 and int(places[-1]) == latents - 1
        assert bool((places.diff() > 0).all()) and 2 * len(places) - 1 <= max(calls, 3)
    assert cuts(41, 1000).tolist() == list(range(41))


@pytest.mark.parametrize("calls", [9, 21])
def test_every_point_is_unbiased_for_the_models_own_grid(calls: int) -> None:
    """Rates, errors and the decoder against closed forms; K strata stand for all 40 pairs."""
    model, n = exact(), 3000
    result = measure(model, examples(n), TIMES, calls)
    places = cuts(len(TIMES), calls).flip(0)
    assert torch.equal(result.times, TIMES[places]) and result.calls == 2 * len(places) - 1
    truth = expected_bound(model, gaussian_points(DATA), TIMES)
    above = truth.diffusion[0].flip(0).cumsum(0).flip(0)
    comparisons = 2 * len(places) + 1
    mmse = DATA.mmse(SCHEDULE.logsnr(TIMES))
    for k, place_ in enumerate(places.tolist()):
        rate = float(truth.prior) + (float(above[place_]) if place_ < len(TIMES) - 1 else 0.0)
        assert_mean(result.rate[:, k], rate, comparisons, f"rate {k}")
        assert_mean(result.error[:, k], float(mmse[place_]), comparisons, f"error {k}")
    assert_mean(result.decoder, float(truth.reconstruction), comparisons, "decoder")


def test_one_pair_for_a_stratum_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the first pair of each stratum stood for all its members."""
    monkeypatch.setattr(
        "nelbo.drawing.Drawer.uniform",
        lambda drawer, rows, count, *p: torch.zeros(len(rows), count).double(),
    )
    with pytest.raises(AssertionError, match="rate"):
        test_every_point_is_unbiased_for_the_models_own_grid(9)


def test_rates_rise_and_errors_fall() -> None:
    result = measure(exact(), examples(500), TIMES, 21)
    rates = [rate.mean for rate in result.rates()]
    roots = [root for root, _ in result.distortions()]
    assert rates == sorted(rates) and roots == sorted(roots, reverse=True)


def test_batches_change_nothing() -> None:
    x_0 = examples(200)
    one, many = (measure(exact(), x_0, TIMES, 9, batch=b, seed=3) for b in (64, 512))
    for name in ("rate", "error", "decoder"):
        torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=1e-12, atol=1e-12)


def test_the_error_of_a_root() -> None:
    """se of √mean by the delta method, against 2,000 repetitions."""
    torch.manual_seed(0)
    square = torch.randn(2000, 400, dtype=torch.float64) ** 2
    roots = square.mean(1).sqrt()
    _, se = root_mean(Estimate.of(square[0]), 1.0)
    assert float(roots.std()) == pytest.approx(se, rel=0.15)
    assert root_mean(Estimate.of(square[0]), 127.5)[1] == pytest.approx(127.5 * se)
    assert root_mean(Estimate.of(torch.zeros(4)), 1.0) == (0.0, 0.0)


def test_what_is_not_finite_is_refused() -> None:
    x_0 = examples(10)
    x_0[3] = math.inf
    with pytest.raises(NumericalFailure):
        measure(exact(), x_0, TIMES, 5)


# --- between two images --------------------------------------------------------------------------


def test_points_between_are_linear_with_one_noise() -> None:
    ends, t = torch.tensor([[1.0, -1.0], [0.2, 0.4]]).double(), TIMES[20]
    shares = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    torch.manual_seed(0)
    found = between(exact(), ends, shares, t)
    torch.testing.assert_close(found[1], 0.75 * found[0] + 0.25 * found[2])
    noise = (found[[0, 2]] - SCHEDULE.keep(t).sqrt() * ends) / SCHEDULE.lose(t).sqrt()
    torch.testing.assert_close(noise[0], noise[1])


def test_early_latents_keep_the_images_and_late_ones_do_not() -> None:
    ends = torch.tensor([[1.0, -1.0], [-0.6, 0.8]]).double()
    shares = torch.linspace(0, 1, 5, dtype=torch.float64)
    straight = (1 - shares[:, None]) * ends[0] + shares[:, None] * ends[1]
    torch.manual_seed(0)
    near, far = (interpolate(exact(), ends, shares, TIMES[:k]) for k in (1, 41))
    assert float((near - straight).abs().max()) < 0.4
    # the walk shares its noise too: from pure noise, all columns come out nearly the same
    assert float((far[0] - far[-1]).abs().max()) < 0.5 * float((ends[0] - ends[1]).abs().min())


def test_one_column_is_an_ancestral_walk() -> None:
    """With one λ the shared noise is a walk's own: the sampler's draws, bit for bit."""
    model, sampler = exact(), Ancestral()
    x, share = examples(1), torch.zeros(1, dtype=torch.float64)
    torch.manual_seed(3)
    found = interpolate(model, torch.cat([x, x]), share, TIMES[:9])
    torch.manual_seed(3)
    walked = between(model, torch.cat([x, x]), share, TIMES[8])
    for i in range(8, 0, -1):
        walked, _ = sampler.step(model, walked, TIMES[i], TIMES[i - 1], None)
    assert torch.equal(found, sampler.finish(model, walked, TIMES[0], None))


@pytest.mark.parametrize(("at", "index"), [(1.0, 40), (0.5, 20), (0.001, 0), (2, 1), (41, 40)])
def test_places_of_the_grid(at: float, index: int) -> None:
    assert place(at, TIMES) == index


@pytest.mark.parametrize("at", [0.0, -1.0, 1.5, 42.0])
def test_places_that_are_not_there(at: float) -> None:
    with pytest.raises(UsageError, match="fraction"):
        place(at, TIMES)


def test_a_grid_with_columns() -> None:
    images = np.zeros((6, 1, 4, 4), np.uint8)
    high, wide, _ = sample_grid(images, 2, columns=3).shape
    assert wide > 1.4 * high


# --- as commands ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(finished_run: Path) -> dict[str, Any]:
    code, out, err = silent(["evaluate", str(finished_run), "--progressive", "--json"])
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_the_document_and_its_page(
    finished_run: Path, measured: dict[str, Any], no_report: None
) -> None:
    (file,) = (finished_run / "evaluation").glob("progressive-test-*.json")
    assert json.loads(file.read_text()) == measured
    assert file.with_suffix(".png").is_file() and file.with_suffix(".npz").is_file()
    assert measured["total"]["mean"] == pytest.approx(
        measured["rate"]["mean"] + measured["distortion"]["mean"]
    )
    assert measured["points"][-1]["rate"] == measured["rate"]
    assert measured["rmse"]["unit"] == "levels of 0–16" and len(measured["points"]) == 20
    page = report.render(load(finished_run), report.draw(load(finished_run)))
    assert "Rate and distortion" in page and "progressively" in page


def test_the_curve_agrees_with_the_bound(finished_run: Path, measured: dict[str, Any]) -> None:
    code, out, err = silent(["evaluate", str(finished_run), "--json"])
    assert code == 0, err
    full = json.loads(out)["terms"]
    error = math.hypot(full["total"]["se_mc"], measured["total"]["se"])
    assert abs(measured["total"]["mean"] - full["total"]["mean"]) < 5 * error


def test_the_table(finished_run: Path) -> None:
    code, out, err = silent(
        ["evaluate", str(finished_run), "--progressive", "--calls", "7", "--limit", "30"]
    )
    assert code == 0, err
    assert "7 network calls" in out and "RMSE, levels of 0–16" in out and "distortion, L_0" in out


def test_a_strip_of_guesses(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "strip"
    words = ["sample", str(finished_run), "--progressive", "--n", "3", "--out", str(out)]
    code, _, err = silent(words)
    assert code == 0, err
    with np.load(out / "progressive.npz") as found:
        assert found["guesses"].shape == (12, 3, 1, 8, 8) and np.isinf(found["logsnr"][-1])
        assert np.array_equal(found["guesses"][-1], found["latents"][-1])
    assert Image.open(out / "progressive.png").size[0] > 500
    assert silent(words)[0] == 2


def test_between_two_images(finished_run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "one.png"
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(picture)
    out = tmp_path / "between"
    code, text, err = silent(
        [
            *("sample", str(finished_run), "--interpolate", "3", str(picture), "--n", "4"),
            *("--at", "0.05", "1", "--out", str(out), "--json"),
        ]
    )
    assert code == 0, err
    assert len(json.loads(text)["logsnr"]) == 2
    with np.load(out / "interpolation.npz") as found:
        assert found["images"].shape == (2, 4, 1, 8, 8)
        assert int(found["ends"][1].min()) == 16


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--interpolate", "3", "9999"], 3, "the examples 0 to"),
        (["--interpolate", "3", "4", "--at", "7.5"], 2, "--at 7.5"),
        (["--interpolate", "3", "4", "--at", "-1"], 2, "above 0"),
        (["--interpolate", "3", "4", "--progressive"], 2, "take one of them"),
        (["--interpolate", "3", "4", "--sampler", "ddim"], 2, "--sampler ancestral"),
        (["--interpolate", "3", "4", "--hole", "2"], 2, "condition"),
        (["--progressive", "--hole", "2"], 2, "condition"),
        (["--interpolate", "3", "none.png"], 3, "none.png"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[str], code: int, message: str, finished_run: Path
) -> None:
    found, _, err = silent(["sample", str(finished_run), *words])
    assert found == code and message in err


def test_importance_weights_are_another_measurement(finished_run: Path) -> None:
    code, _, err = silent(
        ["evaluate", str(finished_run), "--progressive", "--importance", "2", "--limit", "4"]
    )
    assert code == 2 and "leave out --importance" in err
