"""A checkpoint of another code base and the user's data as a subject that can be measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from nelbo import console
from nelbo.data.base import Dataset
from nelbo.data.part import pieces
from nelbo.data.sources import open_path
from nelbo.errors import InputRefused, UsageError
from nelbo.interop import diffusers, openai
from nelbo.interop.foreign import Assumptions, Foreign
from nelbo.interop.weights import PICKLES, SUFFIX
from nelbo.recipes.recipe import Subject


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a foreign checkpoint lies, and what the user says of it.

    Arguments:
        path: its folder or file. flags: JSON file with the flags of its training.
        trust_pickle: whether a pickle may be opened.
    """

    path: Path
    assumptions: Assumptions = Assumptions()
    trust_pickle: bool = False
    flags: Path | None = None

    def read(self) -> Foreign:
        """The model.

        Raises:
            InputRefused: what is there is not computed, or does not fit.
            UsageError: flags for something that needs none, or none for a file that needs them.
        """
        if self.path.is_file():
            if self.flags is None:
                raise UsageError(
                    f"{self.path} says nothing of its network: add --flags FLAGS.json, the flags "
                    "that it was trained with"
                )
            return openai.read(self.path, self.flags, self.assumptions, self.trust_pickle)
        if self.flags is not None:
            raise UsageError("--flags go with a .pt file; a diffusers directory holds its own")
        return diffusers.read(self.path, self.assumptions, trust_pickle=self.trust_pickle)


class Unit(Dataset):
    """Images as models see them that were trained on [0, 1]: level/(levels - 1)."""

    def encode(self, y: Tensor) -> Tensor:
        return (y.double() / (self._levels() - 1)).float()

    def decode(self, x: Tensor) -> Tensor:
        return super().decode(2 * x - 1)


def is_foreign(path: Path) -> bool:
    """Whether a path holds a checkpoint of another code base, and no run."""
    if path.is_file():
        return path.suffix in (SUFFIX, *PICKLES)
    return not (path / "recipe.json").exists() and diffusers.is_directory(path)


def subject(
    checkpoint: Checkpoint, data: Path | None, size: int | None = None
) -> tuple[Subject, dict[str, str]]:
    """The model on the user's data, or on none, and what was assumed.

    Arguments:
        data: anything that `open_path` reads; None: nothing (for samples).
        size: to which images are cropped and resized.
    Raises:
        InputRefused: the checkpoint or the data is refused, or they do not fit each other.
    """
    foreign = checkpoint.read()
    if data is None:
        dataset = _none(foreign, checkpoint.path)
    else:
        dataset = _fitted(foreign, open_path(data, size=size), checkpoint.path, data, size)
    found = Subject(
        dataset=dataset, model=foreign.model, times=foreign.times, description=foreign.description
    )
    return found, foreign.assumed


def _none(foreign: Foreign, path: Path) -> Dataset:
    """No examples, in the shape and the levels of the model."""
    rows = torch.empty(0, *foreign.shape, dtype=torch.uint8)
    zero = torch.zeros((), dtype=torch.float64)
    plain = Dataset(path.name, rows, rows, rows, foreign.levels, zero, 1.0, {})
    return _scaled(foreign, plain)


def _fitted(
    foreign: Foreign, dataset: Dataset, path: Path, data: Path, size: int | None
) -> Dataset:
    if dataset.levels is None:
        raise InputRefused(f"{data}: holds real vectors, and {path} is a model of images")
    folder = data.is_dir() and dataset.name == data.resolve().name
    if size is not None and not folder:
        raise UsageError(f"--size is for a folder of images, which {data} is not")
    if dataset.shape() != foreign.shape:
        raise InputRefused(_misfit(foreign.shape, dataset.shape(), path, data, folder))
    both = (dataset.train, dataset.test)
    most = max(int(rows.max()) for part in both for rows in pieces(part))
    if dataset.levels < foreign.levels or most >= foreign.levels:
        have = f"{dataset.levels} levels" if dataset.levels < foreign.levels else f"level {most}"
        raise InputRefused(
            f"{data}: has {have}, {path} is read with {foreign.levels} levels; set --levels"
        )
    for warning in dataset.record.get("warnings", []):
        # some warnings are of the levels of the file, which may have been set aside
        if dataset.levels == foreign.levels:
            console.say(f"{data}: {warning}")
    return _scaled(foreign, dataclasses.replace(dataset, levels=foreign.levels))


def _scaled(foreign: Foreign, dataset: Dataset) -> Dataset:
    if foreign.scaling == "symmetric":
        return dataset
    return Unit(**{f.name: getattr(dataset, f.name) for f in dataclasses.fields(Dataset)})


def _misfit(
    model: tuple[int, ...], data: tuple[int, ...], path: Path, where: Path, folder: bool
) -> str:
    sizes = f"{_by(data)} images in {where}, but {path} is a model of {_by(model)}"
    if data[0] != model[0] or model[1] != model[2]:
        return f"{sizes}: convert the images (channels x height x width)"
    if folder:
        return f"{sizes}: add --size {model[1]} to crop and resize them"
    return f"{sizes}: resize the array, or give a folder of images and --size {model[1]}"


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
