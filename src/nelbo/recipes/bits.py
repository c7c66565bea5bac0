"""Recipes of bits: Bernoulli diffusion on data of zeros and ones, in rows or pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nelbo.binary import BernoulliDecoder, BinaryParameterization, Context, Flip, Logits
from nelbo.data.base import Dataset
from nelbo.data.bitrows import bitrows
from nelbo.data.heartbeat import heartbeat, patterns
from nelbo.data.part import pieces
from nelbo.decoders import EdgeFixed
from nelbo.errors import UsageError
from nelbo.objectives import Vlb
from nelbo.processes.bernoulli import Bernoulli
from nelbo.recipes.combinations import check_times
from nelbo.recipes.families import name_of
from nelbo.recipes.groups import BitDiffusion
from nelbo.recipes.models import drawn, focus_of, mlp, schedule_of, unet
from nelbo.recipes.options import Bits, Heartbeat, Mnist, Options
from nelbo.recipes.patterns import PatternPosterior, expected_terms, number_of_states
from nelbo.recipes.recipe import OPTIMUM, TRUTH, Recipe, Reference
from nelbo.reverse import Decoder, Reverse

MOST_STATES = 20_000_000
"""States times steps up to which the exact optimum is computed; this many take two minutes."""
PAPER = {"length": 20, "period": 5, "stationary": 0.2, "latents": 2000, "schedule": "harmonic"}
"""The set-up of the paper; its table of L_null shows that the rate was .2."""
GREY_ONLY = (
    *("predict", "learn_betas", "variance", "decoder", "edge", "clip_x0", "objective"),
    *("waves", "augment", "fourier", "schedule"),
)
"""Options of an image recipe that say nothing of bits."""


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


def rate_of(options: BitDiffusion, dataset: Dataset) -> float:
    """Pi: the number of the options, or the share of ones in the training part."""
    if options.stationary == "data":
        ones = sum(int(rows.sum()) for rows in pieces(dataset.train))
        return ones / (len(dataset.train) * dataset.dims)
    return options.stationary


def bit_model(options: BitDiffusion, network: nn.Module, times: Tensor, rate: float) -> Reverse:
    """Put the parts together."""
    process = Bernoulli(schedule_of(options), rate)
    return Reverse(process, network, bit_parameterization(options, times), bit_decoder(options))


def words(options: BitDiffusion, network: nn.Module, rate: float) -> dict[str, str]:
    """What the bound is a bound of, in words."""
    fixed = "fixed edge step, no parameters"
    return {
        "process": f"Bernoulli diffusion, stationary rate {rate:.4g}",
        "parameterization": options.predict,
        "variance": "none (bits)",
        "decoder": fixed if options.decoder == "fixed" else "bernoulli",
        "grid": f"{options.latents} latents, {options.schedule}",
        "clip": "none",
        "objective": "vlb",
        "parameters": f"{sum(p.numel() for p in network.parameters())}",
    }


def bit_recipe(
    options: Options, chain: BitDiffusion, dataset: Dataset, network: nn.Module, **more: Any
) -> Recipe:
    """A recipe of any data of bits.

    Arguments:
        options: of the run. chain: those of them that make the Bernoulli diffusion.
        network: gives as many values as there are bits. more: further fields of the recipe.
    """
    check_times(chain)
    times = schedule_of(chain).grid(chain.latents)
    rate = rate_of(chain, dataset)
    return Recipe(
        name=name_of(options),
        options=options,
        dataset=dataset,
        model=bit_model(chain, network, times, rate),
        times=times,
        objective=drawn(chain, Vlb(times, focus_of(chain, times))),
        description=words(chain, network, rate),
        **more,
    )


def rows_recipe(options: Bits) -> Recipe:
    """Rows of bits from a file, with a residual perceptron."""
    dataset = bitrows(options.path)
    network = mlp(dataset.dims, options.width, options.depth, dataset.dims)
    return bit_recipe(options, options, dataset, network)


def binary_images(options: Mnist, dataset: Dataset) -> Recipe:
    """Pictures of bits, with a U-Net.

    Raises:
        UsageError: options that only mean something for grey levels.
    """
    refuse_grey_options(options)
    chain = BitDiffusion(
        schedule=options.bit_schedule,
        logsnr_max=options.logsnr_max,
        logsnr_min=options.logsnr_min,
        latents=options.latents,
        focus=options.focus,
        times=options.times,
        stationary=options.stationary,
        predict=options.bits,
    )
    shape = dataclasses.replace(options, fourier=())
    network = unet(shape, dataset.shape(), dataset.shape()[0], schedule_of(chain))
    return bit_recipe(options, chain, dataset, network)


def refuse_grey_options(options: Mnist) -> None:
    """Nothing that was typed is ignored in silence."""
    defaults = {f.name: f.default for f in dataclasses.fields(options)}
    typed = [k for k in GREY_ONLY if getattr(options, k) != defaults[k]]
    if typed:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        raise UsageError(
            f"--binarize leaves no grey levels, for which {names} would be: leave out"
        )


def heartbeat_recipe(options: Heartbeat) -> Recipe:
    """The binary heartbeat, with the exact model beside it."""
    dataset = heartbeat(options.length, options.period, seed=options.seed)
    times = schedule_of(options).grid(options.latents)
    network = mlp(dataset.dims, options.width, options.depth, dataset.dims)
    more = {"exact": exact_heartbeat(options), "references": references(options, dataset, times)}
    return bit_recipe(options, options, dataset, network, **more)


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
            found.append(Reference(OPTIMUM, -float(terms.sum()) / math.log(2)))
        assert dataset.truth is not None
        return (*found, Reference(TRUTH, -dataset.truth.entropy / math.log(2)))

    return compute
