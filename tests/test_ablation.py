"""Every row of DDPM's ablation is a set of options: it trains and is measured, or is refused."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import command, silent

from nelbo.data.embedded import digits
from nelbo.errors import UsageError
from nelbo.evaluation import evaluate
from nelbo.randomness import seeded
from nelbo.recipes import build as building
from nelbo.recipes import combinations
from nelbo.recipes.build import build
from nelbo.recipes.options import Digits, Mnist
from nelbo.recipes.recipe import Recipe
from nelbo.walks.train import trainer_of

PREDICT = ("mean", "epsilon", "x0", "velocity")
VARIANCE = ("transition", "posterior", "free", "between")
OBJECTIVE = ("vlb", "simple", "mean", "hybrid")
SMALL: dict[str, Any] = {
    "channels": 8,
    "multipliers": (1,),
    "attention": (),
    "positions": 2,
    "head_dim": None,
    "dropout": 0.0,
    "drop_channels": False,
    "focus": None,
    "latents": 20,
    "decoder": "discretized",
    "batch": 32,
    "rate": 2e-3,
    "warmup": 0,
    "ema": 0.9,
    "steps": 30,
}


def recipe_of(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Recipe:
    dataset = digits(100)
    few = dataclasses.replace(dataset, train=dataset.train[:256], test=dataset.test[:16])
    monkeypatch.setattr(building, "digits", lambda validation: few)
    return build(Digits(**(SMALL | options)))


def makes_sense(variance: str, objective: str) -> bool:
    """A learned variance needs a bound, and the hybrid a learned variance."""
    learned = variance in ("free", "between")
    return {"vlb": True, "hybrid": learned}.get(objective, not learned)


ROWS = list(itertools.product(PREDICT, VARIANCE, OBJECTIVE))


def fixed_loss(recipe: Recipe) -> float:
    """The loss of 128 examples with the noise and the times that a seed holds."""
    with torch.no_grad(), seeded(0, "fixed"):
        x_0 = recipe.dataset.encode(recipe.dataset.train[:128])
        return float(recipe.objective(recipe.model, x_0).mean())


@pytest.mark.parametrize(("predict", "variance", "objective"), ROWS)
def test_a_row_of_the_ablation(
    predict: str, variance: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 updates lower the loss of fixed draws, and the bound has a finite value with errors."""
    options = {"predict": predict, "variance": variance, "objective": objective}
    if not makes_sense(variance, objective):
        with pytest.raises(UsageError, match="--objective"):
            recipe_of(monkeypatch, **options)
        return
    recipe = recipe_of(monkeypatch, **options)
    before = fixed_loss(recipe)
    trainer = trainer_of(recipe, "cpu")
    for record in trainer:
        assert record.losses["model"] == record.losses["model"]
    assert fixed_loss(recipe) < 0.97 * before
    model = trainer.averages["model"].module
    result = evaluate(
        model, recipe.dataset.test, recipe.times, encode=recipe.dataset.encode, replicates=1
    )
    total = result.estimates()["total"]
    assert total.mean > 0 and total.se > 0 and total.se_mc > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "hybrid", "variance": "posterior"}, "take --variance between"),
        ({"objective": "simple", "variance": "free"}, "never be trained"),
        ({"objective": "continuous", "variance": "between"}, "never be trained"),
        ({"objective": "simple", "schedule": "linear", "learn_betas": True}, "--objective vlb"),
        ({"predict": "epsilon", "schedule": "harmonic"}, "take --predict x0 or velocity"),
        ({"predict": "mean", "latents": 1}, "--latents 2"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    kept = {"objective": "vlb", "variance": "posterior", "focus": None}
    with pytest.raises(UsageError, match=message):
        combinations.check(Digits(**(kept | options)))


def test_a_recipes_own_focus_makes_room_and_a_typed_one_does_not() -> None:
    own = Digits(times="second-moment")
    assert own.focus is not None and not combinations.focused(own)
    combinations.check(own)
    assert combinations.focused(Digits())
    with pytest.raises(UsageError, match="take one of them"):
        combinations.check(dataclasses.replace(own, focus=(1.0, 2.0)))


def test_bits_may_be_drawn_by_the_second_moment_too() -> None:
    with pytest.raises(UsageError, match="take one of them"):
        combinations.check_times(Mnist(path=Path("x"), times="second-moment", focus=(1.0, 2.0)))


def test_a_row_by_the_command_line(tmp_path: Path) -> None:
    """Improved DDPM's second row, as docs/ddpm.md has it."""
    row = [
        *("--schedule", "cosine", "--predict", "epsilon", "--variance", "between"),
        *("--edge", "following", "--decoder", "discretized", "--objective", "vlb"),
        *("--times", "second-moment"),
    ]
    code, text, err = silent(command(tmp_path / "run", *row))
    assert code == 0, err
    assert "epsilon, variance between" in text
