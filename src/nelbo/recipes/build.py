"""One function per recipe: options in, a complete `Recipe` out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from nelbo.data.augmentation import Affine
from nelbo.data.base import Dataset
from nelbo.data.binarized import binarized
from nelbo.data.cifar import cifar10
from nelbo.data.deadleaves import deadleaves
from nelbo.data.embedded import digits
from nelbo.data.sources import open_path
from nelbo.data.texture import texture
from nelbo.errors import InputRefused, UsageError
from nelbo.estimate import Estimate
from nelbo.evaluation import evaluate
from nelbo.losses import Augmented
from nelbo.networks.heads import LevelHead
from nelbo.randomness import seeded
from nelbo.recipes import combinations
from nelbo.recipes import options as o
from nelbo.recipes.bits import binary_images, heartbeat_recipe, rows_recipe
from nelbo.recipes.datasets import KnownLaw, known_law
from nelbo.recipes.families import name_of
from nelbo.recipes.models import (
    assemble,
    exact_model,
    level_head,
    mlp,
    objective_of,
    parameterization_of,
    schedule_of,
    unet,
)
from nelbo.recipes.recipe import OPTIMUM, TRUTH, Recipe, Reference
from nelbo.reverse import Reverse

PIXEL = "bits/pixel"
BITS = (o.Mnist.bits, o.Mnist.stationary, o.Mnist.bit_schedule)
"""What speaks of bits in the recipe mnist, as it is if it was not typed."""
EXACT_CALLS, EXACT_EXAMPLES, PILOT = 64, 2000, 64
"""With how many calls the exact denoiser is measured, on how many examples, and designed on."""
Pictures = o.Digits | o.DeadLeaves | o.Texture | o.Images | o.Mnist | o.Cifar10


def build(options: o.Options) -> Recipe:
    """The recipe of any options; weights are a function of the seed.

    Raises:
        InputRefused: the data is not what the recipe needs.
        UsageError: options that contradict each other.
    """
    with seeded(options.seed, "weights"):
        if isinstance(options, o.Digits):
            return _images(options, digits(options.validation))
        if isinstance(options, o.Mixture):
            return _mixture(options)
        if isinstance(options, o.Heartbeat):
            return heartbeat_recipe(options)
        if isinstance(options, o.Bits):
            return rows_recipe(options)
        if isinstance(options, o.DeadLeaves | o.Texture):
            return _pictures(options)
        if isinstance(options, o.Vectors):
            return _vectors(options, open_path(options.path, cache=options.cache))
        if isinstance(options, o.Images):
            return _images(
                options, open_path(options.path, size=options.size, cache=options.cache)
            )
        if isinstance(options, o.Mnist):
            return _mnist(options, open_path(options.path, cache=options.cache))
        assert isinstance(options, o.Cifar10)
        return _cifar10(options)


def _mnist(options: o.Mnist, dataset: Dataset) -> Recipe:
    if options.binarize == "none":
        if (options.bits, options.stationary, options.bit_schedule) != BITS:
            names = "--bits, --stationary and --bit-schedule"
            raise UsageError(f"{names} speak of bits: give --binarize as well")
        return _images(options, dataset)
    return binary_images(options, binarized(dataset, options.binarize, options.seed))


def _pictures(options: o.DeadLeaves | o.Texture) -> Recipe:
    """Pictures of the paper, its figures beside them where they are of the same kind."""
    name = "Sohl-Dickstein et al. 2015, table 1"
    if isinstance(options, o.DeadLeaves):
        leaves = deadleaves(
            options.examples,
            seed=options.seed,
            size=options.size,
            radius_min=options.radius_min,
            radius_max=options.radius_max,
        )
        # which radii and levels theirs had is not known
        known = (Reference(f"{name} (other dead leaves)", 1.489, PIXEL),)
        return dataclasses.replace(_images(options, leaves), references=lambda: known)
    channels = 3 if options.color else 1
    crops = texture(options.path, options.size, channels, options.examples, seed=options.seed)
    recipe = _images(options, crops)
    if options.color:
        return recipe
    bark = (Reference(f"{name} (another bark)", -0.55, PIXEL),)
    return dataclasses.replace(recipe, references=lambda: bark)


def _cifar10(options: o.Cifar10) -> Recipe:
    """CIFAR-10; the paper's figure is 5.4 ± 0.2 bits per pixel, not per dimension."""
    known = (Reference("Sohl-Dickstein et al. 2015, table 1", 5.4, PIXEL, 0.2),)
    recipe = _images(options, cifar10(options.path))
    return dataclasses.replace(recipe, references=lambda: known)


def _images(options: Pictures, dataset: Dataset) -> Recipe:
    if dataset.levels is None:
        raise InputRefused(
            f"{dataset.name} holds real vectors, not images: use the recipe vectors"
        )
    times, schedule = _grid(options)
    channels = dataset.shape()[0]
    out = parameterization_of(options, times, dataset.levels).channels(channels)
    smooth = options.predict == "levels" and options.waves is not None
    if smooth:
        out = LevelHead.channels(channels, options.waves or 0)
    network = unet(options, dataset.shape(), out, schedule)
    if smooth:
        network = level_head(network, dataset, options.waves or 0)
    model = assemble(options, dataset.levels, network, times, schedule)
    recipe = _recipe(options, options, dataset, model, times)
    if not options.augment:
        return recipe
    moved = Augmented(objective_of(options, times), Affine(dataset.levels, options.augment))
    return dataclasses.replace(recipe, objective=moved)


def _vectors(options: o.Vectors | o.Mixture, dataset: Dataset, **more: Any) -> Recipe:
    if dataset.levels is not None:
        raise InputRefused(f"{dataset.name} holds images: use the recipe images")
    times, schedule = _grid(options)
    out = parameterization_of(options, times, None).channels(dataset.dims)
    network = mlp(dataset.dims, options.width, options.depth, out, schedule)
    model = assemble(options, None, network, times, schedule)
    return _recipe(options, options, dataset, model, times, **more)


def _mixture(options: o.Mixture) -> Recipe:
    assert isinstance(options, KnownLaw)
    dataset = known_law(options, options.seed)
    times = _grid(options)[0]
    exact = exact_model(options, dataset.scaled_components(), times)
    known = _references(dataset, exact, times, options.seed)
    return _vectors(options, dataset, exact=exact, references=known)


def _references(
    dataset: Dataset, exact: Reverse, times: Tensor, seed: int
) -> Callable[[], tuple[Reference, ...]]:
    """−h of the truth and −L of the exact denoiser on the same grid, on the model's scale.

    The exact denoiser is measured by E L(x) + log q(x), which leaves out how the test examples
    differ from the truth.
    """

    def compute() -> tuple[Reference, ...]:
        assert dataset.truth is not None
        rows = dataset.test[:EXACT_EXAMPLES]
        result = evaluate(
            exact,
            rows,
            times,
            encode=dataset.encode,
            calls=EXACT_CALLS,
            pilot=dataset.train[:PILOT],
            replicates=1 if len(times) <= EXACT_CALLS else None,
            seed=seed,
            offset=dataset.offset(),
        )
        gap = Estimate.of(result.values()["total"] + dataset.truth.log_prob(rows)).bits()
        truth = (dataset.offset() - dataset.truth.entropy) / math.log(2)
        return (
            Reference(OPTIMUM, truth - gap.mean, se=gap.se),
            Reference(TRUTH, truth),
        )

    return compute


def _grid(options: o.Diffusion) -> tuple[Tensor, Any]:
    if options.latents < 1:
        raise UsageError(f"--latents {options.latents}: a chain needs at least one")
    combinations.check(options)
    schedule = schedule_of(options)
    return schedule.grid(options.latents), schedule


def _recipe(
    options: o.Options,
    diffusion: o.Diffusion,
    dataset: Dataset,
    model: Any,
    times: Tensor,
    **more: Any,
) -> Recipe:
    return Recipe(
        name=name_of(options),
        options=options,
        dataset=dataset,
        model=model,
        times=times,
        objective=objective_of(diffusion, times),
        description=_words(diffusion, model),
        **more,
    )


def _words(options: o.Diffusion, model: Any) -> dict[str, str]:
    """What the bound is a bound of, in words."""
    ends = f"log-SNR {options.logsnr_max:g} to {options.logsnr_min:g}"
    schedule = ends if options.schedule in ("logsnr", "learned") else options.schedule
    learned = ", betas learned from there" if options.learn_betas else ""
    learned = ", learned from there" if options.schedule == "learned" else learned
    parameters = sum(p.numel() for p in cast(Any, model).network.parameters())
    return {
        "process": "Gaussian diffusion",
        "parameterization": options.predict,
        "variance": options.variance,
        "decoder": _decoder_words(options),
        "grid": f"{options.latents} latents, {schedule}{learned}",
        "clip": "none" if options.clip_x0 is None else f"{options.clip_x0:g}",
        "objective": options.objective,
        "parameters": f"{parameters}",
    }


def _decoder_words(options: o.Diffusion) -> str:
    if options.decoder == "fixed":
        return "fixed edge step, no parameters"
    if options.decoder == "mass":
        return "mass"
    return f"{options.decoder}, variance {options.edge}"
