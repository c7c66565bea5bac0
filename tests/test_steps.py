"""`nelbo evaluate --steps` and the chains of `nelbo sample`: tables, files, caches, refusals."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import z_limit
from tiny import silent

from nelbo.commands import Sample
from nelbo.errors import UsageError
from nelbo.walks.fitting import sampled
from nelbo.walks.steps import sizes_of, variances_of
from nelbo.walks.stored import open_run

SMALL = ["--steps", "4", "--width", "16", "--depth", "1", "--samples", "4", "--threads", "1"]
QUICK = ["--calls", "4", "--validate-every", "0"]


def evaluated(run: Path, *words: str) -> dict[str, Any]:
    """The document of `nelbo evaluate RUN words`."""
    code, out, err = silent(["evaluate", str(run), *words, "--json", "--quiet"])
    assert code == 0, err
    value: dict[str, Any] = json.loads(out)
    return value


def trained(folder: Path, recipe: str, *words: str) -> Path:
    code, _, err = silent(
        ["train", recipe, *SMALL, *QUICK, *words, "--out", str(folder), "--quiet"]
    )
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny digits run: 20 latents, levels, decoder mass."""
    copy = tmp_path_factory.mktemp("steps") / "digits"
    shutil.copytree(finished_run, copy)
    return copy


@pytest.fixture(scope="module")
def table(run: Path) -> dict[str, Any]:
    words = "--steps 3,8 --grid both --variance posterior,optimal --fit 150 --limit 140"
    return evaluated(run, *words.split())


def test_the_table(table: dict[str, Any], run: Path) -> None:
    """Every combination once; predictions and evaluations agree, with 8 comparisons ≤ 1e-6."""
    rows = {(r["latents"], r["grid"], r["variance"]): r for r in table["steps"]}
    assert len(rows) == 8 == len(table["steps"]) and table["schema"] == 1
    assert table["fit"] == {"examples": 150, "split": "train"}
    for (size, grid, variance), row in rows.items():
        assert len(row["kept"]) == size and row["kept"][-1] == 19
        assert row["calls_per_example"] >= size
        a, b = row["predicted"], row["evaluated"]
        assert a["unit"] == b["unit"] == "bits/dim" and b["n"] == 140
        error = math.hypot(a["se"], b["se"])
        assert abs(a["mean"] - b["mean"]) < z_limit(8) * error, (size, grid, variance)
        parts = sum(row["terms"][n]["mean"] for n in ("prior", "diffusion", "reconstruction"))
        assert b["mean"] == pytest.approx(parts, abs=1e-9)
        assert row["gap"]["mean"] > 0
    for size in (3, 8):
        for variance in ("posterior", "optimal"):
            plain, best = (rows[size, grid, variance]["predicted"] for grid in ("even", "optimal"))
            assert best["mean"] <= plain["mean"] + 1e-12
        for grid in ("even", "optimal"):
            fixed, best = (rows[size, grid, v]["predicted"] for v in ("posterior", "optimal"))
            assert best["mean"] <= fixed["mean"] + 1e-12
    full = {r["variance"]: r for r in table["full"]}
    limit = table["continuous"]["mean"]
    for row in full.values():
        assert row["predicted"]["mean"] - row["gap"]["mean"] == pytest.approx(limit, abs=1e-9)
    stored = list((run / "evaluation").glob("steps-*.json"))
    assert any(json.loads(p.read_text()) == table for p in stored)


def test_the_curve_is_kept_and_read_again(run: Path, table: dict[str, Any]) -> None:
    """The same figures from the file; a file of other weights, or a damaged one, is not used."""
    (path,) = (run / "evaluation").glob("curve-*-fit150.npz")
    before = path.stat().st_mtime_ns
    words = ["--steps", "3", "--grid", "optimal", "--variance", "optimal", "--fit", "150"]
    first = evaluated(run, *words, "--limit", "30")
    assert path.stat().st_mtime_ns == before
    assert first["continuous"] == table["continuous"]
    with np.load(path) as file:
        arrays = dict(file)
    arrays["mark"], arrays["error"] = np.array("other weights"), 2 * arrays["error"]
    np.savez(path, **arrays)
    assert evaluated(run, *words, "--limit", "30") == first
    path.write_bytes(b"PK" + bytes(100))
    assert evaluated(run, *words, "--limit", "30") == first
    arrays["error"] = arrays["error"][:, :-1]
    np.savez(path, **arrays)
    assert evaluated(run, *words, "--limit", "30") == first


def test_what_people_see(run: Path) -> None:
    words = "--steps 3,8 --grid both --variance model,transition,optimal --fit 8 --limit 20"
    code, out, err = silent(["evaluate", str(run), *words.split(), "--quiet"])
    assert code == 0, err
    assert max(len(line) for line in out.splitlines()) <= 80
    shown = out.splitlines()
    assert sum(" ± " in line for line in shown) >= 2 * 6 + 3
    assert any(line.startswith("infinity") for line in shown) and "no bound" in out


def test_whole_grid_is_the_ordinary_evaluation(run: Path) -> None:
    """All latents at even distance with the model's variance: the very figures of `evaluate`."""
    plain = evaluated(run, "--limit", "40")
    (row,) = evaluated(run, "--steps", "20", "--limit", "40", "--fit", "4")["steps"]
    assert row["evaluated"]["mean"] == pytest.approx(plain["terms"]["total"]["mean"], rel=1e-12)


@pytest.mark.parametrize("grid", ["even", "optimal"])
def test_sampling_over_a_chain(run: Path, tmp_path: Path, grid: str) -> None:
    words = f"--steps 4 --grid {grid} --variance optimal --fit 16 --n 3 --quiet --json"
    out = ["--out", str(tmp_path / "samples")]
    code, text, err = silent(["sample", str(run), *words.split(), *out])
    assert code == 0, err
    value = json.loads(text)
    assert (value["grid"], value["kept"], value["variance"]) == (4, grid, "optimal")
    with np.load(tmp_path / "samples" / "samples.npz") as arrays:
        assert arrays["samples"].shape == (3, 1, 8, 8)
    assert list((run / "evaluation").glob("curve-*-fit16.npz"))


def test_samples_walk_over_the_chain_that_was_evaluated(run: Path) -> None:
    words = "--steps 5 --grid optimal --variance optimal --fit 16 --limit 4"
    (row,) = evaluated(run, *words.split())["steps"]
    stored = open_run(run)
    options = Sample(
        run=run, steps=5, grid="optimal", variance="optimal", fit=16, seed=7, quiet=True
    )
    model, times = sampled(stored, options, "cpu")
    assert torch.equal(times, stored.subject.times[torch.tensor(row["kept"])])
    assert model.network is stored.subject.model.network
    s, t = times[1], times[2]
    x_t = torch.zeros(1, 1, 8, 8)
    pair = model.process.pair(s, t)
    variance = model.kernel(x_t, t, s).variance[0, 0, 0, 0]
    assert pair.log_posterior.exp() < variance < 30 * pair.log_posterior.exp()


def test_sampling_under_a_condition_takes_the_chain_too(run: Path, tmp_path: Path) -> None:
    words = "--hole 3 --steps 4 --grid optimal --variance posterior --fit 16 --n 1 --particles 4"
    out = ["--out", str(tmp_path / "samples"), "--quiet", "--json"]
    code, text, err = silent(["sample", str(run), *words.split(), *out])
    assert code == 0 and json.loads(text)["grid"] == 4, err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--steps 3,x", "as 10,25,50"),
        ("--steps 3,,4", "as 10,25,50"),
        ("--steps ''", "as 10,25,50"),
        ("--steps=-3", "as 10,25,50"),
        ("--steps 3,3", "twice"),
        ("--steps 0", "grid of 20"),
        ("--steps 21", "grid of 20"),
        ("--steps 4 --variance beta", "posterior"),
        ("--steps 4 --variance optimal,optimal", "posterior"),
        ("--steps 4 --fit 1", "--fit 1"),
        ("--steps 4 --calls 8", "--calls"),
        ("--steps 4 --importance 8", "--calls"),
        ("--grid optimal", "--steps"),
        ("--variance optimal", "--steps"),
    ],
)
def test_refusals(run: Path, words: str, told: str) -> None:
    before = sorted((run / "evaluation").iterdir())
    code, out, err = silent(["evaluate", str(run), *shlex.split(words), "--quiet"])
    assert code == 2 and out == "" and told in err, err
    assert "Traceback" not in err and sorted((run / "evaluation").iterdir()) == before


def test_refusals_of_sampling(run: Path) -> None:
    code, _, err = silent(["sample", str(run), "--sampler", "ddim", "--variance", "optimal"])
    assert code == 2 and "--sampler ancestral" in err


def test_a_learned_variance(tmp_path: Path) -> None:
    """Even grids with the model's own variance have no prediction; optimal ones are refused."""
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(300, 2)))
    words = ["--variance", "between", "--latents", "12", "--edge", "following", "--batch", "16"]
    run = trained(tmp_path / "run", "vectors", str(tmp_path / "rows.npy"), *words)
    fit = ["--fit", "20", "--limit", "20", "--steps", "4"]
    rows = evaluated(run, *fit, "--variance", "model,posterior,optimal")["steps"]
    assert [r["predicted"] is None for r in rows] == [True, False, False]
    assert rows[0]["gap"] is None and math.isfinite(rows[0]["evaluated"]["mean"])
    code, _, err = silent(["evaluate", str(run), *fit, "--grid", "optimal"])
    assert code == 2 and "--variance posterior or optimal" in err
    code, _, err = silent(["evaluate", str(run), *fit[:4], "--steps", "1"])
    assert code == 2 and "keep 2 or more" in err
    both = evaluated(run, *fit, "--grid", "both", "--variance", "posterior")["steps"]
    assert both[1]["predicted"]["mean"] <= both[0]["predicted"]["mean"] + 1e-9


def test_bits(tmp_path: Path) -> None:
    """Even grids with the model's own kernels; there is no variance to choose."""
    words = ["--latents", "10", "--length", "6", "--period", "3", "--batch", "16"]
    run = trained(tmp_path / "run", "heartbeat", *words)
    value = evaluated(run, "--steps", "3,10", "--limit", "20")
    assert value["continuous"] is None and value["full"] == [] and value["fit"] is None
    assert all(math.isfinite(r["evaluated"]["mean"]) for r in value["steps"])
    for more in (["--variance", "optimal"], ["--grid", "both"]):
        code, _, err = silent(["evaluate", str(run), "--steps", "3", *more])
        assert code == 2 and "Gaussian" in err


def test_parsing() -> None:
    assert sizes_of("10,25,50") == [10, 25, 50] and sizes_of("7") == [7]
    assert variances_of("posterior,optimal") == ["posterior", "optimal"]
    for text in ("10;25", "1e3", " 10", "10,", "٣"):
        with pytest.raises(UsageError):
            sizes_of(text)
