r"""What can be known of an example without a network: its compressed length, its roughness.

The bound of an image goes with its content: flat images cost few bits, textured ones many. Numbers
that are known for all examples of a set can therefore stand in for what few network calls cannot
see (`nelbo.surrogate`). They are any function of the stored example; nothing here is a likelihood.

References:
    Cochran 1977, Sampling Techniques, ch. 7 (regression on auxiliary variables);
    Weinberger, Seroussi, Sapiro 2000, The LOCO-I algorithm (median edge prediction).
"""

from __future__ import annotations

import itertools
import zlib

import torch
from torch import Tensor

from nelbo.data.base import Dataset
from nelbo.data.part import CHUNK, Part, pieces
from nelbo.data.transforms import colors, cosines

EDGES = (0.5, 1.5, 2.5, 4, 6, 9, 13, 18, 26, 37, 1e9)
"""Of the bands, in half waves over the image."""
MOST_COLORS = 4


def features(dataset: Dataset, rows: Part) -> Tensor:
    """(n, L) float64 numbers of stored rows; L = 0 for real vectors, which have none here.

    Images: bytes of the compressed residuals of the median edge predictor, roughness along rows
    and along columns, spread, the share of values at either end, and the energy in octave bands of
    spatial frequency, colour by colour. Bits: bytes, and ones.

    Arguments:
        rows: (n, *shape) stored examples of the data set.
    """
    if dataset.levels is None:
        return torch.zeros(len(rows), 0, dtype=torch.float64)
    picture = _bits if dataset.binary or len(rows.shape) != 4 else _image
    parts = [picture(part, dataset.levels) for part in pieces(rows, CHUNK)]
    return torch.cat(parts)


def _image(rows: Tensor, levels: int) -> Tensor:
    x = rows.double() / (levels - 1)
    along = [_roughness(x, dim) for dim in (2, 3)]
    ends = ((rows == 0) | (rows == levels - 1)).double().mean((1, 2, 3))
    spread = (x.var((1, 2, 3), correction=0) + 1e-6).log()
    return torch.stack([_bytes(_residuals(rows.int())), *along, spread, ends, *_bands(x)], 1)


def _bands(x: Tensor) -> list[Tensor]:
    """Log energies of (n, C, H, W) in bands of spatial frequency, each half an octave wide."""
    height, width = x.shape[2:]
    turned = torch.einsum("dc,nchw->ndhw", colors(x.shape[1]), x)
    if x.shape[1] > MOST_COLORS:
        turned = turned.square().mean(1, keepdim=True).sqrt()
    waves = torch.einsum("pi,ncij,qj->ncpq", cosines(height), turned, cosines(width))
    rows, columns = (torch.arange(k, dtype=torch.float64) for k in (height, width))
    radius = (rows[:, None] ** 2 + columns**2).sqrt()
    found = []
    for low, high in itertools.pairwise(EDGES):
        inside = (radius >= low) & (radius < high)
        if bool(inside.any()):
            found += list((waves[:, :, inside].square().mean(2) + 1e-7).log().T)
    return found


def _bits(rows: Tensor, levels: int) -> Tensor:
    return torch.stack([_bytes(rows.byte()), rows.flatten(1).double().mean(1)], 1)


def _roughness(x: Tensor, dim: int) -> Tensor:
    """Log of the mean square of neighbouring differences."""
    if x.shape[dim] < 2:
        return torch.zeros(len(x), dtype=torch.float64)
    return (x.diff(dim=dim).square().mean((1, 2, 3)) + 1e-6).log()


def _residuals(x: Tensor) -> Tensor:
    """(n, C, H, W) uint8: what the median edge predictor leaves, modulo 256."""
    padded = torch.nn.functional.pad(x, (1, 0, 1, 0))
    left, above, corner = padded[..., 1:, :-1], padded[..., :-1, 1:], padded[..., :-1, :-1]
    low, high = torch.minimum(left, above), torch.maximum(left, above)
    guess = torch.minimum(torch.maximum(left + above - corner, low), high)
    return (x - guess).remainder(256).byte()


def _bytes(rows: Tensor) -> Tensor:
    """(n,) compressed length of every row."""
    lengths = [len(zlib.compress(row.tobytes(), 6)) for row in rows.contiguous().numpy()]
    return torch.tensor(lengths, dtype=torch.float64)
