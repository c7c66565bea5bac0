"""`nelbo export RUN --to diffusers DIR`: complete, exact when read back, refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import tyro
from safetensors.torch import load_file, save_file
from tiny import command, silent

from nelbo.bound import bound
from nelbo.decoders import Density
from nelbo.errors import InputRefused, UsageError
from nelbo.interop.diffusers import read
from nelbo.interop.export import Origin, contents, write
from nelbo.recipes.build import build
from nelbo.recipes.options import Digits
from nelbo.recipes.recipe import Recipe
from nelbo.walks.stored import open_run

PLAIN = ("--predict", "epsilon", "--decoder", "discretized", "--fourier", "--positions", "0")
ORIGIN = Origin(name="x", recipe={}, data={}, step=1, version="0")
CHAIN = ("--schedule", "linear", "--edge", "following", "--clip-x0", "1.5")


def built(*words: str) -> Recipe:
    base = [*PLAIN, "--channels", "16", "--multipliers", "1", "1", "--attention"]
    return build(tyro.cli(Digits, args=[*base, *words]))


def train(out: Path, *more: str) -> Path:
    code, _, err = silent([*command(out, *PLAIN, *more), "--quiet"])
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nelbo.report.write", lambda run: run / "report.html")
        return train(tmp_path_factory.mktemp("runs") / "chain", *CHAIN)


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    out = tmp_path / "exported"
    code, shown, err = silent(["export", str(run), "--to", "diffusers", str(out)])
    assert code == 0, err
    assert shown.strip() == str(out)
    return out


def test_the_files(folder: Path) -> None:
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert names == [
        "README.md",
        "model_index.json",
        "nelbo/manifest.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert len(scheduler["trained_betas"]) == scheduler["num_train_timesteps"] == 20
    assert scheduler["clip_sample"] is True and scheduler["clip_sample_range"] == 1.5
    manifest = json.loads((folder / "nelbo/manifest.json").read_text())
    assert (manifest["levels"], manifest["edge"], manifest["weights"]) == (17, "following", "ema")
    assert manifest["data"]["name"] == "digits" and manifest["options"]["predict"] == "epsilon"
    card = (folder / "README.md").read_text()
    assert "num_inference_steps=20" in card and "nelbo evaluate exported --data" in card
    assert sorted(p.name for p in folder.parent.iterdir()) == ["exported"]


def test_read_back_it_is_the_same_model_and_nothing_is_assumed(run: Path, folder: Path) -> None:
    """Betas go through a file as decimal fractions, and 1 - ᾱ through a product: 1e-12."""
    subject, found = open_run(run).subject, read(folder)
    assert found.assumed == {} and found.levels == 17
    assert found.description["weights"] == "ema" and found.description["clip"] == "1.5"
    assert found.description["decoder"] == subject.description["decoder"]
    logsnr = [m.process.schedule.logsnr(found.times) for m in (found.model, subject.model)]
    torch.testing.assert_close(*logsnr, rtol=1e-11, atol=1e-11)
    x = subject.dataset.encode(subject.dataset.test[:16])
    values = []
    for model in (found.model, subject.model):
        torch.manual_seed(0)
        values.append(bound(model, x, found.times))
    for name in ("prior", "diffusion", "reconstruction"):
        torch.testing.assert_close(
            getattr(values[0], name), getattr(values[1], name), rtol=1e-4, atol=1e-5
        )


def test_it_holds_the_averaged_weights(run: Path, folder: Path) -> None:
    ema = open_run(run).subject.model.network.network.state_dict()  # type: ignore[union-attr]
    state = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert state.keys() == ema.keys()
    assert all(torch.equal(state[name], ema[name]) for name in state)


def test_the_users_paths_are_not_told(run: Path, folder: Path) -> None:
    for path in folder.rglob("*.*"):
        assert str(run.parent).encode() not in path.read_bytes()


def test_the_manifest_is_checked(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.bias"] += 1
    save_file(state, file)
    with pytest.raises(InputRefused, match="manifest.json: sha256: .* is not the file"):
        read(folder)
    (folder / "nelbo/manifest.json").write_text('{"schema": 2}')
    with pytest.raises(InputRefused, match="schema: 2, this version reads 1"):
        read(folder)


def test_a_folder_that_exists_is_left_alone(run: Path, tmp_path: Path) -> None:
    code, _, err = silent(["export", str(run), str(tmp_path)])
    assert code == 2 and "nothing in it is overwritten" in err and list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nelbo.interop.export.sync_directory", full)
    code, _, err = silent(["export", str(run), str(tmp_path / "out")])
    assert code == 5 and "No space left" in err and list(tmp_path.iterdir()) == []


REFUSED = {
    "levels and masses": (["--predict", "levels", "--decoder", "mass"], "it predicts levels"),
    "free logits": (
        ["--predict", "levels", "--decoder", "mass", "--waves", "None"],
        "it predicts levels",
    ),
    "mean": (["--predict", "mean", "--schedule", "linear"], "it predicts mean"),
    "free variance": (["--variance", "free", "--schedule", "linear"], "its variance is free"),
    "continuous": (["--schedule", "logsnr"], "told times from 0 to 1000 in steps of 52.6"),
    "fourier": (["--schedule", "linear", "--fourier", "4"], "Fourier features"),
    "positions": (["--schedule", "linear", "--positions", "2"], "learned positions"),
    "members": (["--schedule", "linear", "--members", "2"], "several networks"),
    "augment": (["--schedule", "linear", "--augment", "0.5"], "moved examples"),
    "density": (["--schedule", "linear"], "decoder is not a normal law"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_diffusers_cannot_express(kind: str) -> None:
    """One line that says what it is and which options make a run that can be exported."""
    options, message = REFUSED[kind]
    recipe = built("--latents", "20", *options)
    if kind == "density":
        recipe.model.decoder_rule = Density()
    with pytest.raises(UsageError, match=message) as refused:
        contents(recipe.model, recipe.times, (1, 8, 8), 17, ORIGIN)
    assert "\n" not in str(refused.value) and "--schedule linear" in str(refused.value)


def test_vectors_cannot_be_exported() -> None:
    recipe = built("--latents", "20", "--schedule", "linear")
    with pytest.raises(UsageError, match="no Gaussian diffusion of images"):
        contents(recipe.model, recipe.times, (64,), None, ORIGIN)


def test_a_continuous_model_of_1001_latents_is_exact(tmp_path: Path) -> None:
    """Its network is told t·1000, which are the whole numbers 0..1000."""
    recipe = built("--schedule", "logsnr", "--latents", "1001", "--predict", "x0")
    write(tmp_path / "out", recipe.model.eval(), recipe.times, (1, 8, 8), 17, ORIGIN)
    found = read(tmp_path / "out")
    schedules = [model.process.schedule for model in (found.model, recipe.model)]
    logsnr = [s.logsnr(t) for s, t in zip(schedules, (found.times, recipe.times), strict=True)]
    torch.testing.assert_close(*logsnr, rtol=1e-8, atol=1e-8)
    x = torch.randn(4, 1, 8, 8)
    for i in (0, 500, 1000):
        ours = recipe.model.network(x, recipe.times[i])
        torch.testing.assert_close(found.model.network(x, found.times[i]), ours)


def test_a_damaged_run_is_no_source(run: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(broken / "checkpoints")
    code, _, _ = silent(["export", str(broken), str(tmp_path / "out")])
    assert code == 3 and not (tmp_path / "out").exists()
