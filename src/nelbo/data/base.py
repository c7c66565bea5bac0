"""What the rest of the package knows of a data set.

Data are stored as they came: integer levels of images, (n, C, H, W), bits (n, D), or real vectors,
(n, D). The model sees x = 2 level/(levels - 1) - 1, bits as they are, or x = (y - shift)/scale. A
density carries units: with D dimensions, -log p(y) = -log p(x) + sum_d log scale_d. Levels are
discrete and have no such term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nelbo.data.mixture import GaussianMixture
from nelbo.data.part import CHUNK, Part, pieces
from nelbo.errors import InputRefused, NumericalFailure


@dataclass(frozen=True)
class Truth:
    """What is known exactly of generated data.

    Arguments:
        entropy: entropy in nats; of a density, in the units of the stored vectors.
        entropy_error: bound on its absolute numerical error, in nats.
        log_prob: (B, D) in stored units -> (B,) nats.
        components: of a Gaussian mixture the mixture itself, in stored units.
    """

    entropy: float
    entropy_error: float
    log_prob: Callable[[Tensor], Tensor]
    components: GaussianMixture | None = None


@dataclass(frozen=True)
class Dataset:
    """Three disjoint parts, their scale, and the record of where they came from.

    Arguments:
        name: short name.
        train, validation, test: levels (n, C, H, W) uint8, or vectors (n, D) float64; tensors, or
            what reads the rows that are asked for.
        levels: number of grey levels, at most 256, or None for vectors.
        shift, scale: of vectors, shift (D,), scale a positive number or (D,); 0 and 1 for images.
        record: JSON-able: path, checksums, split, licence, conversions, warnings.
        truth: of toys, None for data from files.
        labels: per part, (n,) int64, where the source has them.
        rows: per part, (n,) position of each example in the source.
        binary: two levels that the model sees as the bits 0 and 1.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    levels: int | None
    shift: Tensor
    scale: float | Tensor
    record: dict[str, Any]
    truth: Truth | None = None
    labels: dict[str, Tensor] | None = None
    rows: dict[str, Tensor] | None = None
    binary: bool = False

    @classmethod
    def of_levels(
        cls,
        name: str,
        parts: Mapping[str, Part],
        levels: int,
        record: dict[str, Any],
        truth: Truth | None = None,
        binary: bool = False,
    ) -> Dataset:
        """Data with levels, which need no scale of their own.

        Arguments:
            parts: "train", "validation" and "test", each (n, *shape) uint8.
        """
        zero = torch.zeros((), dtype=torch.float64)
        train, validation, test = (parts[part] for part in ("train", "validation", "test"))
        return cls(
            name, train, validation, test, levels, zero, 1.0, record, truth=truth, binary=binary
        )

    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.train.shape[1:])

    @property
    def all(self) -> Tensor:
        """Every example: training, validation, test, in this order."""
        return torch.cat((self.train[:], self.validation[:], self.test[:]))

    @property
    def dims(self) -> int:
        """Number of dimensions of one example."""
        return math.prod(self.shape())

    def encode(self, y: Tensor) -> Tensor:
        """Stored rows on the model's scale: 2 y/(levels - 1) - 1, bits, or (y - shift)/scale.

        Arguments:
            y: (B, *shape), levels or vectors.

        Returns:
            x (B, *shape) float32; for vectors the arithmetic is float64 and rounded once.
        """
        if self.levels is None:
            return ((y - self._like(y, self.shift)) / self._like(y, self.scale)).float()
        table = self._level_values()
        if y.is_cuda:
            return table.to(y.device)[y.long()]
        # NumPy's take is three times as fast as an index of int64, and gives the same values
        return torch.from_numpy(table.numpy().take(y.numpy()))

    def decode(self, x: Tensor) -> Tensor:
        """Inverse of `encode`, for showing and writing samples.

        Images are rounded to the nearest level and limited to 0..levels-1, because a sample is
        not confined to [-1, 1]. No likelihood is computed from decoded values.

        Arguments:
            x: (B, *shape) on the model's scale.

        Returns:
            levels (B, C, H, W) uint8, or vectors (B, D) float64.

        Raises:
            NumericalFailure: a sample is not finite.
        """
        if not bool(torch.isfinite(x).all()):
            raise NumericalFailure("samples hold NaN or infinite values: they cannot be shown")
        if self.levels is None:
            y = x.double()
            return y * self._like(y, self.scale) + self._like(y, self.shift)
        if self.binary:
            return (x > 0.5).to(torch.uint8)
        top = self.levels - 1
        return ((x.float() + 1) * (top / 2)).round().clamp(0, top).to(torch.uint8)

    def offset(self) -> float:
        """Nats to add to -log p(x) for -log p(y): sum_d log scale_d, and 0 for levels."""
        if self.levels is not None:
            return 0.0
        scale = torch.as_tensor(self.scale, dtype=torch.float64).expand(self.dims)
        return float(scale.log().sum())

    def scaled_components(self) -> GaussianMixture:
        """The true mixture on the model's scale, of which an exact denoiser is made.

        Raises:
            InputRefused: the data come from files, the truth is not known.
        """
        if self.truth is None or self.truth.components is None:
            raise InputRefused(f"{self.name}: the true density is known of continuous toys only")
        return self.truth.components.standardized(self.shift, self.scale)

    def uniform_baseline(self) -> float:
        """Nats per example of uniform coding: dims * log(levels)."""
        return self.dims * math.log(self._levels())

    def histogram_baseline(self) -> Tensor:
        """Nats per test example under independent dimensions, counted on the training part.

        p_d(level) = (count_d(level) + 1)/(n_train + levels), Laplace's rule.

        Returns:
            (n_test,) float64.
        """
        levels = self._levels()
        counts = torch.ones(self.dims * levels, dtype=torch.float64)
        for rows in pieces(self.train, CHUNK):
            counts += torch.bincount(self._cells(rows).flatten(), minlength=counts.numel())
        nats = math.log(len(self.train) + levels) - counts.log()
        return torch.cat([nats[self._cells(rows)].sum(1) for rows in pieces(self.test, CHUNK)])

    def _cells(self, rows: Tensor) -> Tensor:
        """Index of each value in the flat table of (dimension, level)."""
        start = torch.arange(self.dims) * self._levels()
        return rows.flatten(1).long() + start

    def _levels(self) -> int:
        if self.levels is None:
            raise InputRefused(f"{self.name}: a density has no levels, so no coding baseline")
        return self.levels

    def _level_values(self) -> Tensor:
        top = self._levels() - 1
        if self.binary:
            return torch.tensor([0.0, 1.0])
        return (torch.arange(top + 1, dtype=torch.float64) * 2 / top - 1).float()

    @staticmethod
    def _like(y: Tensor, value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=y.dtype, device=y.device)
