"""`evaluate --until` and `--against` from the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tiny import silent


def base(run: Path, *more: str) -> list[str]:
    return ["evaluate", str(run), "--quiet", "--threads", "1", *more]


def test_until_an_error(run_copy: Path) -> None:
    code, out, err = silent(base(run_copy, "--until", "0.05", "--json"))
    assert code == 0, err
    value = json.loads(out)
    total = value["terms"]["total"]
    assert total["se_mc"] <= 0.05 and total["n"] == 297
    low, high = value["interval95"]["set"]
    assert 2 * 1.96 * total["se_mc"] <= high - low < 2 * 2.2 * total["se_mc"]
    assert low < total["mean"] < high
    names = [row["name"] for row in value["savings"]]
    assert names[0] == "all of it" and names[-1] == "uniform times only"
    stored = list((run_copy / "evaluation").glob("*until0.05*.json"))
    assert len(stored) == 1 and json.loads(stored[0].read_text()) == value
    assert value["until"] == {"target": 0.05, "of": "se_mc", "reached": True, "why": None}
    code, out, _ = silent(base(run_copy, "--until", "1e-6", "--calls", "3"))
    assert code == 0 and "without Latin pairing" in out
    assert "--until 1e-06 (se_mc) is not reached: stopped at --calls 3" in out
    code, out, _ = silent(base(run_copy, "--until", "0.004", "--error", "se"))
    assert code == 0 and "which only more examples can lower" in out
    assert "in all for the pilot" in out


def test_devices_are_switched_off_by_name(run_copy: Path) -> None:
    words = ["--calls", "2", "--json", "--without", "wiener,shrinkage,features,pairing"]
    code, out, _ = silent(base(run_copy, *words))
    names = {row["name"] for row in json.loads(out)["savings"]}
    assert code == 0 and names == {"all of it", "without allocation", "uniform times only"}
    code, _, err = silent(base(run_copy, "--calls", "2", "--without", "magic"))
    assert code == 2 and "there are wiener, shrinkage, features, allocation" in err


def test_a_model_against_itself_differs_by_nothing(finished_run: Path, run_copy: Path) -> None:
    words = ["--calls", "2", "--json", "--against", str(finished_run)]
    code, out, err = silent(base(run_copy, *words))
    assert code == 0, err
    value = json.loads(out)
    assert value["shared"] == "examples, times and noise"
    gap = value["difference"]["total"]
    assert gap["mean"] == gap["se"] == gap["se_mc"] == 0
    assert value["terms"] == value["against"]["terms"]
    (path,) = (run_copy / "evaluation").glob("against-*.npz")
    with np.load(path) as arrays:
        assert arrays["difference"].shape == (297,) and not arrays["difference"].any()
    code, out, _ = silent(base(run_copy, "--calls", "2", "--against", str(finished_run)))
    assert code == 0 and "cannot be told" in out
    assert len(list((run_copy / "evaluation").glob("against-*.npz"))) == 2, "nothing is replaced"


def test_two_measurements_at_once_are_refused(finished_run: Path) -> None:
    against = ["--against", str(finished_run)]
    for more, words, expected in (
        (["--importance", "2"], "--importance speaks of one model", 2),
        (["--steps", "5"], "--against and --steps are measurements of their own", 2),
        (["--against-checkpoint", "77"], "take newest, best or one of the steps 12", 2),
    ):
        code, _, err = silent(base(finished_run, *against, *more))
        assert code == expected and words in err


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["evaluate", "--error", "se"], "--error does nothing without --until"),
        (["evaluate", "--without", "wiener"], "--without does nothing without --calls or --until"),
        (["evaluate", "--against-checkpoint", "12"], "does nothing without --against"),
        (["sample", "--eta", "0.5"], "--eta does nothing without --sampler ddim"),
        (["sample", "--grid", "logsnr"], "--grid does nothing without --steps"),
        (["sample", "--at", "0.3"], "--at does nothing without --interpolate"),
    ],
)
def test_options_without_an_effect_are_refused(
    words: list[str], needed: str, finished_run: Path
) -> None:
    code, _, err = silent([words[0], str(finished_run), *words[1:]])
    assert code == 2 and needed in err


def test_samples_are_never_overwritten(run_copy: Path) -> None:
    words = ["sample", str(run_copy), "--steps", "3", "--quiet", "--json", "--threads", "1"]
    paths = []
    for n in ("7", "5"):
        code, out, err = silent([*words, "--n", n])
        assert code == 0, err
        paths.append(Path(json.loads(out)["array"]))
    assert paths[0] != paths[1]
    for path, n in zip(paths, (7, 5), strict=True):
        with np.load(path) as arrays:
            assert len(arrays["samples"]) == n


def test_the_same_figure_with_fewer_calls(finished_run: Path) -> None:
    """Half a call per image against every step, twice: within 5 of their errors (6e-7)."""
    full = json.loads(silent(base(finished_run, "--json"))[1])["terms"]["total"]
    few = json.loads(silent(base(finished_run, "--calls", "0.5", "--json"))[1])["terms"]["total"]
    assert few["se_mc"] > full["se_mc"]
    assert abs(few["mean"] - full["mean"]) < 5 * math.hypot(few["se_mc"], full["se_mc"])
