"""What is compared: data that nothing was trained on, and samplers of every kind.

A run's model is drawn from as its bound describes it: the same object is walked and bounded, so
that what is certified of the samples and what is bounded speak of one law. Data of a known law are
drawn anew; the data of a run are its test part, and its other parts may train classifiers only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from nelbo.commands import Compare, Evaluate, Sample
from nelbo.data.base import Dataset
from nelbo.data.bitrows import bitrows
from nelbo.data.sources import open_path
from nelbo.errors import InputRefused, UsageError
from nelbo.interop.modules import function
from nelbo.recipes import foreign
from nelbo.recipes.recipe import Subject
from nelbo.samplers import Ancestral
from nelbo.walks import fitting
from nelbo.walks.chains import Means, centres, draws
from nelbo.walks.played import is_game, open_game
from nelbo.walks.sample import sampler_of
from nelbo.walks.stored import open_checkpoint

OWN = "data"


@dataclass(frozen=True)
class Opponent:
    """Something that samples come from.

    Arguments:
        kind: run, checkpoint, array or function. family: game, diffusion or none.
        fakes: n -> (n, *shape) stored rows, or the rows themselves.
        subject: of a chain, the very model and grid that `fakes` walks; None where there is no
            bound, with `unbounded` saying why.
        judge: the game's own discriminator, on the model's scale.
        means: n -> the means of a chain's normal decoder, of which `fakes` adds the noise.
        data: what the run was trained on.
    """

    name: str
    kind: str
    family: str
    fakes: Callable[[int], Tensor] | Tensor
    about: dict[str, Any] = field(default_factory=dict)
    subject: Subject | None = None
    unbounded: str = ""
    judge: nn.Module | None = None
    means: Callable[[int], Means | None] | None = None
    data: Dataset | None = None
    folder: Path | None = None

    def draw(self, count: int) -> Tensor:
        """Exactly `count` rows, or all of an array that has fewer."""
        return self.fakes[:count] if isinstance(self.fakes, Tensor) else self.fakes(count)


def opponents(options: Compare, device: str) -> list[Opponent]:
    """Everything that --fakes name.

    Raises:
        InputRefused: nothing known is there. UsageError: options that do not fit it.
    """
    found = [_opponent(options, Path(path), device) for path in options.fakes]
    names = [one.name for one in found]
    numbered = [f"{n} ({k + 1})" if names.count(n) > 1 else n for k, n in enumerate(names)]
    return [dataclasses.replace(o, name=n) for o, n in zip(found, numbered, strict=True)]


def run_sampler(
    path: Path | str, checkpoint: str = "newest", device: str = "cpu"
) -> Callable[[int], Tensor]:
    """n -> (n, *shape) stored rows of a run of either family, for `nelbo.certificate.certify`.

    A diffusion model is walked over its own grid, decoder included: the law that its bound
    describes. Draws come from torch's global generator.

    Raises:
        InputRefused: no run, no valid checkpoint, or data that changed.
    """
    options = Compare(real=OWN, fakes=(str(path),), checkpoint=checkpoint, quiet=True)
    found = _opponent(options, Path(path), device).fakes
    if isinstance(found, Tensor):
        raise InputRefused(f"{path}: holds samples, not a run; pass the path itself to certify")
    return found


def _opponent(options: Compare, path: Path, device: str) -> Opponent:
    if ":" in path.name and path.name.partition(":")[0].endswith(".py"):
        return Opponent(path.name, "function", "none", function(str(path)), unbounded="a function")
    if is_game(path):
        return _game(options, path, device)
    if foreign.is_foreign(path) or (path / "recipe.json").is_file():
        return _chain(options, path, device)
    rows = read(path, options.size).all
    unbounded = "samples from a file have no bound"
    return Opponent(path.name, "array", "none", rows, {"path": str(path)}, unbounded=unbounded)


def _game(options: Compare, path: Path, device: str) -> Opponent:
    for given, name in ((options.steps, "--steps"), (options.sampler, "--sampler")):
        if given not in (None, "ancestral"):
            raise UsageError(f"{name} is for chains; {path} is a game, which has no steps")
    played = open_game(path, options.checkpoint, device)
    return Opponent(
        path.resolve().name,
        "run",
        "game",
        played.sampler(),
        {"path": str(path), "step": played.step, "weights": "ema", **played.recipe.description},
        unbounded="a generator has no likelihood",
        judge=played.recipe.game.discriminator,
        data=played.recipe.dataset,
        folder=path,
    )


def _chain(options: Compare, path: Path, device: str) -> Opponent:
    data = Path(options.real) if foreign.is_foreign(path) else None
    if data is not None and not data.exists():
        raise UsageError(
            f"{path} comes without data: name a path as REAL, to what it was trained on"
        )
    asked = Evaluate(
        run=path,
        checkpoint=options.checkpoint,
        data=data,
        size=options.size if data else None,
        elsewhere=options.elsewhere,
    )
    stored = open_checkpoint(asked, device)
    grid = Sample(
        run=path,
        sampler=options.sampler,
        steps=options.steps,
        grid=options.grid,
        variance=options.variance,
        seed=options.seed,
        quiet=options.quiet,
    )
    model, times = fitting.sampled(stored, grid, device)
    subject = dataclasses.replace(stored.subject, model=model, times=times)
    way = sampler_of(options.sampler, 0.0)
    same = isinstance(way, Ancestral)
    words = f"{options.sampler}, {len(times)} latents, variance {options.variance}"
    return Opponent(
        path.resolve().name,
        "run" if stored.assumed is None else "checkpoint",
        "diffusion",
        draws(subject, way, device, options.quiet),
        {"path": str(path), "step": stored.step, "weights": "ema", "sampler": words},
        subject=subject if same else None,
        means=centres(subject, device, options.quiet) if same else None,
        unbounded="" if same else f"the bound is not of the {options.sampler} sampler",
        data=stored.subject.dataset if stored.assumed is None else None,
        folder=path if stored.assumed is None else None,
    )


def read(path: Path, size: int | None) -> Dataset:
    """What a path holds; whole numbers in rows are bits."""
    if path.suffix == ".npy" and path.is_file():
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim == 2 and array.dtype.kind in "bui":
            return bitrows(path)
    return open_path(path, size=size)
