"""The derivation beyond the bound: weights, flows and conditions agree, and can disagree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from derived import check_lines, check_statement
from test_derivation_game import disagreeing, scaled
from torch import Tensor
from torch.distributions import Distribution

from nelbo import entropy, factors, flow, likelihood, odelikelihood
from nelbo.conditioning import Conditioned
from nelbo.derivation import (
    conditioned,
    conventions,
    dequantised,
    flows,
    inpainted,
    multiplied,
    weights,
)
from nelbo.derivation.identity import Erratum, Identity
from nelbo.distributions import per_example

MODULES = [weights, flows, dequantised, multiplied, conditioned, inpainted]
IDENTITIES = {one.id: one for module in MODULES for one in module.IDENTITIES}


def test_every_identity_is_there_once() -> None:
    assert list(IDENTITIES) == [f"I{n}" for n in (*range(47, 53), *range(53, 58))]
    assert len({one.name for one in IDENTITIES.values()}) == len(IDENTITIES)
    assert not any(module.ERRATA for module in MODULES) and not conventions.IDENTITIES


@pytest.mark.parametrize("one", IDENTITIES.values(), ids=IDENTITIES)
def test_an_identity_says_what_it_is(one: Identity) -> None:
    check_statement(one)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("one", IDENTITIES.values(), ids=IDENTITIES)
def test_every_line_agrees(one: Identity, seed: int) -> None:
    check_lines(one, seed)


@pytest.mark.parametrize("one", conventions.ERRATA, ids=lambda one: one.id)
def test_every_wrong_variant_disagrees(one: Erratum) -> None:
    line = one.line(0)
    assert not line.agrees, line
    assert all(math.isfinite(side.value) for side in line.sides)


# --- planted errors ------------------------------------------------------------------------------

Plant = Callable[[Any], Any]


def no_ratio(right: Plant) -> Plant:
    """The log-ratio of the last pair left out of the weight."""

    def wrong(self: Any, x_0: Tensor, x_t: Tensor, i: int, cells: Any) -> tuple[Tensor, Tensor]:
        x_s, gain = right(self, x_0, x_t, i, cells)  # type: ignore[misc]
        return x_s, gain if i > 1 else torch.zeros_like(gain)

    return wrong


def no_prior(right: Plant) -> Plant:
    """log p(x_N) − log q(x_N|x_0) left out of the weight."""

    def wrong(self: Any, x_0: Tensor, cells: Any) -> Tensor:
        process, t = self.model.process, self.times[-1]
        top = len(self.times) - 1
        log_w: Tensor = right(self, x_0, cells)  # type: ignore[assignment]
        x_t = self.sample(cells, top, lambda rows: process.marginal(x_0[rows], t))
        ratio = process.prior(x_t).log_prob(x_t) - process.marginal(x_0, t).log_prob(x_t)
        return log_w - per_example(ratio)

    return wrong


def sums(right: Plant) -> Plant:
    """Σ log w in the place of the log of the mean."""

    def wrong(self: likelihood.ImportanceWeighted, draws: int) -> Tensor:
        return right(self, draws) + 0.5 * math.log(draws)  # type: ignore[no-any-return]

    return wrong


def slopes(moved: float, volume: float) -> Plant:
    def plant(right: Plant) -> Plant:
        def wrong(self: flow.Flow, x: Tensor, logsnr: Tensor, probes: Tensor | None) -> Tensor:
            made: Tensor = right(self, x, logsnr, probes)  # type: ignore[assignment]
            dims = x[0].numel()
            return torch.cat([moved * made[:, :dims], volume * made[:, dims:]], 1)

        return wrong

    return plant


def no_entropy(right: Plant) -> Plant:
    """x_1 is right, and what is added is the decoder alone (or the bin's width, doubled)."""

    def wrong(*a: Any) -> tuple[Tensor, Tensor]:
        x_1, correction = right(*a)  # type: ignore[misc]
        return x_1, correction + 0.7

    return wrong


def normaliser(change: float) -> Plant:
    """log Z is off."""

    def plant(right: Plant) -> Plant:
        def wrong(*a: Any) -> tuple[Distribution, Tensor]:
            law, log_z = right(*a)  # type: ignore[misc]
            return law, log_z + change

        return wrong

    return plant


def added(change: float) -> Plant:
    return lambda right: lambda *a, **k: right(*a, **k) + change


PLANTED: dict[str, tuple[Any, str, Plant, set[str]]] = {
    "a pair left out of the weight": (likelihood._Walker, "pair", no_ratio, {"I47"}),
    "the prior left out of the weight": (likelihood._Walker, "walk", no_prior, {"I47"}),
    "the mean of the weights": (likelihood.ImportanceWeighted, "table", sums, {"I47", "I49"}),
    "the effective size": (
        likelihood.ImportanceWeighted,
        "ess",
        lambda right: property(lambda self: 2 * right.fget(self)),
        {"I48"},
    ),
    "the flow at double speed": (flow.Flow, "_slopes", slopes(2, 1), {"I50"}),
    "the divergence halved": (flow.Flow, "_slopes", slopes(1, 0.5), {"I50", "I52"}),
    "the divergence's sign": (flow.Flow, "_slopes", slopes(1, -1), {"I50", "I52"}),
    "the trace by probes": (flow, "probed_trace", scaled(1.01), {"I51"}),
    "products with the Jacobian": (flow, "_products", scaled(1.5), {"I50", "I51"}),
    "what lies before x_1": (odelikelihood, "_first_latent", no_entropy, {"I52"}),
    "the normaliser of a product": (factors.Measured, "_normal", normaliser(0.1), {"I53", "I55"}),
    "the tilt's normaliser": (factors.Tilt, "multiply", normaliser(0.1), {"I53"}),
    "a product over patterns": (factors, "reweighted", normaliser(0.1), {"I53", "I54", "I56"}),
    "r apart from its product": (factors.Measured, "log_r", added(0.1), {"I53", "I54", "I55"}),
    "the factor of the data": (factors.Measured, "_at_data", added(0.1), {"I53"}),
    "the factor of bits": (factors.Measured, "_at_bits", added(0.1), {"I55"}),
    "Z of a step": (Conditioned, "log_z", added(0.1), {"I55"}),
    "the entropy of a step": (entropy, "_transition_entropy", added(-0.3), {"I57"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_makes_lines_disagree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, plant, caught = PLANTED[name]
    wrong = plant(getattr(module, function))
    monkeypatch.setattr(module, function, wrong)
    if module is flow and hasattr(flows, function):
        monkeypatch.setattr(flows, function, wrong)
    assert disagreeing({k: IDENTITIES[k] for k in caught}) == caught
