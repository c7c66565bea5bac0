"""Recipes of bits: Bernoulli diffusion on data of zeros and ones."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from nelbo.binary import BernoulliDecoder, BinaryParameterization, Context, Flip, Logits
from nelbo.data.base import Dataset
from nelbo.data.heartbeat import heartbeat, patterns
from nelbo.decoders import EdgeFixed
from nelbo.errors import UsageError
from nelbo.objectives import Vlb
from nelbo.processes.bernoulli import Bernoulli
from nelbo.recipes.groups import BitDiffusion
from nelbo.recipes.models import focus_of, mlp, schedule_of
from nelbo.recipes.options import Heartbeat, name_of
from nelbo.recipes.patterns import PatternPosterior, expected_terms, number_of_states
from nelbo.recipes.recipe import Recipe, Reference
from nelbo.reverse import Decoder, Reverse

MOST_STATES = 20_000_000
"""States times steps up to which the exact optimum is computed; this many take two minutes."""
PAPER = {"length": 20, "period": 5, "stationary": 0.2, "latents": 2000, "schedule": "harmonic"}
"""The set-up of the paper; its table of L_null shows that the rate was .2."""


def bit_parameterization(options: BitDiffusion, times: Tensor) -> BinaryParameterization:
    """What the network predicts.

    Raises:
        UsageError: flips of a chain without steps.
    """
    if options.predict == "flip":
        if len(times) < 2:
            raise UsageError("--predict flip needs two latents; take --predict logits")
        return Flip(times)
    return Context() if options.predict == "context" else Logits()


def bit_decoder(options: BitDiffusion) -> Decoder:
    """p(x_0|x_1)."""
    return EdgeFixed() if options.decoder == "fixed" else BernoulliDecoder()


def bit_model(options: BitDiffusion, network: nn.Module, times: Tensor) -> Reverse:
    """Put the parts together."""
    process = Bernoulli(schedule_of(options), options.stationary)
    return Reverse(process, network, bit_parameterization(options, times), bit_decoder(options))


def words(options: BitDiffusion, network: nn.Module) -> dict[str, str]:
    """What the bound is a bound of, in words."""
    fixed = "fixed edge step, no parameters"
    return {
        "process": f"Bernoulli diffusion, stationary rate {options.stationary:g}",
        "parameterization": options.predict,
        "variance": "none (bits)",
        "decoder": fixed if options.decoder == "fixed" else "bernoulli",
        "grid": f"{options.latents} latents, {options.schedule}",
        "objective": "vlb",
        "parameters": f"{sum(p.numel() for p in network.parameters())}",
    }


def heartbeat_recipe(options: Heartbeat) -> Recipe:
    """The binary heartbeat, with the exact model beside it."""
    dataset = heartbeat(options.length, options.period, seed=options.seed)
    times = schedule_of(options).grid(options.latents)
    network = mlp(dataset.dims, options.width, options.depth, dataset.dims)
    model = bit_model(options, network, times)
    return Recipe(
        name=name_of(options),
        options=options,
        dataset=dataset,
        model=model,
        times=times,
        objective=Vlb(times, focus_of(options, times)),
        exact=exact_heartbeat(options),
        description=words(options, network),
        references=references(options, dataset, times),
    )


def exact_heartbeat(options: Heartbeat) -> Reverse:
    """The best kernels that factorise over bits, with the decoder of the options."""
    process = Bernoulli(schedule_of(options), options.stationary)
    known = patterns(options.length, options.period)
    return Reverse(process, PatternPosterior(known, process), Logits(), bit_decoder(options))


def references(
    options: Heartbeat, dataset: Dataset, times: Tensor
) -> Callable[[], tuple[Reference, ...]]:
    """The paper's figure where the set-up is the paper's, the exact optimum, and the truth."""

    def compute() -> tuple[Reference, ...]:
        found = []
        if options.decoder == "fixed" and all(getattr(options, k) == v for k, v in PAPER.items()):
            found.append(Reference("Sohl-Dickstein et al. 2015, table 1", -2.414))
        if number_of_states(options.length, options.period) * len(times) <= MOST_STATES:
            exact = exact_heartbeat(options).double()
            terms = expected_terms(exact, options.length, options.period, times)
            found.append(
                Reference("exact optimum of this set-up", -float(terms.sum()) / math.log(2))
            )
        assert dataset.truth is not None
        return (*found, Reference("truth", -dataset.truth.entropy / math.log(2)))

    return compute
