r"""Scores of nearest neighbours: how much of each set of features lies close to the other.

B(x_i, k) is the ball around a real row that reaches its k-th nearest *other* real row, and B(y_j,
k) the like of fake rows. Then, over n real rows x and m fake rows y,

    precision  share of the y in some B(x_i, k)         recall    share of the x in some B(y_j, k)
    density    sum over i, j of [y_j in B(x_i, k)]/(km)  coverage  share of the B(x_i, k) with a y

and the ratio of median distances to the nearest training row tells copies from new samples. All
of them depend on n: balls shrink as rows are added. Precision and recall are not the shares of
mass that their names suggest (one far real row makes a large ball), and two samples of one law
score below one; the figure between two halves of the real data at the same n is their floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.errors import InputRefused
from nelbo.scores import BLOCK, pair


@dataclass(frozen=True)
class Neighbourhoods:
    """What k-nearest-neighbour balls say; see `neighbourhoods`."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall: shares of fake rows in real balls, of real in fake balls.

    A ball holds its boundary (<=) and its radius is the distance to the k-th nearest *other* row;
    nothing is pruned. If all features are equal both are 1 (with the strict rule of other code 0).

    Arguments:
        real, fake: (n, d) and (m, d), more than k rows each. The first are the real ones.
    Raises:
        InputRefused: as `kid`, or too few rows.
    References:
        Kynkäänniemi et al. 2019, eq. 1-2 and their code, which has <= and k = 3.
    """
    x, y = pair(real, fake, k + 1)
    return _precision_recall(_distances(x, x), _distances(y, y), _distances(x, y), k)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Mean number of real balls around a fake row over k, and the share of real balls hit.

    Balls are open (<), as in the authors' code: if all features are equal both are 0. For equal
    laws density is 1 on average and coverage tends to 1 - 2^-k.

    Arguments:
        real, fake: (n, d) and (m, d), more than k rows each. The first are the real ones.
    Raises:
        InputRefused: as `kid`, or too few rows.
    References:
        Naeem, Oh, Uh, Choi, Yoo 2020, eq. 3-4, lemma 2, and their code (prdc), with k = 5.
    """
    x, y = pair(real, fake, k + 1)
    return _density_coverage(_distances(x, x), _distances(x, y), k)


def neighbourhoods(
    real: Tensor, fake: Tensor, *, manifold: int = 3, balls: int = 5
) -> Neighbourhoods:
    """`precision_recall` with k = manifold and `density_coverage` with k = balls, at one cost.

    Three tables of distances, 24 n^2 bytes, are held at once.
    """
    x, y = pair(real, fake, max(manifold, balls) + 1)
    within, across = _distances(x, x), _distances(x, y)
    shares = _precision_recall(within, _distances(y, y), across, manifold)
    return Neighbourhoods(*shares, *_density_coverage(within, across, balls))


def _precision_recall(real: Tensor, fake: Tensor, across: Tensor, k: int) -> tuple[float, float]:
    precise = (across <= _radii(real, k)[:, None]).any(0)
    recalled = (across <= _radii(fake, k)[None, :]).any(1)
    return float(precise.double().mean()), float(recalled.double().mean())


def _density_coverage(real: Tensor, across: Tensor, k: int) -> tuple[float, float]:
    inside = across < _radii(real, k)[:, None]
    return float(inside.double().sum(0).mean()) / k, float(inside.any(1).double().mean())


def _radii(distances: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest other row; its own zero is the first of its row."""
    return distances.kthvalue(k + 1, dim=1).values


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # Not through |x|^2 + |y|^2 - 2 x.y: its rounding would break the ties that <= and < decide.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def training_distance_ratio(real: Tensor, fake: Tensor, training: Tensor) -> float:
    """Median distance of fake rows to their nearest training row, over that of unseen real rows.

    Near 1 where samples lie as far from the training data as new data do; towards 0 where they
    copy it. It sees copies in this feature space only, and few copies among many not at all.

    Arguments:
        real: (n, k) rows that the model has not seen.
        fake: (m, k). training: (N, k), what it was trained on.
    Raises:
        InputRefused: as `kid`, or unseen rows that coincide with training rows for the most part.
    References:
        Meehan, Chaudhuri, Dasgupta 2020, who test the two sets of distances against each other.
    """
    x, y = pair(real, fake, 1)
    _, rows = pair(real, training, 1)
    unseen, copied = (float(_nearest(part, rows).median()) for part in (x, y))
    if unseen == 0:
        raise InputRefused(
            "most unseen real rows equal a training row (in these features): the ratio of "
            "distances has no denominator. Remove copies between the two"
        )
    return copied / unseen


def _nearest(rows: Tensor, among: Tensor) -> Tensor:
    parts = [_distances(rows, block).amin(1) for block in torch.split(among, BLOCK)]
    return torch.stack(parts).amin(0)
