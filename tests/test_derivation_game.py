"""The derivation of the game and of the instrument: its lines agree, and can disagree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from derived import check_lines, check_statement
from torch import Tensor

from nelbo import gan, jsd, quadrature, sandwich
from nelbo.derivation import between, certified, divergences, evidence, minimax, places, slack
from nelbo.derivation.identity import Erratum, Identity

MODULES = [minimax, slack, divergences, certified, evidence, between]
IDENTITIES = {one.id: one for module in MODULES for one in module.IDENTITIES}
ERRATA = [one for module in MODULES for one in module.ERRATA]


def test_every_identity_of_the_game_is_there_once() -> None:
    assert list(IDENTITIES) == [f"I{n}" for n in (*range(26, 34), *range(61, 66))]
    assert len({one.name for one in IDENTITIES.values()}) == len(IDENTITIES)
    assert [one.id for one in ERRATA] == ["E17", "E18", "E19", "E20"]
    assert all(one.identity in IDENTITIES for one in ERRATA)


@pytest.mark.parametrize("one", IDENTITIES.values(), ids=IDENTITIES)
def test_an_identity_says_what_it_is(one: Identity) -> None:
    check_statement(one)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("one", IDENTITIES.values(), ids=IDENTITIES)
def test_every_line_agrees(one: Identity, seed: int) -> None:
    check_lines(one, seed)


@pytest.mark.parametrize("one", ERRATA, ids=lambda one: one.id)
def test_every_wrong_variant_disagrees(one: Erratum) -> None:
    for seed in (0, 1):
        line = one.line(seed)
        assert not line.agrees, line
        assert all(math.isfinite(side.value) for side in line.sides)


def test_the_inequalities_have_room_and_no_more_than_they_say() -> None:
    """A line of an order disagrees when its sides are exchanged."""
    one, two = places.single(1.0), places.single(2.0)
    assert places.below("", places.Said("a"), places.Said("b"), one, two).agrees
    assert not places.below("", places.Said("b"), places.Said("a"), two, one).agrees
    assert not places.below("", places.Said("a"), places.Said("b"), one * math.nan, two).agrees
    assert not places.equal("", places.Said("a"), places.Said("b"), one, one + 1e-9).agrees
    assert not places.equal("", places.Said("a"), places.Said("b"), one, one * math.nan).agrees


# --- planted errors ------------------------------------------------------------------------------


def disagreeing(identities: dict[str, Identity]) -> set[str]:
    """Those of which a line disagrees."""
    return {k for k, one in identities.items() if not all(x.agrees for x in one.lines(0))}


def scaled(factor: float) -> Callable[..., Any]:
    return lambda right: lambda *a, **k: factor * right(*a, **k)


def shifted(change: float) -> Callable[..., Any]:
    """An `Exact` with another value."""

    def plant(right: Callable[..., quadrature.Exact]) -> Callable[..., quadrature.Exact]:
        def wrong(*a: Any, **k: Any) -> quadrature.Exact:
            exact = right(*a, **k)
            return quadrature.Exact(exact.value * change, exact.error)

        return wrong

    return plant


def exchanged(right: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda real, fake: right(fake, real)


def without_fakes(right: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda real, fake: right(real, torch.full_like(fake, -math.inf))


def unclipped(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda real, fake, clip: right(real, fake, math.inf)


def of_half(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda r: right(torch.as_tensor(r, dtype=torch.float64).sqrt())


Plant = Callable[[Any], Any]
PLANTED: dict[str, tuple[Any, str, Plant, set[str]]] = {
    "V with the other sign": (gan, "value", scaled(-1), {"I26", "I27", "I28", "I29", "I30"}),
    "V halved": (gan, "value", scaled(0.5), {"I26", "I27", "I29", "I30", "I64"}),
    "V of exchanged sides": (gan, "value", exchanged, {"I27", "I29", "I30", "I64"}),
    "V without the fakes": (gan, "value", without_fakes, {"I26", "I27", "I29", "I30"}),
    "the loss of D": (gan.Minimax, "discriminator", scaled(1.01), {"I30"}),
    "summed V negative": (quadrature, "value", shifted(-1), {"I27", "I28", "I29", "I30", "I61"}),
    "summed V, 1 % off": (quadrature, "value", shifted(1.01), {"I27", "I29", "I30", "I61"}),
    "summed JSD doubled": (quadrature, "jsd", shifted(2), {"I29", "I30", "I31"}),
    "slack halved": (quadrature, "slack", shifted(0.5), {"I30"}),
    "KL a tenth": (quadrature, "kl", shifted(0.1), {"I32"}),
    "phi 1 % off": (jsd, "phi", scaled(1.01), {"I31", "I32"}),
    "phi of the root": (jsd, "phi", of_half, {"I31", "I32"}),
    "kappa doubled": (jsd, "kappa", scaled(2), {"I32"}),
    "kappa of the sandwich, twentyfold": (sandwich, "kappa", scaled(20), {"I65"}),
    "payoff not clipped": (jsd, "payoff", unclipped, {"I61"}),
    "payoff doubled": (jsd, "payoff", scaled(2), {"I61", "I62", "I64"}),
    "limits too high": (jsd, "limit_below", scaled(1.1), {"I63"}),
    "the bound doubled": (jsd, "lower_bound", scaled(2), {"I62"}),
    "e-value halved": (jsd, "log_e_value", scaled(0.5), {"I64"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_makes_lines_disagree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, plant, caught = PLANTED[name]
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    suspects = {k: IDENTITIES[k] for k in caught}
    assert disagreeing(suspects) == caught
