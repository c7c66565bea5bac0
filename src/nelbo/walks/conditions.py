"""What a user observed: pictures and arrays read as a condition on a model's samples.

A picture is of the model's size and is never resized. Its 0..255 become the model's levels; a mask
is white where a pixel is known and black where it is not. An .npy array holds the data's own units
(levels, or the numbers of a vector), and NaN where nothing is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nelbo import console
from nelbo.commands import Sample
from nelbo.conditioning import Factor, Moments, Noisy, Observed
from nelbo.data.base import Dataset
from nelbo.data.decoding import Reader
from nelbo.data.files import existing_file, reading
from nelbo.data.images import PIXEL_LIMIT
from nelbo.errors import InputRefused, UsageError

WHITE = 128
"""Mask pixels from here on are white."""
ENOUGH = 10_000
"""Training examples whose mean and variance widen a condition."""


@dataclass(frozen=True)
class Condition:
    """A condition on one example.

    Arguments:
        factor: on the model's scale.
        given: (*shape) on the model's scale; 0 where unknown.
        mask: (*shape) bool, known.
        kind: "observe" or "denoise".
        offset: nats to add to the log evidence for the units of the file.
    """

    factor: Factor
    given: Tensor
    mask: Tensor
    kind: str
    offset: float


@dataclass(frozen=True)
class Values:
    """What a file holds: (*shape) float64 in units of `step` from `low`, NaN where unknown.

    On the model's scale a value is low + step·value, elementwise.
    """

    numbers: Tensor
    low: Tensor
    step: Tensor

    @property
    def scaled(self) -> Tensor:
        """(*shape) on the model's scale."""
        return self.low + self.step * self.numbers


def check(options: Sample) -> None:
    """Refuse options that contradict each other, before anything is read.

    Raises:
        UsageError: the message says what to type.
    """
    if options.observe is not None and options.denoise is not None:
        raise UsageError("--observe and --denoise are two conditions: take one of them")
    if options.hole is not None and (options.mask or options.denoise):
        raise UsageError(
            "--hole is a mask of its own, of --observe or a test image: give it alone"
        )
    if options.mask is not None and options.observe is None:
        raise UsageError("--mask says what of --observe IMAGE is known: give both")
    if (options.noise is None) != (options.denoise is None):
        raise UsageError("--denoise IMAGE and --noise S (its standard deviation) go together")
    if options.noise is not None and not 0 < options.noise < math.inf:
        raise UsageError(f"--noise {options.noise:g}: it must be above 0")
    if options.particles < 1:
        raise UsageError(f"--particles {options.particles}: it must be at least 1")
    if options.sampler != "ancestral":
        raise UsageError(
            f"--sampler {options.sampler} has no kernels that a condition could multiply: leave "
            "it out, or take --sampler ancestral"
        )


def source(options: Sample) -> Path:
    """The file that is the condition; a name for the first test image."""
    return options.observe or options.denoise or Path("test0")


def condition_of(options: Sample, dataset: Dataset) -> Condition:
    """Read the files that the options name.

    Raises:
        InputRefused: a file that cannot be read, does not fit the model, or says nothing.
        UsageError: a picture without a mask.
    """
    path = source(options)
    if options.observe is None and options.denoise is None:
        values = _in_units(dataset.test[0].double(), dataset, path)
    else:
        values = values_of(path, dataset)
    mask = ~values.numbers.isnan()
    if options.hole is not None:
        mask = mask & _around(options.hole, dataset)
    elif options.mask is not None:
        mask = mask & _mask(options.mask, dataset)
    elif options.observe is not None and bool(mask.all()):
        raise UsageError(
            f"--observe {path}: all of it is known; give --mask IMAGE (white where known), or an "
            ".npy array with NaN where unknown"
        )
    _refuse_trivial(options, mask)
    if options.noise is not None:
        return _noisy(values, mask, options.noise, dataset)
    return _observed(values, mask, dataset, path)


def moments_of(dataset: Dataset) -> Moments:
    """Mean and variance of each dimension of the training data on the model's scale.

    A condition is widened by them. They change how even the weights are, not what is sampled. The
    variance is at least that of rounding to a level; a bit's rate is that with one 0 and one 1
    more.
    """
    x = dataset.encode(dataset.train[:ENOUGH]).double()
    if dataset.binary:
        return (x.sum(0) + 1) / (len(x) + 2), torch.ones(())
    top = 1e3 if dataset.levels is None else dataset.levels - 1
    return x.mean(0), x.var(0).clamp(min=(2 / top) ** 2 / 12)


def grain_of(dataset: Dataset) -> float:
    """Distance of neighbouring levels on the model's scale; 0 for real numbers and bits."""
    return 0.0 if dataset.levels is None or dataset.binary else 2 / (dataset.levels - 1)


def _noisy(values: Values, mask: Tensor, noise: float, dataset: Dataset) -> Condition:
    step = values.step.expand(values.numbers.shape)
    given = torch.where(mask, values.scaled, torch.zeros_like(values.numbers))
    factor = Noisy(given[None], noise * step, mask, moments_of(dataset), grain_of(dataset))
    offset = float(step[mask].log().sum())
    return Condition(factor, given.float(), mask, "denoise", offset)


def _observed(values: Values, mask: Tensor, dataset: Dataset, path: Path) -> Condition:
    numbers = torch.where(mask, values.numbers, torch.zeros_like(values.numbers))
    offset = 0.0
    if dataset.levels is None:
        given = torch.where(mask, values.scaled, torch.zeros_like(numbers)).float()
        offset = float(values.step.expand(mask.shape)[mask].log().sum())
    else:
        levels = _on_levels(values, mask, dataset, path)
        given = torch.where(mask, dataset.encode(levels[None])[0], 0.0)
    factor = Observed(given[None], mask, moments_of(dataset), grain_of(dataset))
    return Condition(factor, given, mask, "observe", offset)


def _on_levels(values: Values, mask: Tensor, dataset: Dataset, path: Path) -> Tensor:
    """The nearest levels (*shape) int64; a picture that has others is said to be rounded."""
    low, high = dataset.encode(torch.tensor([[0], [1]]).expand(2, 1))[:, 0].double()
    exact = (torch.where(mask, values.scaled, low) - low) / (high - low)
    levels: Tensor = exact.round()
    # half a grey level of 255 is what writing a picture rounds
    off = (exact - levels).abs() > 0.51 * float(values.step.flatten()[0] / (high - low)) + 1e-9
    if bool(off.any()):
        console.say(
            f"{path}: {int(off.sum())} known values are not among the model's {dataset.levels} "
            "levels and were rounded to the nearest"
        )
    return levels.long()


def _refuse_trivial(options: Sample, mask: Tensor) -> None:
    path = options.mask or source(options)
    if not bool(mask.any()):
        raise InputRefused(f"{path}: nothing is known (no white pixel, or all NaN)")
    if options.denoise is None and bool(mask.all()):
        raise InputRefused(
            f"{path}: everything is known (all white); black pixels are those to fill in"
        )


def _around(hole: int, dataset: Dataset) -> Tensor:
    """(*shape) bool: known outside a square in the middle."""
    shape = dataset.shape()
    if len(shape) != 3 or hole >= min(shape[1:]):
        raise UsageError(
            f"--hole {hole}: this model's examples have shape {shape}; a hole is for images and "
            "smaller than their sides"
        )
    mask = torch.ones(shape, dtype=torch.bool)
    top, left = ((side - hole) // 2 for side in shape[1:])
    mask[:, top : top + hole, left : left + hole] = False
    return mask


# --- files ---------------------------------------------------------------------------------------


def values_of(path: Path, dataset: Dataset) -> Values:
    """What a picture or an .npy file holds."""
    if path.suffix.lower() == ".npy":
        numbers = _array(path, dataset.shape()).double()
        return _in_units(numbers, dataset, path)
    pixels = _picture(path, dataset)
    low, high = dataset.encode(_ends(dataset))[:, 0].double()
    return Values(pixels.double(), low, (high - low) / 255)


def _ends(dataset: Dataset) -> Tensor:
    """The lowest and the highest level, (2, 1)."""
    assert dataset.levels is not None
    return torch.tensor([[0], [dataset.levels - 1]])


def _in_units(numbers: Tensor, dataset: Dataset, path: Path) -> Values:
    """Numbers in the data's own units."""
    if dataset.levels is None:
        scale = torch.as_tensor(dataset.scale, dtype=torch.float64)
        return Values(numbers, -dataset.shift.double() / scale, 1 / scale)
    known = numbers[~numbers.isnan()]
    top = dataset.levels - 1
    if len(known) and not 0 <= float(known.min()) <= float(known.max()) <= top:
        raise InputRefused(
            f"{path}: values from {float(known.min()):g} to {float(known.max()):g}; the levels of "
            f"this model are 0 to {top}, and NaN where nothing is known"
        )
    low, high = dataset.encode(_ends(dataset))[:, 0].double()
    return Values(numbers, low, (high - low) / top)


def _mask(path: Path, dataset: Dataset) -> Tensor:
    """(*shape) bool: white, or not zero, is known."""
    if path.suffix.lower() == ".npy":
        numbers = _array(path, dataset.shape())
        if bool(numbers.isnan().any()):
            raise InputRefused(f"{path}: a mask is 1 where known and 0 elsewhere, not NaN")
        return numbers.ne(0)
    return (_read(path, dataset, 1) >= WHITE).expand(dataset.shape())


def _picture(path: Path, dataset: Dataset) -> Tensor:
    return _read(path, dataset, dataset.shape()[0])


def _read(path: Path, dataset: Dataset, channels: int) -> Tensor:
    """(C, H, W) uint8 of a picture of the model's size."""
    shape = dataset.shape()
    if len(shape) != 3 or channels not in (1, 3):
        raise InputRefused(
            f"{path}: this model's examples have shape {shape}, which no picture holds; give an "
            ".npy array of that shape with NaN where nothing is known"
        )
    reader = Reader(None, channels, False, PIXEL_LIMIT)
    pixels, _ = reader.read(path)
    if pixels.shape[:2] != shape[1:]:
        raise InputRefused(
            f"{path}: is {pixels.shape[1]} x {pixels.shape[0]} pixels, the model's images are "
            f"{shape[2]} x {shape[1]}; crop or resize it"
        )
    for step in reader.conversions:
        console.say(f"{path}: {step}")
    planes = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0)
    return torch.from_numpy(np.array(planes))


def _array(path: Path, shape: tuple[int, ...]) -> Tensor:
    """(*shape) float64 from an .npy file, NaN allowed, infinities not."""
    path = existing_file(path)
    try:
        with reading(path):
            # mapped, so that a header which declares more than the file holds allocates nothing
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputRefused(
            f"{path}: is not an .npy array of numbers ({error}); write it with numpy.save"
        ) from error
    if not isinstance(mapped, np.ndarray) or mapped.dtype.kind not in "biuf":
        raise InputRefused(f"{path}: is not an .npy array of numbers; write it with numpy.save")
    if mapped.shape not in (shape, (1, *shape), tuple(n for n in shape if n != 1)):
        raise InputRefused(
            f"{path}: has shape {mapped.shape}, an example of this model has {shape}; reshape it"
        )
    numbers = torch.from_numpy(np.array(mapped, np.float64)).reshape(shape)
    if bool(numbers.isinf().any()):
        raise InputRefused(f"{path}: holds infinite values; NaN is what marks the unknown")
    return numbers
