"""The heartbeat: its data, and its recipe from training to the comparison with the optimum."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import silent

from nelbo.data.heartbeat import heartbeat, patterns
from nelbo.errors import InputRefused
from nelbo.recipes.bits import references
from nelbo.recipes.build import build
from nelbo.recipes.limits import check
from nelbo.recipes.options import Heartbeat

SMALL = [
    *("--steps", "20", "--latents", "10", "--batch", "16", "--width", "16", "--samples", "8"),
    *("--validate-every", "0", "--save-every", "15", "--threads", "1", "--quiet"),
]


# --- data ----------------------------------------------------------------------------------------


def test_patterns_have_a_one_at_every_period_th_place() -> None:
    for length, period in ((20, 5), (7, 3), (4, 4)):
        rows = patterns(length, period)
        assert rows.shape == (period, length) and rows.dtype == torch.uint8
        assert bool((rows.sum(0) == 1).all())
        for phase, row in enumerate(rows.tolist()):
            assert [i for i, bit in enumerate(row) if bit] == list(range(phase, length, period))


@pytest.mark.parametrize(("length", "period"), [(20, 1), (4, 5), (0, 2)])
def test_no_rhythm_is_refused(length: int, period: int) -> None:
    with pytest.raises(InputRefused, match="no rhythm"):
        patterns(length, period)


def test_data_are_bits_that_the_model_sees_as_they_are() -> None:
    data = heartbeat(seed=3)
    x = data.encode(data.train[:100])
    assert x.dtype == torch.float32 and x.shape == (100, 20)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(data.decode(x), data.train[:100])
    assert (data.levels, data.dims, data.binary, data.offset()) == (2, 20, True, 0.0)
    assert data.uniform_baseline() == pytest.approx(20 * math.log(2))


def test_truth_is_the_entropy_of_the_phases() -> None:
    data = heartbeat(12, 4, n_train=4000)
    assert data.truth is not None
    assert data.truth.entropy == pytest.approx(math.log(4))
    assert bool((data.truth.log_prob(data.test) == -math.log(4)).all())
    wrong = data.test[:1].clone()
    wrong[0, 0] = 1 - wrong[0, 0]
    assert float(data.truth.log_prob(wrong)) == -math.inf
    # every phase, 1000 expected of 4000: |z| < 5.5 fails for 4 of them at a rate of 2e-7
    counts = (data.train[:, :4].double()).sum(0)
    assert float((counts - 1000).abs().max()) < 5.5 * math.sqrt(4000 * 0.25 * 0.75)


def test_data_follow_the_seed() -> None:
    one, same, other = heartbeat(seed=0), heartbeat(seed=0), heartbeat(seed=1)
    assert torch.equal(one.train, same.train) and not torch.equal(one.train, other.train)
    assert one.record["sha256"] == same.record["sha256"]


# --- recipe --------------------------------------------------------------------------------------


def test_references_of_the_papers_set_up() -> None:
    """The paper's figure, the optimum that golden values hold, and the truth."""
    options = Heartbeat()
    check(options)
    data = heartbeat()
    small = Heartbeat(latents=20)
    times = torch.arange(1, 21, dtype=torch.float64) / 20
    found = {r.name: r.bits for r in references(small, data, times)()}
    assert found["exact optimum of this set-up"] == pytest.approx(-4.842575, abs=1e-6)
    assert found["truth"] == pytest.approx(-math.log2(5))
    assert not any("2015" in name for name in found)
    trained = Heartbeat(latents=20, decoder="bernoulli")
    found = {r.name: r.bits for r in references(trained, data, times)()}
    assert found["exact optimum of this set-up"] == pytest.approx(-2.581335, abs=1e-6)


def test_the_defaults_are_the_papers() -> None:
    recipe = build(Heartbeat(width=16))
    assert len(recipe.times) == 2000 and recipe.dataset.dims == 20
    assert recipe.description["process"].endswith("rate 0.2")
    assert "fixed" in recipe.description["decoder"]


@pytest.mark.parametrize(
    ("predict", "decoder"), [("context", "bernoulli"), ("flip", "bernoulli"), ("logits", "fixed")]
)
def test_a_run_ends_with_the_comparison(tmp_path: Path, predict: str, decoder: str) -> None:
    """Bound, K, optimum and truth on the screen; per-step entropies in the arrays; a report."""
    out = tmp_path / "run"
    arguments = ["train", "heartbeat", *SMALL, "--length", "8", "--period", "4"]
    arguments += ["--stationary", ".25", "--predict", predict, "--decoder", decoder]
    code, text, err = silent([*arguments, "--out", str(out)])
    assert code == 0, err
    names = ["-L (the bound)", "exact optimum", "truth", "L_null"]
    names += ["K (entropy form)", "K - L_null"] if decoder == "fixed" else []
    assert all(name in text for name in names)
    file = next((out / "evaluation").glob("test-*.json"))
    found = json.loads(file.read_text())["comparison"]
    optimum = found["references"]["exact optimum of this set-up"]
    assert found["minus_bound"]["unit"] == "bits/example"
    assert found["minus_bound"]["mean"] - 6 * found["minus_bound"]["se"] < optimum < -2.0
    if decoder == "fixed":
        gap = found["K"]["mean"] - found["minus_bound"]["mean"]
        # the two differ by the draws of the decoder term alone, as the activity is that of π
        assert abs(gap) < 6 * found["minus_bound"]["se"]
        assert found["K_plus_bound"]["mean"] == pytest.approx(0, abs=1e-9)
    with np.load(file.with_suffix(".npz")) as arrays:
        lower, upper = arrays["step_entropy_lower"], arrays["step_entropy_upper"]
        assert lower.shape == upper.shape == (9,) and bool((lower < upper + 1e-12).all())
    assert (out / "report.html").is_file() and (out / "samples" / "samples.png").is_file()
    with np.load(out / "samples" / "samples.npz") as arrays:
        assert arrays["samples"].shape == (8, 8) and arrays["samples"].max() <= 1

    code, _, err = silent(["sample", str(out), "--sampler", "ddim", "--quiet"])
    assert code == 2 and "ancestral" in err
    few = ["evaluate", str(out), "--calls", "4", "--limit", "64", "--quiet"]
    code, text, err = silent(few)
    assert code == 0 and "-L (the bound)" in text, err
