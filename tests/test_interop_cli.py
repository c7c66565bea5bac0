"""`nelbo evaluate DIR --data PATH` and `nelbo sample DIR` for checkpoints of other code bases."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import silent

from nelbo.data.embedded import digits
from nelbo.errors import UsageError
from nelbo.recipes.build import build
from nelbo.recipes.foreign import Unit
from nelbo.recipes.options import Digits
from nelbo.walks import against

TINY = Path(__file__).parent / "golden" / "diffusers_tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "digits.npy"
    np.save(path, digits().train[:40].numpy())
    return path


def evaluate(folder: Path, data: Path, *more: str) -> tuple[int, str, str]:
    words = ["evaluate", str(folder), "--data", str(data), "--device", "cpu", "--quiet", *more]
    return silent(words)


def test_everything_is_measured_and_nothing_is_written(folder: Path, data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    code, out, err = evaluate(folder, data, "--levels", "17", "--json")
    assert code == 0, err
    value = json.loads(out)
    assert value["data"]["split"] == "all" and value["data"]["n"] == 40
    assert value["data"]["levels"] == 17 and value["calls_per_example"] == 20
    assert value["model"]["weights"] == "as stored" and value["model"]["step"] is None
    assert value["model"]["decoder"] == "discretized, variance following"
    assert list(value["assumed"]) == ["scaling", "levels", "edge", "clip", "weights"]
    parts = [value["terms"][name]["mean"] for name in ("prior", "diffusion", "reconstruction")]
    assert value["terms"]["total"]["mean"] == pytest.approx(sum(parts))
    assert {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]} == before


def test_what_was_assumed_is_printed(folder: Path, data: Path) -> None:
    code, out, _ = evaluate(folder, data, "--levels", "17", "--split", "test", "--clip", "none")
    assert code == 0 and "arrays, test split, n = 4" in out
    assert "weights as stored, clip none" in out and "assumed, since the files do not say" in out
    assert "17 (set by --levels)" in out and "--edge sets it" in out


@pytest.mark.parametrize("split", ["test", "validation", "train", "all"])
def test_few_calls_on_any_part(folder: Path, data: Path, split: str) -> None:
    code, out, err = evaluate(
        folder, data, "--levels", "17", "--calls", "4", "--split", split, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["data"]["split"] == split


def test_out_is_a_new_folder(folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    words = ["--levels", "17", "--calls", "4", "--out", str(out)]
    assert evaluate(folder, data, *words)[0] == 0
    (file,) = (out / "evaluation").glob("*.json")
    assert json.loads(file.read_text())["assumed"]["levels"].startswith("17")
    assert len(list((out / "evaluation").glob("*.npz"))) == 1
    code, _, err = evaluate(folder, data, *words)
    assert code == 2 and "is not overwritten" in err


def test_folders_of_images_are_resized_when_asked(folder: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, row in enumerate(np.random.default_rng(0).integers(0, 256, (30, 12, 12))):
        Image.fromarray(row.astype(np.uint8)).save(pictures / f"{i}.png")
    code, _, err = evaluate(folder, pictures)
    assert code == 3 and "1x12x12" in err and "1x8x8" in err and "add --size 8" in err
    code, out, err = evaluate(folder, pictures, "--size", "8", "--calls", "4", "--json")
    assert code == 0, err
    assert json.loads(out)["data"]["n"] == 30 and json.loads(out)["data"]["levels"] == 256


def test_arrays_that_do_not_fit(folder: Path, data: Path, tmp_path: Path) -> None:
    np.save(
        tmp_path / "big.npy", np.random.default_rng(0).integers(0, 256, (30, 1, 9, 9), np.uint8)
    )
    code, _, err = evaluate(folder, tmp_path / "big.npy")
    assert code == 3 and "1x9x9" in err and "1x8x8" in err and "resize the array" in err
    code, _, err = evaluate(folder, data, "--size", "8")
    assert code == 2 and "--size is for a folder of images" in err
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(30, 64)))
    code, _, err = evaluate(folder, tmp_path / "vectors.npy")
    assert code == 3 and "real vectors" in err
    code, _, err = evaluate(folder, data, "--levels", "9")
    assert code == 3 and "level 16" in err and "set --levels" in err
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).random((30, 1, 8, 8)) > 0.5)
    code, _, err = evaluate(folder, tmp_path / "bits.npy")
    assert code == 3 and "2 levels" in err and "set --levels" in err


def test_usage(folder: Path, data: Path, finished_run: Path) -> None:
    code, _, err = silent(["evaluate", str(folder)])
    assert code == 2 and "add --data PATH" in err
    code, _, err = evaluate(folder, data, "--checkpoint", "best")
    assert code == 2 and "leave out --checkpoint" in err
    code, _, err = evaluate(finished_run, data)
    assert code == 2 and "a run is measured on its own data" in err
    code, _, err = silent(["evaluate", str(finished_run), "--levels", "3"])
    assert code == 2 and err.startswith("nelbo: --levels is for checkpoints of other code bases")
    code, _, err = silent(["sample", str(finished_run), "--trust-pickle"])
    assert code == 2 and "--trust-pickle" in err
    for option, value in (("--levels", "1"), ("--edge", "0"), ("--clip", "-1"), ("--label", "-1")):
        code, _, err = evaluate(folder, data, f"{option}={value}")
        assert code == 2 and option in err, err


def test_bad_files_are_one_line(folder: Path, data: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text('{"thresholding": true}')
    code, out, err = evaluate(folder, data)
    assert code == 3 and out == ""
    assert err.startswith(f"nelbo: {file}: thresholding: ") and err.count("\n") == 1


def test_samples(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sample", str(folder), "--n", "3", "--device", "cpu", "--quiet"]
    code, out, err = silent(words)
    assert code == 0, err
    assert "assumed" in out and "256" in out
    (array,) = (tmp_path / "samples").rglob("samples.npz")
    with np.load(array) as stored:
        assert stored["samples"].shape == (3, 1, 8, 8) and stored["samples"].dtype == np.uint8
    code, out, err = silent(words)
    assert code == 0 and len(list((tmp_path / "samples").rglob("samples.npz"))) == 2
    code, _, err = silent([*words, "--out", str(array.parent)])
    assert code == 2 and "nothing in it is overwritten" in err
    more = ["--out", "other", "--sampler", "ddim", "--steps", "5", "--scaling", "unit", "--json"]
    code, out, err = silent([*words, *more])
    assert code == 0, err
    assert json.loads(out)["assumed"]["scaling"].startswith("x = level/255")
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == ["samples.npz", "samples.png"]


def test_conditions_are_for_runs(folder: Path, data: Path) -> None:
    code, _, err = silent(["sample", str(folder), "--hole", "2", "--observe", str(data)])
    assert code == 2 and "another code base" in err


def test_all_examples_of_a_run(finished_run: Path) -> None:
    words = ["evaluate", str(finished_run), "--split", "all", "--calls", "4", "--limit", "20"]
    code, out, err = silent([*words, "--json", "--quiet"])
    assert code == 0, err
    assert json.loads(out)["data"]["split"] == "all" and "assumed" not in json.loads(out)


def test_a_checkpoint_against_itself(folder: Path, data: Path) -> None:
    more = ["--against", str(folder), "--calls", "2", "--quiet"]
    code, out, err = evaluate(folder, data, *more)
    assert code == 0, err
    assert "examples, times and noise" in out and "cannot be told" in out
    assert out.count("assumed, since the files do not say") == 2, "of both models"
    code, out, err = evaluate(folder, data, *more, "--json")
    value = json.loads(out)
    assert code == 0 and value["difference"]["total"]["mean"] == 0
    assert value["assumed"] == value["against"]["assumed"]


def test_models_that_see_the_data_on_other_scales_share_no_latents() -> None:
    one = build(Digits(latents=20))
    unit = Unit(**vars(one.dataset))
    other = dataclasses.replace(one, dataset=unit)
    against.check_data(one, other, "test")
    assert against.same_draws(one, one) and not against.same_draws(one, other)
    fewer = dataclasses.replace(one.dataset, validation=one.dataset.validation[:50])
    elsewhere = dataclasses.replace(one, dataset=fewer)
    against.check_data(one, elsewhere, "test")
    with pytest.raises(UsageError, match="same validation part"):
        against.check_data(one, elsewhere, "validation")
