r"""A model that was trained elsewhere, as a reverse process of ours, and what had to be assumed.

A code base gives betas and a network ε̂(x_t, i) with integer times i = 0..T−1; time i here is the
latent t = (i + 1)/T, and betas are taken in float64. Its files seldom say everything that a bound
needs. Whatever they leave open takes a default that is named with every result:

    scaling    level j at x = 2j/(n−1) − 1
    levels     n = 256
    edge       σ² of p(x_0|x_1): β̃ of the second step, copied (improved diffusion)
    clip       as the sampler of the checkpoint clips

References:
    Ho, Jain, Abbeel 2020, section 3; Nichol, Dhariwal 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from nelbo.decoders import Constant, Discretized, Edge, Following, Lose, Ratio
from nelbo.errors import InputRefused
from nelbo.interop.scales import SCALINGS, DiscretizedOnScale, Labelled, Scaling
from nelbo.networks.layers import Timed
from nelbo.parameterizations import X0, Epsilon, GaussianParameterization, Mean, Velocity
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Decoder, Reverse
from nelbo.schedules import Tabulated
from nelbo.variances import Between, Posterior, Transition, Variance

Predicts = Literal["epsilon", "x0", "velocity", "mean"]
Variances = Literal["posterior", "transition", "between"]
LEVELS = 256
_PREDICTS: dict[str, type[Epsilon] | type[X0] | type[Velocity]] = {
    "epsilon": Epsilon,
    "x0": X0,
    "velocity": Velocity,
}
_VARIANCES: dict[str, type[Variance]] = {
    "posterior": Posterior,
    "transition": Transition,
    "between": Between,
}


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the user says of a checkpoint; None: what its files say, or else the default.

    Arguments:
        scaling: "symmetric" is x = 2 level/(levels − 1) − 1, "unit" x = level/(levels − 1).
        levels: of the data; 256 by default.
        edge: the decoder's variance: a rule, or the variance itself.
        clip: "scheduler" (as the checkpoint's sampler does), "none", or the size of x̂_0.
        label: the class of a class-conditional network.
    """

    scaling: Scaling | None = None
    levels: int | None = None
    edge: Literal["following", "lose", "ratio"] | float | None = None
    clip: Literal["scheduler", "none"] | float = "scheduler"
    label: int | None = None


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What a checkpoint's own files say of these things; None where they are silent."""

    scaling: Scaling | None = None
    levels: int | None = None
    edge: Literal["following", "lose", "ratio"] | float | None = None
    weights: str | None = None
    clip: bool = False
    """Whether the files say that the model clips as its sampler does."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What a code base says of its diffusion.

    Arguments:
        betas: (T,) in (0, 1), the last may be 1. schedule: its name, for reports.
        predict: what the network predicts. variance: of the reverse steps.
        clip: as its sampler clips x̂_0; None: not at all.
        kept: 0-based numbers of the steps that the grid has; None: all T.
    """

    betas: Tensor
    predict: Predicts = "epsilon"
    variance: Variances = "posterior"
    clip: float | None = None
    schedule: str = "own betas"
    kept: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A checkpoint of another code base.

    Arguments:
        model: the reverse process. times: (N,) its grid. shape: (C, H, W) of an example.
        levels: of the data. scaling: where the levels sit, a key of `SCALINGS`.
        description: what the bound is a bound of, in words.
        assumed: every thing that the files do not say, with the value taken.
    """

    model: Reverse
    times: Tensor
    shape: tuple[int, int, int]
    levels: int
    scaling: Scaling
    description: dict[str, str]
    assumed: dict[str, str] = field(default_factory=dict)


def assemble(
    network: nn.Module,
    chain: Chain,
    shape: tuple[int, int, int],
    assumptions: Assumptions,
    stated: Stated | None = None,
) -> Foreign:
    """A reverse process from a network that takes integer times, and words for what was assumed.

    Arguments:
        network: network(x_t, i, cond), i float32 () or (B,), whole numbers 0..T−1.
        chain: its diffusion. shape: (C, H, W). stated: what the files say.
    Raises:
        InputRefused: betas that are none, or that leave the predicted noise without a meaning.
    """
    stated = Stated() if stated is None else stated
    schedule = _schedule(chain)
    times = schedule.grid() if chain.kept is None else schedule.times(chain.kept)
    scaling = assumptions.scaling or stated.scaling or "symmetric"
    levels = assumptions.levels or stated.levels or LEVELS
    rule = _first(assumptions.edge, stated.edge, "following" if len(times) > 1 else "lose")
    clip = clipping(assumptions, chain.clip)
    if assumptions.label is not None:
        network = Labelled(network, assumptions.label)
    model = Reverse(
        Gaussian(schedule),
        Timed(network, schedule.steps, -1),
        _parameterization(chain, times, clip),
        _decoder(levels, edge_of(rule, times), scaling),
    )
    model.eval().requires_grad_(False)
    words = {
        "process": "Gaussian diffusion",
        "parameterization": chain.predict,
        "variance": chain.variance,
        "decoder": f"discretized, variance {_edge_words(rule)}",
        "grid": f"{_count(len(times), schedule.steps)} latents, {chain.schedule}",
        "clip": "none" if clip is None else f"{clip:g}",
        "parameters": str(sum(p.numel() for p in network.parameters()) or "unknown"),
        "weights": stated.weights or "as stored",
    }
    if assumptions.label is not None:
        words["class"] = str(assumptions.label)
    assumed = _assumed(assumptions, stated, (scaling, levels, rule), clip)
    return Foreign(
        model=model,
        times=times,
        shape=shape,
        levels=levels,
        scaling=scaling,
        description=words,
        assumed=assumed,
    )


def _schedule(chain: Chain) -> Tabulated:
    try:
        schedule = Tabulated(chain.betas)
    except ValueError as error:
        raise InputRefused(f"betas: {error}") from error
    if chain.predict == "epsilon" and float(chain.betas[-1]) == 1:
        raise InputRefused(
            "the last beta is 1, so nothing of the data is left at the last step, and a predicted "
            "noise says nothing of it: the last KL is infinite. Only x0 and v can be measured so"
        )
    return schedule


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def clipping(assumptions: Assumptions, scheduler: float | None) -> float | None:
    """The size to which x̂_0 is clipped; None: not at all."""
    if assumptions.clip == "scheduler":
        return scheduler
    return None if assumptions.clip == "none" else float(assumptions.clip)


def _parameterization(chain: Chain, times: Tensor, clip: float | None) -> GaussianParameterization:
    variance = _VARIANCES[chain.variance]()
    if chain.predict == "mean":
        return Mean(times, variance, clip)
    return _PREDICTS[chain.predict](variance, clip)


def edge_of(rule: str | float, times: Tensor) -> Edge:
    """The decoder's variance by its rule, or as a number.

    Raises:
        InputRefused: a variance that is none, or a copy of a second step where there is one only.
    """
    if not isinstance(rule, str):
        if not 0 < rule < math.inf:
            raise InputRefused(f"a decoder variance of {rule:g}: it must be above 0 and finite")
        return Constant(math.log(rule))
    if rule == "following":
        if len(times) < 2:
            raise InputRefused("a chain of one step has no second variance: take the edge lose")
        return Following(times[1])
    return Ratio() if rule == "ratio" else Lose()


def _decoder(levels: int, edge: Edge, scaling: Scaling) -> Decoder:
    if scaling == "symmetric":
        return Discretized(levels, edge)
    return DiscretizedOnScale(levels, edge, SCALINGS[scaling])


def _edge_words(rule: str | float) -> str:
    return rule if isinstance(rule, str) else f"{rule:g}"


def _count(kept: int, steps: int) -> str:
    return f"{steps}" if kept == steps else f"{kept} of {steps}"


_RULES = {
    "following": "the variance of the second step, copied",
    "lose": "beta_1",
    "ratio": "1/snr of the first step",
}


def _assumed(
    assumptions: Assumptions,
    stated: Stated,
    taken: tuple[Scaling, int, str | float],
    clip: float | None,
) -> dict[str, str]:
    """What the files do not say, each with its value and the option that sets it."""
    scaling, levels, rule = taken
    formula = "2 level" if scaling == "symmetric" else "level"
    shift = " - 1" if scaling == "symmetric" else ""
    variance = _RULES[rule] if isinstance(rule, str) else f"{rule:g}"
    silent: Mapping[str, tuple[Any, str, Any]] = {
        "scaling": (stated.scaling, f"x = {formula}/{levels - 1}{shift}", assumptions.scaling),
        "levels": (stated.levels, f"{levels}", assumptions.levels),
        "edge": (stated.edge, f"decoder variance: {variance}", assumptions.edge),
    }
    rows = {
        name: f"{text} ({_whence(name, given)})"
        for name, (said, text, given) in silent.items()
        if said is None or given is not None
    }
    if assumptions.clip != "scheduler":
        rows["clip"] = f"{'none' if clip is None else f'{clip:g}'} (set by --clip)"
    elif not stated.clip:
        size = "no clipping" if clip is None else f"x_0 to {clip:g}"
        rows["clip"] = f"{size}, as its own sampler does (--clip sets it)"
    if stated.weights is None:
        rows["weights"] = "as stored; whether they are averaged (EMA) is not said"
    return rows


def _whence(name: str, given: object) -> str:
    return f"--{name} sets it" if given is None else f"set by --{name}"
