"""Does conditioning help? Log-loss of the lower half of images, given the upper half and not.

    python benchmarks/inpainting.py RUN [--images 16] [--draws 32] [--particles 8] [--steps 100]

For each test image the upper half is observed. Each draw comes from a population of particles of
its own, and each pixel of the lower half is predicted by the decoder's masses of the particles,
averaged over all draws and mixed with one uniform pseudo-observation: (D p_j + 1/n)/(D + 1) for D
draws. As many unconditioned draws, treated alike, give the comparison; both see the same images,
so that the difference has an error of its own.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from nelbo.conditioning import Observed, Particles, posterior_samples
from nelbo.distributions import level_of
from nelbo.estimate import Estimate
from nelbo.recipes.recipe import Recipe
from nelbo.walks.conditions import grain_of, moments_of
from nelbo.walks.stored import open_run


def loss(found: Particles, x: Tensor, draws: int, levels: int) -> Tensor:
    """(n, *shape) nats of each pixel under the smoothed average of the draws of its image."""
    mass = found.predictive().unflatten(1, (len(x), draws)).mean(2)
    smooth = (draws * mass + 1 / levels) / (draws + 1)
    return -smooth.gather(0, level_of(x, levels)[None])[0].log()


def losses(
    recipe: Recipe, x: Tensor, mask: Tensor, draws: int, particles: int, steps: int, seed: int
) -> tuple[Tensor, Tensor, Particles]:
    """(n,) nats per held-out pixel with and without the condition, and the particles with it."""
    levels = recipe.dataset.levels
    assert levels is not None
    times = recipe.model.process.schedule.grid(steps)
    many = x.repeat_interleave(draws, 0)
    factor = Observed(many, mask, moments_of(recipe.dataset), grain_of(recipe.dataset))
    given = posterior_samples(recipe.model, factor, times, particles, seed=seed)
    nothing = Observed(many, torch.zeros_like(mask))
    alone = posterior_samples(recipe.model, nothing, times, 1, seed=seed + 1)
    held = [loss(found, x, draws, levels)[:, ~mask].mean(1) for found in (given, alone)]
    return held[0], held[1], given


def main() -> None:
    """Open the run, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    for name, value in (("images", 16), ("draws", 32), ("particles", 8), ("steps", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report(open_run(options.run).recipe, options)


def report(recipe: Recipe, options: argparse.Namespace) -> None:
    """Print both losses, their difference and its error, in bits per pixel."""
    x = recipe.dataset.encode(recipe.dataset.test[: options.images])
    mask = torch.zeros(x.shape[1:], dtype=torch.bool)
    mask[:, : mask.shape[1] // 2] = True
    settings = (options.draws, options.particles, options.steps, options.seed)
    given, alone, found = losses(recipe, x, mask, *settings)
    for name, values in (("given", given), ("not given", alone), ("gain", alone - given)):
        estimate = Estimate.of(values / math.log(2))
        print(f"{name:9} {estimate.mean:.3f} ± {estimate.se:.3f} bits per held-out pixel")
    print(
        f"{options.images} images, {options.draws} draws of {options.particles} particles, "
        f"{options.steps} steps; effective sample size {float(found.ess[-1].median()):.1f}"
    )


if __name__ == "__main__":
    main()
