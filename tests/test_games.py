"""Games as runs: trained, stopped, resumed, opened and sampled by the commands of every run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import silent
from torch import Tensor

from nelbo import cli, gan
from nelbo.checkpoint import load, step_path, steps
from nelbo.errors import InputRefused
from nelbo.gan import DiscriminatorLoss, GeneratorLoss
from nelbo.randomness import seeded
from nelbo.recipes import limits
from nelbo.recipes.adversarial import build_game
from nelbo.recipes.families import families, name_of, restored, stored
from nelbo.recipes.games import (
    GAMES,
    Cifar10Game,
    DigitsGame,
    GaussianGame,
    GridGame,
    ImagesGame,
    MnistGame,
    RingGame,
    SwissRollGame,
    VectorsGame,
)
from nelbo.recipes.groups import GameOptions
from nelbo.scores import multiscale_mmd2, sliced_wasserstein
from nelbo.trainer import Trainer
from nelbo.walks.play import trainer_of
from nelbo.walks.played import open_game

TINY = [
    *("--steps", "12", "--batch", "16", "--save-every", "4", "--validate-every", "6"),
    *("--samples", "4", "--threads", "1", "--latent", "4", "--no-compare"),
]
TOY = [*TINY, "--width", "8", "--depth", "1", "--directions", "4", "--examples", "400"]
GROUPS = {
    *("generator", "generator-ema", "generator-optimizer"),
    *("discriminator", "discriminator-optimizer"),
}


def digits(out: Path, *more: str) -> list[str]:
    """`train digits --game`, tiny; later options win."""
    return ["train", "digits", "--game", *TINY, "--channels", "4", "--out", str(out), *more]


def ring(out: Path, *more: str) -> list[str]:
    """`train ring`, tiny; later options win."""
    return ["train", "ring", *TOY, "--out", str(out), "--quiet", *more]


def ran(arguments: list[str], expected: int = 0) -> tuple[str, str]:
    code, out, err = silent(arguments)
    assert code == expected, err
    assert "Traceback" not in err
    return out, err


def status(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "status.json").read_text())
    return found


@pytest.fixture(scope="module")
def game(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished game of digits, with its report; tests may add samples, and change nothing."""
    path = tmp_path_factory.mktemp("games") / "digits"
    out, err = ran(digits(path))
    assert "6 of 12 steps: validation: MMD^2" in err and "sliced Wasserstein" in err
    assert "JSD (training D, not certified)" in err and "samples.png" in out and "report: " in out
    return path


@pytest.fixture
def small_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without their report, which takes longer than the rest of a tiny run."""
    monkeypatch.setattr("nelbo.report.write", lambda run: run / "report.html")


# --- recipes -------------------------------------------------------------------------------------


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def of_every_kind(folder: Path) -> dict[str, GameOptions]:
    np.save(folder / "images.npy", noise(60, 3, 9, 8))
    np.save(folder / "vectors.npy", np.random.default_rng(0).normal(3, 2, (60, 5)))
    idx = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (60, 8, 8))
    (folder / "train-images-idx3-ubyte").write_bytes(idx + noise(60, 8, 8).tobytes())
    (folder / "cifar").mkdir()
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records = np.random.default_rng(len(name) + ord(name[-5])).integers(0, 256, (8, 3073))
        records[:, 0] %= 10
        (folder / "cifar" / name).write_bytes(records.astype(np.uint8).tobytes())
    toy: dict[str, Any] = {"width": 8, "depth": 1, "examples": 400}
    return {
        "digits": DigitsGame(channels=4, augment=0.5),
        "swissroll": SwissRollGame(**toy),
        "ring": RingGame(**toy),
        "grid": GridGame(**toy),
        "gaussian": GaussianGame(**toy),
        "images": ImagesGame(path=folder / "images.npy", channels=4),
        "vectors": VectorsGame(path=folder / "vectors.npy", width=8, depth=1),
        "mnist": MnistGame(path=folder / "train-images-idx3-ubyte", channels=4),
        "cifar10": Cifar10Game(path=folder / "cifar", channels=4),
    }


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GameOptions]:
    return of_every_kind(tmp_path_factory.mktemp("data"))


def test_all_of_them_are_here(kinds: dict[str, GameOptions]) -> None:
    assert list(kinds) == list(GAMES)
    assert [name_of(options) for options in kinds.values()] == list(GAMES)


@pytest.mark.parametrize("name", GAMES)
def test_a_game_is_whole(name: str, kinds: dict[str, GameOptions]) -> None:
    """Both players take the data and learn; samples are of its kind; the same run comes again."""
    options = kinds[name]
    recipe = build_game(options)
    x_0 = recipe.dataset.encode(recipe.dataset.train[:4])
    for loss in (DiscriminatorLoss, GeneratorLoss):
        losses = loss(recipe.game, recipe.rules)(x_0)
        assert losses.shape == (4,) and bool(torch.isfinite(losses).all())
        losses.mean().backward()
    assert all(p.grad is not None for p in recipe.game.parameters())
    fakes = recipe.dataset.decode(recipe.game.generator(recipe.game.noise(3)).detach())
    assert fakes.shape[1:] == recipe.dataset.shape() and fakes.dtype == recipe.dataset.train.dtype
    assert (recipe.rules.prepare is None) == (recipe.dataset.levels is None)
    json.dumps(recipe.dataset.record, allow_nan=False)
    again = restored(name, json.loads(json.dumps(stored(options))), "game")
    assert again == options and isinstance(again, GameOptions)
    one, other = recipe.game.state_dict(), build_game(again).game.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_numbers_have_limits() -> None:
    known = {*limits.LIMITS, "seed"}
    fields = {f for kind in GAMES.values() for f in dataclasses.fields(kind)}
    numeric = {f.name for f in fields if re.match(r"(tuple\[)?(int|float)", str(f.type))}
    assert numeric - known == set()
    for kind in GAMES.values():
        has_path = "path" in {f.name for f in dataclasses.fields(kind)}
        limits.check(kind(**({"path": Path("x")} if has_path else {})))


def test_every_loss_is_played() -> None:
    kinds = [gan.NonSaturating, gan.Relativistic, gan.Minimax, gan.Hinge]
    for name, kind in zip(
        ("non-saturating", "relativistic", "minimax", "hinge"), kinds, strict=True
    ):
        options = RingGame(examples=400, loss=name, r1=2.0, r2=3.0)  # type: ignore[arg-type]
        recipe = build_game(options)
        assert type(recipe.rules.loss) is kind
        assert (recipe.rules.r1, recipe.rules.r2) == (2.0, 3.0)
        assert recipe.description["loss"] == name


def test_who_plays_by_default() -> None:
    assert [name for name in GAMES if families(name)[0] == "game"] == ["ring", "grid"]
    rows = json.loads(ran(["recipes", "--json"])[0])["recipes"]
    assert rows["ring"]["families"] == ["game", "diffusion"]
    assert rows["digits"]["families"] == ["diffusion", "game"]
    assert rows["bits"]["families"] == ["diffusion"]
    assert "ring [--no-game]" in ran(["recipes"])[0] and "--game: " in ran(["train", "-h"])[0]
    for name in ("ring", "digits"):
        for flag, option in (("--game", "--half-life"), ("--no-game", "--latents")):
            shown, _ = ran(["train", name, flag, "--help"])
            assert option in shown and "--game" in shown, shown


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train bits --game", "the recipe bits has none"),
        ("train ring --game --no-game", "exclude each other"),
        ("train ring --latents 10", "latents"),
        ("train ring --no-game --critic-moves 2", "critic-moves"),
        ("train ring --critic-moves 0", "--critic-moves 0: it must be at least 1"),
        ("train ring --betas 0 1", "--betas 1: it must be at least 0"),
        ("train ring --r1 -1", "--r1 -1"),
        ("train ring --relax 2", "--relax 2"),
        ("train ring --std 0", "--std 0"),
        ("train digits --game --augment 1.5", "--augment 1.5"),
        ("train digits --game --loss magic", "loss"),
        ("sample RUN --steps 5", "leave out --steps"),
        ("sample RUN --sampler ddim --progressive", "leave out --sampler, --progressive"),
        ("sample RUN --hole 2", "leave out --hole"),
        ("sample RUN --checkpoint 7", "--checkpoint 7"),
        ("sample RUN --n 0", "--n 0"),
    ],
)
def test_usage_errors(arguments: str, words: str, game: Path, tmp_path: Path) -> None:
    typed = shlex.split(arguments.replace("RUN", shlex.quote(str(game))))
    out, err = ran([*typed, "--out", str(tmp_path / "run")], 2)
    assert out == "" and words in err and list(tmp_path.iterdir()) == []


def test_what_a_generator_has_not(game: Path, tmp_path: Path) -> None:
    _, err = ran(["evaluate", str(game)], 3)
    assert f"a generator has no likelihood: nelbo compare data {game} measures" in err
    _, err = ran(["export", str(game), str(tmp_path / "x")], 3)
    assert "generator is no diffusion model" in err and not (tmp_path / "x").exists()
    with pytest.raises(InputRefused, match="no recipe.json"):
        open_game(tmp_path)


@pytest.mark.usefixtures("small_page")
def test_families_are_not_mixed_up(game: Path, finished_run: Path, tmp_path: Path) -> None:
    typed = ["train", "digits", "--out", str(game), "--resume"]
    assert "of the recipe digits --game" in ran(typed, 3)[1]
    assert "a diffusion model, not a game" in str(
        pytest.raises(InputRefused, open_game, finished_run).value
    )
    small = ["--width", "8", "--depth", "1", "--latents", "5", "--calls", "2", "--examples", "400"]
    more = ["--steps", "2", "--batch", "16", "--samples", "4", "--validate-every", "0", "--quiet"]
    path = tmp_path / "run"
    out, _ = ran(["train", "ring", "--no-game", *small, *more, "--out", str(path), "--json"])
    assert json.loads(out)["truth"]["entropy"]
    assert json.loads((path / "recipe.json").read_text())["family"] == "diffusion"
    assert "of the recipe ring --no-game" in ran(ring(path, "--resume"), 3)[1]


def test_a_run_of_before_is_a_diffusion_model(run_copy: Path) -> None:
    path = run_copy / "recipe.json"
    value = json.loads(path.read_text())
    assert value.pop("family") == "diffusion"
    path.write_text(json.dumps(value))
    ran(["evaluate", str(run_copy), "--calls", "2", "--limit", "5", "--quiet"])
    path.write_text(json.dumps({**value, "family": "magic"}))
    assert "no family 'magic'" in ran(["evaluate", str(run_copy)], 3)[1]


# --- what lies in the directory ------------------------------------------------------------------


def test_the_directory(game: Path) -> None:
    recipe = json.loads((game / "recipe.json").read_text())
    assert (recipe["recipe"], recipe["family"]) == ("digits", "game")
    assert recipe["options"]["critic_moves"] == 1 and recipe["model"]["parameters"] > 0
    assert recipe["model"]["description"]["loss"] == "non-saturating"
    assert status(game)["state"] == "finished"
    for step, path in steps(game / "checkpoints"):
        assert load(path).tensors.keys() == GROUPS and step in (6, 8, 12)
    rows = [json.loads(line) for line in (game / "metrics.jsonl").read_text().splitlines()]
    looks = [row for row in rows if {"sliced_wasserstein", "mmd2"} <= row.keys()]
    assert [row["step"] for row in looks] == [6, 12]
    names = {"loss", "loss_discriminator", "jsd_plugin", "grad_norm", "grad_norm_discriminator"}
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == list(range(1, 13))
    for row in losses:
        assert names <= row.keys() and all(math.isfinite(row[name]) for name in names)
        assert row["jsd_plugin"] <= math.log(2)
    # over one batch D has V without a penalty; with it the loss is larger
    assert losses[0]["jsd_plugin"] >= math.log(2) - losses[0]["loss_discriminator"] / 2
    with np.load(game / "samples" / "samples.npz") as arrays:
        assert arrays["samples"].shape == arrays["real"].shape == (4, 1, 8, 8)
        assert arrays["samples"].dtype == np.uint8 and arrays["samples"].max() <= 16
    assert (game / "samples" / "real.png").is_file() and (game / "report.html").is_file()
    ran(["report", str(game)])


def test_the_best_checkpoint(game: Path) -> None:
    info = {step: load(path).info["validation"] for step, path in steps(game / "checkpoints")}
    scores = {step: found["mean"] for step, found in info.items() if found is not None}
    assert open_game(game, "best").step == min(scores, key=lambda step: scores[step])


def test_the_distance_of_the_validation() -> None:
    """A shift by m in one of k dimensions is m² on average over directions, divided by k."""
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    move = torch.tensor([3.0, 0, 0, 0])
    assert sliced_wasserstein(x, x[torch.randperm(500)]) == pytest.approx(0, abs=1e-12)
    assert sliced_wasserstein(x, x + move) == pytest.approx(
        9 / 4, rel=0.2
    )  # 256 directions: sd 6 %


def test_the_discrepancy_by_hand() -> None:
    """Two points at distance 1: across, the distances are 0, 1, 1, 0, with four kernels each."""
    two = torch.tensor([[0.0], [1.0]])
    within = sum(math.exp(-(16.0**k) / 2) for k in range(4))
    assert multiscale_mmd2(two, two, 1.0) == pytest.approx(
        2 * within - 2 * (2 * 4 + 2 * within) / 4
    )


def test_the_discrepancy_sees_the_width_of_modes() -> None:
    """25 modes three times too wide: how far above the noise of one law each figure puts them."""
    draws = torch.Generator().manual_seed(0)

    def rows(std: float) -> Tensor:
        places = torch.randint(0, 5, (600, 2), generator=draws).double() / 2
        return places + std * torch.randn(600, 2, generator=draws, dtype=torch.float64)

    figures = {"mmd2": lambda x, y: multiscale_mmd2(x, y, 1.0), "sliced": sliced_wasserstein}
    clear = {}
    for name, figure in figures.items():
        same, wide = (
            torch.tensor([figure(rows(0.02), rows(std)) for _ in range(12)])
            for std in (0.02, 0.06)
        )
        clear[name] = float((wide.mean() - same.mean()) / same.std())
        if name == "mmd2":  # it is unbiased
            assert abs(float(same.mean())) < 6 * float(same.std()) / math.sqrt(12)
    assert clear["mmd2"] > 4 > clear["sliced"], clear


# --- sampling ------------------------------------------------------------------------------------


def test_the_sampler(game: Path) -> None:
    """Averaged weights, evaluation mode; rows do not know of batches; seeds decide."""
    played = open_game(game)
    assert played.step == 12 and not played.generator.training
    averaged = load(step_path(game / "checkpoints", 12)).tensors["generator-ema"]
    assert all(torch.equal(v, averaged[k]) for k, v in played.generator.state_dict().items())
    found: list[Tensor] = []
    for batch in (1024, 7):
        with seeded(5, "here"):
            found.append(played.sampler(batch=batch)(20))
    assert found[0].shape == (20, 1, 8, 8) and found[0].dtype == torch.uint8
    assert float((found[0] == found[1]).double().mean()) > 0.99  # last digits may round apart
    with seeded(6, "here"):
        assert not torch.equal(found[0], played.sampler()(20))


def test_sample(game: Path, tmp_path: Path) -> None:
    found = []
    for n in (2, 7):
        typed = ["sample", str(game), "--n", str(n), "--json", "--quiet"]
        value = json.loads(ran([*typed, "--out", str(tmp_path / str(n))])[0])
        assert (value["n"], value["step"], value["sampler"]) == (n, 12, "generator")
        assert Path(value["picture"]).is_file()
        with np.load(value["array"]) as arrays:
            found.append(arrays["samples"])
    assert np.array_equal(found[0], found[1][:2])
    again = ["sample", str(game), "--n", "7", "--quiet", "--out", str(tmp_path / "7")]
    assert "nothing in it is overwritten" in ran(again, 2)[1]
    places = [Path(ran(["sample", str(game), "--n", "2"])[0].split()[0]) for _ in range(2)]
    assert places[0] != places[1] and places[1].parent.name.endswith("-2")


# --- resumed is straight -------------------------------------------------------------------------


def assert_same(path: Path, straight: Path, step: int = 12) -> None:
    one, other = (load(step_path(p / "checkpoints", step)) for p in (straight, path))
    assert one.tensors.keys() == other.tensors.keys() == GROUPS
    for group, tensors in one.tensors.items():
        assert tensors and tensors.keys() == other.tensors[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.tensors[group][name]), f"{group}: {name}"


MANY = ["--critic-moves", "3", "--relax", "0.1"]


def stopped_after(limit: int, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """A start that a signal stops after its `limit`-th update."""
    right, count = Trainer.update, 0

    def update(trainer: Trainer) -> Any:
        nonlocal count
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGTERM)
        return right(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", update)
        _, err = ran(arguments, 143)
    assert "saved. Continue with --resume" in err


@pytest.mark.usefixtures("small_page")
@pytest.mark.parametrize("make", [ring, digits])
def test_resumed_is_straight(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both players and both optimisers, through a signal, with three moves of D for one of G."""
    straight, path = tmp_path / "straight", tmp_path / "path"
    ran(make(straight, *MANY))
    for limit in (3, 4):
        stopped_after(limit, monkeypatch, make(path, *MANY, "--resume"))
    assert status(path)["step"] == 7 and status(path)["state"] == "stopped"
    _, err = ran(make(path, *MANY, "--resume"))
    assert "after step 7" in err
    assert_same(path, straight)


@pytest.mark.usefixtures("small_page")
def test_the_check_finds_an_optimiser_that_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, path = tmp_path / "straight", tmp_path / "path"
    ran(ring(straight))
    stopped_after(5, monkeypatch, ring(path))
    monkeypatch.setattr("nelbo.trainer._load_optimizer", lambda *_: None)
    ran(ring(path, "--resume"))
    with pytest.raises(AssertionError, match="generator|discriminator"):
        assert_same(path, straight)


def test_the_players_make_their_moves() -> None:
    """k updates of D on batches of their own for one of G, and D first."""
    options = RingGame(examples=400, steps=3, batch=8, critic_moves=3, width=8, depth=1)
    trainer = trainer_of(build_game(options), "cpu")
    seen: list[tuple[str, Tensor]] = []
    for number, player in enumerate(trainer.players):

        def loss(x_0: Tensor, player: Any = player) -> Tensor:
            seen.append((player.name, x_0))
            found: Tensor = player.loss(x_0)
            return found

        trainer.players[number] = player._replace(loss=loss)
    for record in trainer:
        assert record.examples == 4 * 8
    assert [name for name, _ in seen] == (["discriminator"] * 3 + ["generator"]) * 3
    rows = torch.cat([x for _, x in seen])
    assert len(rows.unique(dim=0)) == len(rows), "no example twice in an epoch"
    assert list(trainer.averages) == ["generator"]


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A process of its own, SIGKILL in the middle; the next start ends where it would have."""
    path, straight = tmp_path / "run", tmp_path / "straight"
    more = ["--steps", "120", "--save-every", "10", "--validate-every", "0", "--keep", "1"]
    environment = {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "nelbo", *ring(path, *more)],
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    ) as running:
        while running.poll() is None and not (path / "checkpoints" / "step-00000020").exists():
            time.sleep(0.001)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    ran(ring(path, *more, "--resume"))
    ran(ring(straight, *more))
    assert_same(path, straight, 120)


# --- numbers that are none -----------------------------------------------------------------------


@pytest.mark.usefixtures("small_page")
@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_a_loss_that_is_not_finite(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 4, the player and the step named; the directory is intact and goes on from there."""
    path = tmp_path / "run"
    kind = {"generator": GeneratorLoss, "discriminator": DiscriminatorLoss}[name]
    right, calls = kind.__call__, 0

    def planted(loss: Any, x_0: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return right(loss, x_0) * (math.nan if calls == 7 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "__call__", planted)
        _, err = ran(ring(path), 4)
    assert f"the loss of {name} is nan at update 7" in err
    assert status(path)["exit_code"] == 4 and status(path)["state"] == "failed"
    assert [step for step, _ in steps(path / "checkpoints")] == [4]
    for tensors in load(step_path(path / "checkpoints", 4)).tensors.values():
        assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    ran(ring(path, "--resume"))
    ran(ring(tmp_path / "straight"))
    assert_same(path, tmp_path / "straight")


@pytest.mark.usefixtures("small_page")
def test_damaged_checkpoints(tmp_path: Path) -> None:
    """Each part that training needs is missed by name, and the older checkpoint taken."""
    for group in sorted(GROUPS):
        path = tmp_path / group
        ran(ring(path, "--validate-every", "0", "--keep", "3"))
        newest = step_path(path / "checkpoints", 12) / f"{group}.safetensors"
        newest.write_bytes(newest.read_bytes()[:-9])
        _, err = ran(ring(path, "--resume"))
        assert "skipped: " in err and group in err and "after step 8" in err
        assert_same(path, path)
