"""Recipes: each builds, says what it is, and is the same run again from what was stored."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import assert_mean
from PIL import Image
from tiny import silent

from nelbo import objectives
from nelbo.decoders import LevelMass
from nelbo.errors import InputRefused, UsageError
from nelbo.evaluation import evaluate
from nelbo.parameterizations import Epsilon, Mean, Velocity
from nelbo.recipes import limits
from nelbo.recipes.build import build
from nelbo.recipes.families import name_of, restored, stored
from nelbo.recipes.options import (
    RECIPES,
    Bits,
    Cifar10,
    DeadLeaves,
    Digits,
    Gaussian,
    Grid,
    Heartbeat,
    Images,
    Mnist,
    Options,
    Ring,
    SwissRoll,
    Texture,
    Vectors,
)
from nelbo.recipes.recipe import Recipe
from nelbo.schedules import Cosine, Harmonic, Linear, LogSNRLinear
from nelbo.variances import Between, Transition

SMALL: dict[str, Any] = {
    "channels": 8,
    "multipliers": (1, 2),
    "layers": 1,
    "attention": (),
    "latents": 10,
    "fourier": (),
}
TOY: dict[str, Any] = {"latents": 10, "width": 16, "depth": 1, "examples": 400}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def digits(**more: Any) -> Options:
    return Digits(**{**SMALL, **more})


def of_every_kind(folder: Path) -> dict[str, Options]:
    """Options of each recipe, with small data where it needs some."""
    np.save(folder / "images.npy", noise(60, 3, 8, 8))
    np.save(folder / "vectors.npy", np.random.default_rng(0).normal(3, 2, (60, 5)))
    np.save(folder / "bits.npy", noise(60, 5) > 99)
    Image.fromarray(noise(20, 120)).save(folder / "photo.png")
    idx = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (60, 8, 8))
    (folder / "train-images-idx3-ubyte").write_bytes(idx + noise(60, 8, 8).tobytes())
    (folder / "cifar").mkdir()
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records = np.random.default_rng(len(name) + ord(name[-5])).integers(0, 256, (8, 3073))
        records[:, 0] %= 10
        (folder / "cifar" / name).write_bytes(records.astype(np.uint8).tobytes())
    return {
        "digits": digits(),
        "swissroll": SwissRoll(**TOY),
        "ring": Ring(**TOY),
        "grid": Grid(**TOY),
        "gaussian": Gaussian(**TOY),
        "heartbeat": Heartbeat(latents=10, width=16, depth=1),
        "deadleaves": DeadLeaves(**SMALL, size=8, examples=40),
        "texture": Texture(path=folder / "photo.png", **SMALL, size=8, examples=40),
        "images": Images(path=folder / "images.npy", **SMALL),
        "vectors": Vectors(path=folder / "vectors.npy", latents=10, width=16, depth=1),
        "bits": Bits(path=folder / "bits.npy", latents=10, width=16, depth=1),
        "mnist": Mnist(path=folder / "train-images-idx3-ubyte", **SMALL),
        "cifar10": Cifar10(path=folder / "cifar", **SMALL),
    }


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Options]:
    return of_every_kind(tmp_path_factory.mktemp("data"))


def test_all_of_them_are_here(kinds: dict[str, Options]) -> None:
    assert list(kinds) == list(RECIPES)
    assert [name_of(options) for options in kinds.values()] == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_whole(name: str, kinds: dict[str, Options]) -> None:
    """The model takes the data, the objective has gradients, the bound is finite."""
    recipe = build(kinds[name])
    assert recipe.name == name and len(recipe.times) == 10
    x_0 = recipe.dataset.encode(recipe.dataset.train[:4])
    loss = recipe.objective(recipe.model, x_0)
    loss.mean().backward()
    assert loss.shape == (4,) and bool(torch.isfinite(loss).all())
    assert any(p.grad is not None and bool(p.grad.any()) for p in recipe.model.parameters())
    test = recipe.dataset.test[:3]
    result = evaluate(recipe.model, test, recipe.times, encode=recipe.dataset.encode)
    assert bool(torch.isfinite(result.values()["total"]).all())
    words = recipe.description
    assert {"parameterization", "variance", "decoder", "grid", "clip", "objective"} <= words.keys()
    assert words["grid"].startswith("10 latents")
    json.dumps(recipe.dataset.record, allow_nan=False)


@pytest.mark.parametrize("name", RECIPES)
def test_stored_options_are_the_same_run(name: str, kinds: dict[str, Options]) -> None:
    options = kinds[name]
    again = restored(name, json.loads(json.dumps(stored(options))))
    assert again == options
    one, other = build(options).model.state_dict(), build(again).model.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_what_belongs_to_one_start_is_not_stored() -> None:
    options = digits(out=Path("x"), resume=True, device="cpu", threads=3, json=True, quiet=True)
    assert stored(options) == stored(digits())
    assert "seed" in stored(options)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [("magic", {}, "no recipe 'magic'"), ("digits", {"flux": 1}, "flux")],
)
def test_options_of_another_version(name: str, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        restored(name, values)


def test_weights_are_a_function_of_the_seed() -> None:
    torch.manual_seed(5)
    first = build(digits()).model.state_dict()
    torch.manual_seed(6)
    second, other = build(digits()).model.state_dict(), build(digits(seed=1)).model.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


# --- every choice of an option does what it says -------------------------------------------------


def inner(recipe: Recipe) -> Any:
    return recipe.model.process.schedule


@pytest.mark.parametrize(
    ("name", "kind"),
    [("logsnr", LogSNRLinear), ("linear", Linear), ("cosine", Cosine), ("harmonic", Harmonic)],
)
def test_schedules(name: str, kind: type) -> None:
    recipe = build(SwissRoll(schedule=name, **TOY))  # type: ignore[arg-type]
    assert type(inner(recipe)) is kind and torch.equal(recipe.times, inner(recipe).grid(10))
    assert name in recipe.description["grid"] or name == "logsnr"


CHOICES: list[tuple[dict[str, Any], Callable[[Recipe], bool]]] = [
    (
        {"predict": "levels", "decoder": "mass"},
        lambda r: isinstance(r.model.decoder_rule, LevelMass),
    ),
    ({"predict": "epsilon"}, lambda r: type(r.model.parameterization) is Epsilon),
    ({"predict": "mean"}, lambda r: type(r.model.parameterization) is Mean),
    ({"predict": "velocity"}, lambda r: type(r.model.parameterization) is Velocity),
    ({"variance": "between"}, lambda r: isinstance(_variance(r), Between)),
    ({"variance": "transition"}, lambda r: isinstance(_variance(r), Transition)),
    ({"clip_x0": 1.0}, lambda r: r.description["clip"] == "1"),
    ({"edge": "following"}, lambda r: "following" in r.description["decoder"]),
    ({"edge": "ratio"}, lambda r: "ratio" in r.description["decoder"]),
    ({"objective": "simple"}, lambda r: type(r.objective) is objectives.Simple),
    ({"objective": "mean"}, lambda r: type(r.objective) is objectives.Mean),
    (
        {"objective": "hybrid", "variance": "between"},
        lambda r: type(r.objective) is objectives.Hybrid,
    ),
]


def _variance(recipe: Recipe) -> object:
    return recipe.model.parameterization.variance  # type: ignore[union-attr]


@pytest.mark.parametrize(("more", "holds"), CHOICES)
def test_choices(more: dict[str, Any], holds: Callable[[Recipe], bool]) -> None:
    plain = {"predict": "velocity", "decoder": "discretized"}
    recipe = build(digits(**{**plain, **more}))
    assert holds(recipe)
    x_0 = recipe.dataset.encode(recipe.dataset.train[:3])
    assert bool(torch.isfinite(recipe.objective(recipe.model, x_0)).all())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"predict": "velocity", "decoder": "density"}, "discretized"),
        ({"predict": "levels", "variance": "between"}, "fixed variance"),
        ({"predict": "levels", "clip_x0": 1.0}, "clip"),
        ({"latents": 1, "edge": "following", "predict": "x0", "decoder": "discretized"}, "lose"),
        ({"multipliers": (1, 2, 2, 2, 2)}, "multiples of 16"),
    ],
)
def test_contradictions(more: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build(digits(**more))


def test_data_of_the_wrong_kind(kinds: dict[str, Options]) -> None:
    vectors, images = kinds["vectors"], kinds["images"]
    assert isinstance(vectors, Vectors) and isinstance(images, Images)
    with pytest.raises(InputRefused, match="recipe vectors"):
        build(Images(path=vectors.path, **SMALL))
    with pytest.raises(InputRefused, match="recipe images"):
        build(Vectors(path=images.path))


def test_defaults_are_within_their_limits() -> None:
    for kind in RECIPES.values():
        path = {"path": Path("x")} if "path" in {f.name for f in dataclasses.fields(kind)} else {}
        limits.check(kind(**path))


def test_every_number_has_limits() -> None:
    """A new numeric option must be given limits, or be named here."""
    known = {*limits.LIMITS, "seed", "fourier", "focus"}
    fields = {f for kind in RECIPES.values() for f in dataclasses.fields(kind)}
    numeric = {f.name for f in fields if re.match(r"(tuple\[)?(int|float)", str(f.type))}
    assert numeric - known == set()


# --- the toy with a known truth ------------------------------------------------------------------


def test_the_exact_denoiser_is_on_the_same_grid_and_better() -> None:
    recipe = build(SwissRoll(**{**TOY, "latents": 30}))
    assert recipe.exact is not None and recipe.dataset.truth is not None
    arguments = {"encode": recipe.dataset.encode, "offset": recipe.dataset.offset()}
    rows = recipe.dataset.test[:400]
    exact, fresh = (
        evaluate(m, rows, recipe.times, **arguments).estimates()["total"]  # type: ignore[arg-type]
        for m in (recipe.exact, recipe.model)
    )
    entropy = recipe.dataset.truth.entropy
    assert entropy < exact.mean + 5 * exact.se and exact.mean + 5 * exact.se < fresh.mean


def test_the_exact_bound_closes_on_the_entropy() -> None:
    """O(1/N): four times the latents leave about a quarter of the gap (one half would fail)."""
    gaps = []
    for latents in (25, 100):
        recipe = build(SwissRoll(**{**TOY, "latents": latents}))
        assert recipe.exact is not None and recipe.dataset.truth is not None
        rows, truth = recipe.dataset.test[:600], recipe.dataset.truth
        result = evaluate(
            recipe.exact,
            rows,
            recipe.times,
            encode=recipe.dataset.encode,
            offset=recipe.dataset.offset(),
            replicates=1,
            batch=2048,
        )
        # the same examples' own −log p as a control leaves the noise of the bound alone
        gap = result.values()["total"] + truth.log_prob(rows)
        assert_mean(gap - gap.mean(), 0)
        gaps.append(float(gap.mean()))
    assert 0 < gaps[1] < gaps[0] / 2.5, gaps


@pytest.mark.parametrize("name", ["swissroll", "vectors"])
def test_a_density_through_the_command_line(
    name: str, tmp_path: Path, kinds: dict[str, Options]
) -> None:
    """Trains, measures in the units of the data, and knows the truth of the toy."""
    options = kinds[name]
    path = [str(options.path)] if isinstance(options, Vectors) else ["--examples", "400"]
    small = ["--steps", "3", "--batch", "16", "--latents", "10", "--width", "16", "--depth", "1"]
    more = ["--samples", "20", "--calls", "5", "--validate-every", "0", "--threads", "1"]
    out = ["--out", str(tmp_path / "run"), "--json", "--quiet"]
    code, text, err = silent(["train", name, *path, *small, *more, *out])
    assert code == 0, err
    value = json.loads(text)
    assert value["data"]["levels"] is None and value["baselines"] == {}
    assert value["terms"]["total"]["unit"] == "bits/dim" and value["calls_per_example"] == 5
    assert ("truth" in value) == (name == "swissroll")
    if name == "swissroll":
        recipe = build(SwissRoll(examples=400, latents=10, width=16, depth=1))
        assert recipe.dataset.truth is not None
        entropy = value["truth"]["entropy"]["mean"] * 2 * math.log(2)
        assert entropy == pytest.approx(recipe.dataset.truth.entropy)
        assert value["truth"]["exact_denoiser"]["total"]["mean"] < value["terms"]["total"]["mean"]
    with np.load(tmp_path / "run" / "samples" / "samples.npz") as arrays:
        assert arrays["samples"].shape == (20, value["data"]["dims"])
