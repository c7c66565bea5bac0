"""Samples of a game: draws from its averaged generator, beside real data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from nelbo.commands import Sample
from nelbo.console import Meter
from nelbo.errors import UsageError
from nelbo.randomness import seeded
from nelbo.walks.played import Played, is_game, open_game
from nelbo.walks.sample import free, write_beside
from nelbo.walks.stored import device_of

COUNT, BATCH = 64, 256
UNDERSTOOD = {"run", "n", "out", "checkpoint", "seed", "device", "threads", "json", "quiet"}
"""Options that mean something for a generator; every other one is of a walk back through noise."""


def asked(options: Sample) -> bool:
    """Whether the run is a game."""
    return is_game(options.run)


def run(options: Sample) -> None:
    """`nelbo sample` of a game: open, draw, write, print where."""
    refuse_walks(options)
    played = open_game(options.run, options.checkpoint, device_of(options.device))
    name = f"generator-step{played.step:08d}-seed{options.seed}"
    folder = free(options.out, played.directory.samples / name)
    samples = draw(played, options.n or COUNT, options.seed, options.quiet)
    paths = write_beside(folder, played.recipe.dataset, samples)
    about = {"schema": 1, "n": len(samples), "sampler": "generator", "seed": options.seed}
    value = {**about, "step": played.step, **paths}
    print(json.dumps(value) if options.json else "\n".join(paths.values()))


def refuse_walks(options: Sample) -> None:
    """Nothing that was typed is ignored in silence.

    Raises:
        UsageError: an option that speaks of steps, noise or conditions.
    """
    plain = Sample(run=Path())
    names = [f.name for f in dataclasses.fields(Sample) if f.name not in UNDERSTOOD]
    typed = [name for name in names if getattr(options, name) != getattr(plain, name)]
    if typed:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        raise UsageError(
            f"{options.run} is a game, whose generator makes a sample in one call, without steps, "
            f"noise to take off or conditions: leave out {words}"
        )


def draw(played: Played, count: int, seed: int, quiet: bool = True) -> Tensor:
    """`count` samples as data are stored.

    A sample is a function of (seed, batch number), not of how many are asked for.
    """
    sampler, parts = played.sampler(BATCH), []
    with Meter("sample", -(-count // BATCH), "batches", quiet) as meter:
        for number in range(-(-count // BATCH)):
            with seeded(seed, "sample", number):
                parts.append(sampler(BATCH))
            meter.update(number + 1)
    return torch.cat(parts)[:count]
