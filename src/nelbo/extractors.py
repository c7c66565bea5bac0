r"""Features: what the companion scores look at, each with a name and a hash, none downloaded.

Distances between raw pixels say little of images, and the usual remedy is a network trained on
other people's photographs. Four kinds need nothing but the data at hand:

    standardised    (y - m)/s, by mean and deviation of fitting rows: of each dimension for
                    vectors, one deviation for all pixels, which share a unit
    whitened        V_k^T (y - m)/sqrt(e_k), the first k principal components e, V of fitting rows
    classifier      the last hidden layer of a small network trained on labelled rows
    random network  means on a 2x2 grid of a convolutional network with fixed random weights

and `Features` wraps any module: the last two (`nelbo.featurenets`), and the user's own, opened by
path in `nelbo.interop.modules`. Images enter as 2 level/(levels - 1) - 1, vectors as they are
stored. A score belongs to its features: two figures are comparable only where the hash, over all
parameters and fitted statistics, is the same. What is fitted must not see the examples that are
scored.

References:
    Heusel et al. 2017 for scores on features.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nelbo.errors import InputRefused, NumericalFailure

BATCH = 256
APART = 1e-3
"""Relative to the largest feature of a row: more is no rounding."""
LEAST_EIGENVALUE = 1e-10
"""Relative to the largest: below it a principal component is rounding, not data."""


@dataclass(frozen=True)
class Inputs:
    """What an extractor reads: shape of one example, and its levels, or None for vectors."""

    shape: tuple[int, ...]
    levels: int | None

    @classmethod
    def of(cls, rows: Tensor, levels: int | None = 256) -> Inputs:
        """The kind of some rows: (n, *shape) uint8 with `levels`, or floating (n, D)."""
        known = levels if rows.dtype == torch.uint8 else None
        return cls(tuple(rows.shape[1:]), known)

    def encode(self, rows: Tensor) -> Tensor:
        """2 level/(levels - 1) - 1, or vectors as they are: (n, *shape) float64.

        Raises:
            InputRefused: another shape or type, levels out of range, or values not finite.
        """
        if tuple(rows.shape[1:]) != self.shape or len(rows) == 0:
            raise InputRefused(
                f"examples are {tuple(rows.shape)}, the features are of (n, "
                f"{', '.join(map(str, self.shape))})"
            )
        if (self.levels is None) != rows.is_floating_point():
            want = "real vectors" if self.levels is None else "levels (uint8)"
            raise InputRefused(
                f"examples are {rows.dtype}, the features are of {want}: real and generated "
                "examples must come in the same type and range"
            )
        if self.levels is None:
            if not bool(torch.isfinite(rows).all()):
                raise InputRefused("examples hold NaN or infinite values")
            return rows.double()
        if rows.dtype != torch.uint8 or int(rows.max()) >= self.levels:
            raise InputRefused(
                f"examples reach level {int(rows.max())} as {rows.dtype}, the features are of "
                f"uint8 levels 0..{self.levels - 1}"
            )
        return rows.double() * (2 / (self.levels - 1)) - 1


class Extractor(ABC):
    """Features of examples, with their identity.

    Arguments:
        name: short. inputs: what it reads. dims: k, the number of features.
        hash: SHA-256 of everything that the features depend on, in hexadecimal.
        note: what a reader should know of it, or "".
    """

    def __init__(self, name: str, inputs: Inputs, dims: int, digest: str, note: str = "") -> None:
        self.name = name
        self.inputs = inputs
        self.dims = dims
        self.hash = digest
        self.note = note

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """(n, *shape) levels or vectors -> (n, k) float64, row by row.

        Raises:
            InputRefused: examples of another kind.
            NumericalFailure: a feature is not finite.
        """

    def as_json(self) -> dict[str, Any]:
        """{name, hash, dims, note}."""
        return {"name": self.name, "hash": self.hash, "dims": self.dims, "note": self.note}


class Affine(Extractor):
    """(x - shift) @ matrix of the flattened examples; final.

    Arguments:
        shift: (D,). matrix: (D, k), both float64.
    """

    def __init__(self, name: str, inputs: Inputs, shift: Tensor, matrix: Tensor) -> None:
        digest = digest_of({"shift": shift, "matrix": matrix}, name, inputs)
        super().__init__(name, inputs, matrix.shape[1], digest)
        self.shift = shift
        self.matrix = matrix

    def features(self, x: Tensor) -> Tensor:
        """See `Extractor.features`."""
        return (self.inputs.encode(x).flatten(1) - self.shift) @ self.matrix


class Features(Extractor):
    """What a module gives; final. The module is put into eval mode and its weights are kept.

    Arguments:
        network: (B, *shape) in its own floating type -> (B, k), k found by a call on zeros.
        digest: SHA-256; None: over the module's parameters and buffers.
    Raises:
        InputRefused: the module returns something else, or refuses such examples.
    """

    def __init__(
        self,
        name: str,
        inputs: Inputs,
        network: nn.Module,
        *,
        digest: str | None = None,
        note: str = "",
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        floating = (p.dtype for p in network.parameters() if p.is_floating_point())
        self.dtype = next(floating, torch.float32)
        digest = digest_of(network.state_dict(), name, inputs) if digest is None else digest
        dims = self._call(torch.zeros(2, *inputs.shape)).shape[1]
        super().__init__(name, inputs, dims, digest, note)

    def features(self, x: Tensor) -> Tensor:
        """See `Extractor.features`."""
        encoded = self.inputs.encode(x)
        found = torch.cat([self._call(part) for part in encoded.split(BATCH)])
        if not bool(torch.isfinite(found).all()):
            raise NumericalFailure(f"features {self.name}: NaN or infinite values came out")
        alone = self._call(encoded[:1])
        if bool((alone - found[:1]).abs().max() > APART * found[:1].abs().max()):
            raise InputRefused(
                f"features {self.name}: those of an example change with the rest of its batch, so "
                "that they are no function of the example; take out what depends on the batch"
            )
        return found.double()

    @torch.no_grad()
    def _call(self, x: Tensor) -> Tensor:
        try:
            value = self.network(x.to(self.dtype))
        except RuntimeError as error:  # torch's word for shapes and types that do not fit
            raise InputRefused(
                f"the module for features refuses {tuple(x.shape)} {self.dtype}: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.dim() != 2 or len(value) != len(x):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputRefused(
                f"the module for features returned {found} for {tuple(x.shape)}, expected a "
                f"tensor ({len(x)}, k): flatten its output"
            )
        return value


def digest_of(state: Mapping[str, Tensor], *parts: object) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, and over the text of `parts`."""
    total = hashlib.sha256(repr(parts).encode())
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        total.update(f"{key}\x1f{value.dtype}\x1f{tuple(value.shape)}\x1f".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def standardized(fit: Tensor, levels: int | None = 256) -> Affine:
    """Raw values over a deviation: each dimension's own for vectors, one for all pixels.

    Pixels that hardly vary would drown all others if each had its own.

    Arguments:
        fit: (n, *shape) real rows that are not scored: uint8 levels, or floating vectors.
        levels: of uint8 rows.
    Raises:
        InputRefused: fewer than two rows, or constant ones.
    """
    inputs = Inputs.of(fit, levels)
    rows = _fitting(fit, inputs)
    variance = rows.var(0, correction=0)
    if inputs.levels is not None:
        variance = variance.mean().expand(len(variance))
    constant = (variance == 0).nonzero().flatten().tolist()
    if constant:
        raise InputRefused(
            f"the rows to fit the features on do not vary in {len(constant)} column(s), the first "
            f"ones {constant[:8]}: remove these columns, or give other rows"
        )
    return Affine("raw, standardised", inputs, rows.mean(0), torch.diag(1 / variance.sqrt()))


def whitened(fit: Tensor, k: int = 64, levels: int | None = 256) -> Affine:
    """The first k principal components of `fit`, each divided by its deviation.

    Arguments:
        fit, levels: as in `standardized`. k: components; more than k rows are needed.
    Raises:
        InputRefused: too few rows, or fewer than k directions in which they vary.
    """
    inputs = Inputs.of(fit, levels)
    rows = _fitting(fit, inputs)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1]))
    usable = int((values > LEAST_EIGENVALUE * values[-1]).sum()) if float(values[-1]) > 0 else 0
    usable = min(usable, len(rows) - 1)
    if not 1 <= k <= usable:
        raise InputRefused(
            f"PCA features: k={k} components asked for, the {len(rows)} rows to fit on vary in "
            f"{usable} directions; ask for 1 to {usable}, or give more rows"
        )
    values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
    # Eigenvectors have no sign of their own: the largest entry is made positive.
    signs = vectors.gather(0, vectors.abs().argmax(0)[None]).sign()
    return Affine("PCA, whitened", inputs, rows.mean(0), vectors * signs / values.sqrt())


def _fitting(fit: Tensor, inputs: Inputs) -> Tensor:
    if len(fit) < 2:
        raise InputRefused("features are fitted on at least two real rows")
    return inputs.encode(fit).flatten(1)
