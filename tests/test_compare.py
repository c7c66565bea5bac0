"""compare: every kind of opponent before every kind of data, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import command, silent

from nelbo.certificate import certify
from nelbo.claim import recompute
from nelbo.data.toys import PLANE, correlated, ring
from nelbo.errors import InputRefused
from nelbo.jsd import kappa
from nelbo.randomness import generator
from nelbo.walks.chains import Means
from nelbo.walks.opponents import run_sampler

QUICK = ("--no-metrics", "--ladder", "--quiet", "--threads", "1")


@pytest.fixture(autouse=True)
def _own_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NELBO_OUT", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "digits"
    code, _, err = silent(command(path, "--quiet"))
    assert code == 0, err
    return path


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain on a correlated Gaussian in the plane, hardly trained."""
    path = tmp_path_factory.mktemp("compare") / "gaussian"
    code, _, err = silent(
        [
            "train",
            "gaussian",
            "--steps",
            "150",
            "--latents",
            "30",
            "--width",
            "32",
            "--depth",
            "1",
            "--samples",
            "4",
            "--out",
            str(path),
            "--quiet",
            "--threads",
            "1",
            "--calls",
            "2",
            "--validate-every",
            "0",
            "--examples",
            "2000",
            "--calls",
            "4",
            "--validate-every",
            "0",
        ]  # fmt: skip
    )
    assert code == 0, err
    return path


def compared(*arguments: str) -> dict[str, Any]:
    code, out, err = silent(["compare", *arguments, "--json", *QUICK])
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def draws(name: str, count: int, shift: float = 0.0, data: Any = None) -> np.ndarray:
    truth = (data or correlated(**PLANE)).truth
    assert truth is not None and truth.components is not None
    rows: np.ndarray = truth.components.sample(count, generator(7, name)).numpy() + shift
    return rows


def test_a_file_of_samples_of_the_law_itself_is_not_told_apart(tmp_path: Path) -> None:
    np.save(tmp_path / "same.npy", draws("same", 3000))
    found = compared("gaussian", str(tmp_path / "same.npy"), "--n", "1000")
    certificate = found["certificate"]
    # a bound above 0 would be false: in at most 5 % of seeds, and this seed is fixed
    assert certificate["jsd_nats_lower"] == 0 and certificate["n_pairs"] == 1000
    assert "no difference certified at n = 1,000" in certificate["sentence"]
    assert found["sandwich"] is None and found["metrics"] is None and found["ladder"] == []


def test_shifted_samples_are(tmp_path: Path) -> None:
    np.save(tmp_path / "shifted.npy", draws("shifted", 4000, shift=0.6))
    found = compared(
        "gaussian", str(tmp_path / "shifted.npy"), "--n", "1500", "--out", str(tmp_path / "out")
    )
    lower = found["certificate"]["jsd_nats_lower"]
    exact = _shifted_jsd(0.6)
    assert 0.6 * exact < lower < exact
    # what was written holds the pairs from which anyone can compute the bound again
    written = Path(found["written"])
    assert math.isclose(recompute(written), lower, rel_tol=1e-12)
    changed = json.loads(written.read_text())
    changed["certificate"]["jsd_nats_lower"] += 0.001
    written.write_text(json.dumps(changed))
    with pytest.raises(InputRefused, match="was changed"):
        recompute(written)


def _shifted_jsd(shift: float) -> float:
    """N(m, C) against N(m + shift 1, C): one dimension along C^-1 1, by the trapezoidal rule."""
    truth = correlated(**PLANE).truth
    assert truth is not None and truth.components is not None
    ones = torch.full((2,), shift, dtype=torch.float64)
    apart = float(ones @ torch.linalg.solve(truth.components.covariances[0], ones)) ** 0.5
    x = torch.linspace(-12, 12 + apart, 20_001, dtype=torch.float64)
    p, g = (torch.exp(-((x - m) ** 2) / 2) / math.sqrt(2 * math.pi) for m in (0.0, apart))
    m = (p + g) / 2
    entropies = [torch.special.xlogy(q, q / m) for q in (p, g)]
    return float(sum(e.sum() for e in entropies)) * float(x[1] - x[0]) / 2


def test_the_looks_at_one_set_of_pairs_are_counted(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", draws("a", 1500))
    asked = ("gaussian", str(tmp_path / "a.npy"), "--n", "300")
    assert [compared(*asked)["certificate"]["looks"] for _ in range(2)] == [1, 2]
    # another seed cuts the same file otherwise, and that is another look at it
    np.save(tmp_path / "b.npy", draws("b", 1500))
    both = (str(tmp_path / "b.npy"), str(tmp_path / "a.npy"))
    assert compared(*both)["certificate"]["looks"] == 1
    assert compared(*both, "--seed", "1")["certificate"]["looks"] == 2


def test_a_function_is_a_sampler(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\ndef draw(n):\n    return torch.randn(n, 2).double()\n"
    )
    found = compared("gaussian", f"{tmp_path}/mine.py:draw", "--n", "400")
    assert found["fake"]["kind"] == "function" and found["certificate"]["jsd_nats_lower"] > 0


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("raise RuntimeError('no luck')", "no luck"),
        ("return torch.randn(n, 3).double()", "shape"),
        ("return torch.full((n, 2), 0.3).double()", "constant"),
        ("return torch.full((n, 2), float('nan'))", "NaN"),
        ("return torch.randn(4, 2).double().repeat(n, 1)[:n]", "repeats itself"),
    ],
)
def test_a_bad_sampler_is_named(body: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(f"import torch\ndef draw(n):\n    {body}\n")
    code, _, err = silent(["compare", "gaussian", f"{tmp_path}/bad.py:draw", "--n", "200", *QUICK])
    assert code == 3 and named in err and "Traceback" not in err


def test_the_sandwich_of_a_chain(gaussian: Path) -> None:
    found = compared("data", str(gaussian), "--n", "1500")
    sandwich, lower = found["sandwich"], found["certificate"]["jsd_nats_lower"]
    assert found["fake"]["family"] == "diffusion" and "30 latents" in found["fake"]["sampler"]
    assert 0 < lower < sandwich["jsd_nats_upper"] < math.log(2) and sandwich["holds"]
    exact = sandwich["exact"]
    assert lower < exact["jsd_nats"] + exact["error"] < 1.5 * exact["jsd_nats"]
    assert exact["jsd_nats"] < sandwich["jsd_nats_upper"]
    gain = float(kappa(torch.tensor(lower, dtype=torch.float64)))
    assert math.isclose(sandwich["kappa_nats"], gain, rel_tol=1e-9)
    bound = sandwich["bound_nats"]["mean"]
    assert math.isclose(sandwich["entropy_upper_nats"]["mean"], bound - gain, rel_tol=1e-9)
    # the entropy is known here, and what the sandwich concludes of it is true
    assert sandwich["entropy_nats"] < bound - gain


def test_another_sampler_than_the_bound_speaks_of_has_no_sandwich(gaussian: Path) -> None:
    found = compared("data", str(gaussian), "--n", "300", "--sampler", "ddim")
    assert found["sandwich"] is None and "ddim" in found["remark"]


def test_digits_with_metrics_and_ladder(diffusion: Path) -> None:
    asked = [
        "compare",
        "digits",
        str(diffusion),
        "--ladder",
        "3",
        "--seeds",
        "2",
        "--json",
        "--quiet",
    ]
    code, out, err = silent([*asked, "--threads", "1", "--calls", "2"])
    assert code == 0, err
    found = json.loads(out)
    assert found["real"]["what"] == "test part, 297 rows"
    assert found["certificate"]["n_pairs"] == 252 and found["certificate"]["n_fit"] > 1000
    assert found["certificate"]["jsd_nats_lower"] > 0.5  # twelve updates: anyone can tell
    (rung,) = found["ladder"]
    assert rung["certificate"]["channel"] == "noise to log-SNR 3" and rung["exact"] is None
    assert found["sandwich"]["jsd_nats_upper"] is None and found["sandwich"]["entropy_upper_nats"]
    names = {row["name"] for row in found["metrics"]["rows"]}
    assert {"kid", "precision", "recall", "coverage", "sliced_w2_squared", "mmd_p"} <= names
    written = Path(found["written"])
    assert written.parent == diffusion / "compare"
    with np.load(written.with_suffix(".npz")) as file:
        assert (
            file["witness_most"].shape == (16, 1, 8, 8) and file["witness_most"].dtype == np.uint8
        )
    code, _, err = silent(["report", str(diffusion)])
    assert code == 0, err
    assert "with 95 % confidence" in (diffusion / "report.html").read_text()


def test_two_in_one_table(diffusion: Path, tmp_path: Path) -> None:
    from nelbo.data.embedded import digits

    np.save(tmp_path / "copies.npy", digits().train[:700].numpy())
    code, out, err = silent(
        ["compare", "digits", str(diffusion), str(tmp_path / "copies.npy"), *QUICK]
    )
    assert code == 0, err
    assert "Each claim holds by itself" in out and "--alpha 0.025" in out
    assert max(map(len, out.split("\n\n")[1].splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("digits",), 2, "run"),
        (("nothing.npy", "{ring}"), 2, "no such file"),
        (("data", "{ring}"), 2, "data of a run"),
        (("digits", "{ring}"), 3, "shape"),
        (("ring", "{ring}", "--alpha", "0.9"), 2, "--alpha"),
        (("ring", "{ring}", "--weights", "w.safetensors"), 2, "--features"),
        (("ring", "{ring}", "--features", "inception"), 2, "--features"),
        (("ring", "{few}", "--n", "40"), 3, "too few rows"),
        (("ring", "{integers}", "--n", "200"), 3, "rounded"),
    ],
)
def test_what_is_refused(
    arguments: tuple[str, ...], code: int, named: str, tmp_path: Path
) -> None:
    rows = draws("ring", 900, data=ring(std=0.01))
    files = {"ring": rows, "few": rows[:12], "integers": np.rint(rows * 50)}
    for name, values in files.items():
        np.save(tmp_path / f"{name}.npy", values)
    typed = [a.format(**{n: tmp_path / f"{n}.npy" for n in files}) for a in arguments]
    found, _, err = silent(["compare", *typed, "--quiet", "--ladder", "--seeds", "2"])
    assert found == code and named in err and "Traceback" not in err, err


def test_images_of_the_wrong_kind_are_refused(diffusion: Path) -> None:
    code, _, err = silent(["compare", "ring", str(diffusion), *QUICK])
    assert code == 3 and "17 levels" in err


def test_an_out_that_exists_is_not_touched(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", draws("a", 900))
    code, _, err = silent(["compare", "gaussian", str(tmp_path / "a.npy"), "--out", str(tmp_path)])
    assert code == 2 and "not overwritten" in err


def test_a_run_as_a_sampler_for_certify(gaussian: Path, diffusion: Path) -> None:
    truth = correlated(**PLANE).truth
    assert truth is not None and truth.components is not None
    real = truth.components.sample(600, generator(1, "real"))
    found = certify(real, run_sampler(gaussian))
    assert found.n_pairs == 270 and found.jsd_nats_lower < _shifted_jsd(1.0)
    rows = run_sampler(diffusion)(3)
    assert rows.shape == (3, 1, 8, 8) and rows.dtype == torch.uint8
    with pytest.raises(InputRefused, match="run_sampler"):
        certify(real, gaussian)


def test_the_law_of_blurred_centres_is_a_density() -> None:
    centres = torch.tensor([[0.0, 0.0], [1.0, -0.5]], dtype=torch.float64)
    axis = torch.linspace(-3, 4, 400, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    density = Means(centres, 0.2).log_prob(points).exp()
    assert math.isclose(float(density.sum()) * float(axis[1] - axis[0]) ** 2, 1, rel_tol=1e-9)
    (one,) = Means(centres[:1], 0.2).log_prob(centres[1:]).tolist()
    assert math.isclose(one, -math.log(2 * math.pi * 0.04) - 1.25 / 0.08, rel_tol=1e-12)
