"""One function per recipe: options in, a complete `Recipe` out."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from torch import Tensor

from nelbo.data.augmentation import Affine
from nelbo.data.base import Dataset
from nelbo.data.cifar import cifar10
from nelbo.data.embedded import digits
from nelbo.data.sources import open_path
from nelbo.data.toys import swissroll
from nelbo.errors import InputRefused, UsageError
from nelbo.networks.heads import LevelHead
from nelbo.objectives import Augmented
from nelbo.randomness import seeded
from nelbo.recipes import options as o
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
from nelbo.recipes.recipe import Recipe


def build(options: o.Options) -> Recipe:
    """The recipe of any options; weights are a function of the seed.

    Raises:
        InputRefused: the data is not what the recipe needs.
        UsageError: options that contradict each other.
    """
    with seeded(options.seed, "weights"):
        if isinstance(options, o.Digits):
            return _images(options, digits(options.validation))
        if isinstance(options, o.SwissRoll):
            return _swissroll(options)
        if isinstance(options, o.Vectors):
            return _vectors(options, open_path(options.path))
        if isinstance(options, o.Images):
            return _images(options, open_path(options.path, size=options.size))
        if isinstance(options, o.Mnist):
            return _images(options, open_path(options.path))
        assert isinstance(options, o.Cifar10)
        return _images(options, cifar10(options.path))


def _images(options: o.Digits | o.Images | o.Mnist | o.Cifar10, dataset: Dataset) -> Recipe:
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


def _vectors(options: o.Vectors | o.SwissRoll, dataset: Dataset, **more: Any) -> Recipe:
    if dataset.levels is not None:
        raise InputRefused(f"{dataset.name} holds images: use the recipe images")
    times, schedule = _grid(options)
    out = parameterization_of(options, times, None).channels(dataset.dims)
    network = mlp(dataset.dims, options.width, options.depth, out)
    model = assemble(options, None, network, times, schedule)
    return _recipe(options, options, dataset, model, times, **more)


def _swissroll(options: o.SwissRoll) -> Recipe:
    dataset = swissroll(options.examples, seed=options.seed)
    exact = exact_model(options, dataset.scaled_components(), _grid(options)[0])
    return _vectors(options, dataset, exact=exact)


def _grid(options: o.Diffusion) -> tuple[Tensor, Any]:
    if options.latents < 1:
        raise UsageError(f"--latents {options.latents}: a chain needs at least one")
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
        name=o.name_of(options),
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
    schedule = ends if options.schedule == "logsnr" else options.schedule
    parameters = sum(p.numel() for p in cast(Any, model).network.parameters())
    return {
        "process": "Gaussian diffusion",
        "parameterization": options.predict,
        "variance": options.variance,
        "decoder": options.decoder
        if options.decoder == "mass"
        else f"{options.decoder}, variance {options.edge}",
        "grid": f"{options.latents} latents, {schedule}",
        "clip": "none" if options.clip_x0 is None else f"{options.clip_x0:g}",
        "objective": options.objective,
        "parameters": f"{parameters}",
    }
