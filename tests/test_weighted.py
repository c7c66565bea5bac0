"""`nelbo evaluate --importance`, and the heartbeat that it is tried on, from training on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import silent

from nelbo.likelihood import ImportanceWeighted
from nelbo.walks import weighted

LATENTS = 20
SHORT = [
    *("--latents", str(LATENTS), "--steps", "250", "--batch", "128", "--width", "64"),
    *("--validate-every", "0", "--save-every", "250", "--samples", "8"),
    *("--threads", "1", "--quiet"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's heartbeat with 20 latents, trained for 250 updates: about 3 s."""
    path = tmp_path_factory.mktemp("weighted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nelbo.report.write", lambda run: run / "report.html")
        code, _, err = silent(["train", "heartbeat", *SHORT, "--out", str(path)])
    assert code == 0, err
    return path


def document(run: Path, pattern: str) -> dict[str, Any]:
    (file,) = (run / "evaluation").glob(f"{pattern}.json")
    value: dict[str, Any] = json.loads(file.read_text())
    return value


def test_a_short_heartbeat_ends_above_its_optimum(run: Path) -> None:
    """No model is better than the exact one, and a trained one is within a bit of it.

    K has no noise but that of its draws: 5 standard errors fail at a rate of 3e-7. Untrained
    models lie 9 bits below.
    """
    found = document(run, "test-*-full-seed0")["comparison"]
    optimum = found["references"]["exact optimum of this set-up"]
    assert optimum == pytest.approx(-4.842575, abs=1e-6)
    assert found["references"]["truth"] == pytest.approx(-math.log2(5))
    for name in ("K", "minus_bound"):
        value = found[name]
        assert value["mean"] < optimum + 5 * value["se"], name
        assert value["mean"] > optimum - 1.0, name
        assert value["unit"] == "bits/example"
    gain = found["K"]["mean"] - found["null"]["mean"]
    assert found["K_minus_null"]["mean"] == pytest.approx(gain)
    assert found["null"]["mean"] == pytest.approx(4 * math.log2(0.2) + 16 * math.log2(0.8))


def test_the_screen_and_the_document_state_the_number_and_the_size(run: Path) -> None:
    command = ["evaluate", str(run), "--importance", "8", "--limit", "200", "--quiet"]
    code, text, err = silent(command)
    assert code == 0, err
    assert "M = 8 joint trajectories; effective sample size" in text
    assert "-log p <= " in text and "likelihood" not in text.lower()
    value = document(run, "test200-*-importance8-*")
    found, dims = value["importance"], value["data"]["dims"]
    assert found["draws"] == 8 and found["n"] == 200 and found["unit"] == "bits/dim"
    assert [point["draws"] for point in found["curve"]] == [1, 2, 4, 8]
    assert found["curve"][-1]["mean"] == found["mean"]
    assert 1 <= found["ess"]["least"] <= found["ess"]["median"] <= 8
    assert found["statement"] in text
    (file,) = (run / "evaluation").glob("test200-*-importance8-*.npz")
    with np.load(file) as arrays:
        each, ess = arrays["importance"], arrays["importance_ess"]
    assert each.shape == ess.shape == (200,)
    assert each.mean() / dims / math.log(2) == pytest.approx(found["mean"])
    assert np.median(ess) == pytest.approx(found["ess"]["median"], abs=0.1)


def test_it_lies_between_the_truth_and_the_bound(run: Path) -> None:
    """−log p <= L_8 < L_1 = L, 5 standard errors wide."""
    code, text, err = silent(
        ["evaluate", str(run), "--importance", "8", "--seed", "1", "--limit", "100", "--json"]
    )
    assert code == 0, err
    value = json.loads(text)
    found, first = value["importance"], value["importance"]["curve"][0]
    assert found["mean"] + 5 * found["se"] > value["truth"]["entropy"]["mean"]
    assert first["mean"] - found["mean"] > 5 * (first["se"] + found["se"])
    total = value["terms"]["total"]
    assert abs(first["mean"] - total["mean"]) < 5 * math.hypot(first["se"], total["se"])


def test_the_report_shows_what_was_weighed(run: Path) -> None:
    """It has a name of its own: the evaluation of the training run stays."""
    before = {path: path.read_bytes() for path in (run / "evaluation").glob("test-*")}
    code, _, err = silent(["evaluate", str(run), "--importance", "2", "--quiet"])
    assert code == 0, err
    assert all(path.read_bytes() == data for path, data in before.items())
    code, _, err = silent(["report", str(run)])
    assert code == 0, err
    page = (run / "report.html").read_text()
    assert "From M = 2 weighted trajectories" in page
    assert "exact optimum of this set-up" in page and "bits/sequence" in page
    assert (run / "report" / "steps.png").is_file()


def test_no_trajectory_is_no_measurement(run: Path) -> None:
    code, _, err = silent(["evaluate", str(run), "--importance", "0", "--quiet"])
    assert code == 2 and "--importance 0" in err and "at least 1" in err


def test_weights_that_are_all_zero_are_null_in_json() -> None:
    found = ImportanceWeighted(torch.full((3, 4), -math.inf, dtype=torch.float64))
    value = weighted.entry(found, 2)
    text = json.dumps(value, allow_nan=False)
    assert json.loads(text)["importance"]["mean"] is None
    assert "?" in weighted.lines(value) and "far below" in weighted.lines(value)
