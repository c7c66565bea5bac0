"""Data with known truth: finite Gaussian mixtures, so density, entropy and denoiser are exact.

The Swiss roll is (u cos u, u sin u)/10 with u uniform on [1.5 pi, 4.5 pi], here by the midpoints
of equal intervals of u, each with isotropic Gaussian noise. Neighbouring components lie at most
about one standard deviation apart at the default count, so that the roll looks continuous; yet the
density that a model is compared with is the finite mixture's own, not an approximation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nelbo.data.base import Dataset, Truth
from nelbo.data.mixture import GaussianMixture
from nelbo.data.provenance import Provenance
from nelbo.data.sums import digests
from nelbo.errors import InputRefused
from nelbo.randomness import generator

TRAIN, VALIDATION, TEST = 10_000, 1_000, 4_000
PLANE: dict[str, Any] = {"mean": (0.3, -0.5), "covariance": ((1.0, 0.6), (0.6, 0.8))}
"""Of `correlated`: two dimensions, where a law can be compared on a lattice."""


def swissroll(
    n_train: int = TRAIN,
    n_test: int = TEST,
    seed: int = 0,
    *,
    n_validation: int = VALIDATION,
    components: int = 256,
    std: float = 0.05,
) -> Dataset:
    """Two-dimensional Swiss roll as a mixture along the curve (u cos u, u sin u)/10.

    Arguments:
        n_train, n_validation, n_test: number of independent draws in each part.
        seed: of the draws.
        components: points on the curve.
        std: standard deviation of each component.

    Returns:
        Vectors (n, 2) with their truth.
    """
    place = (torch.arange(components, dtype=torch.float64) + 0.5) / components
    angle = 1.5 * math.pi * (1 + 2 * place)
    means = torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / 10
    mixture = _isotropic(means, std)
    return from_mixture("swissroll", mixture, n_train, n_validation, n_test, seed)


def ring(
    n_train: int = TRAIN,
    n_test: int = TEST,
    seed: int = 0,
    *,
    n_validation: int = VALIDATION,
    modes: int = 8,
    radius: float = 1.0,
    std: float = 0.15,
) -> Dataset:
    """Equal Gaussians at the angles 2 pi j/modes of a circle.

    Arguments:
        n_train, n_validation, n_test, seed: as in `swissroll`.
        modes, radius, std: number of Gaussians, radius of the circle, standard deviation.
    """
    angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    mixture = _isotropic(means, std)
    return from_mixture("ring", mixture, n_train, n_validation, n_test, seed)


def grid25(
    n_train: int = TRAIN,
    n_test: int = TEST,
    seed: int = 0,
    *,
    n_validation: int = VALIDATION,
    side: int = 5,
    step: float = 2.0,
    std: float = 0.05,
) -> Dataset:
    """side x side equal Gaussians on a centred square lattice.

    Arguments:
        n_train, n_validation, n_test, seed: as in `swissroll`.
        side, step, std: Gaussians per side, their distance, standard deviation.
    """
    axis = step * (torch.arange(side, dtype=torch.float64) - (side - 1) / 2)
    mixture = _isotropic(torch.cartesian_prod(axis, axis), std)
    return from_mixture("grid25", mixture, n_train, n_validation, n_test, seed)


def correlated(
    n_train: int = TRAIN,
    n_test: int = TEST,
    seed: int = 0,
    *,
    n_validation: int = VALIDATION,
    mean: tuple[float, ...] = (0.3, -0.5, 0.1),
    covariance: tuple[tuple[float, ...], ...] = (
        (1, 0.6, -0.2),
        (0.6, 0.8, 0.1),
        (-0.2, 0.1, 0.5),
    ),
) -> Dataset:
    """One Gaussian with correlated dimensions; entropy 1/2 log det(2 pi e C).

    Arguments:
        n_train, n_validation, n_test, seed: as in `swissroll`.
        mean, covariance: (D,) and (D, D), the latter positive definite.
    """
    mixture = GaussianMixture(
        torch.ones(1, dtype=torch.float64),
        torch.tensor([mean], dtype=torch.float64),
        torch.tensor([covariance], dtype=torch.float64),
    )
    return from_mixture("correlated", mixture, n_train, n_validation, n_test, seed)


def from_mixture(
    name: str,
    mixture: GaussianMixture,
    n_train: int,
    n_validation: int,
    n_test: int,
    seed: int,
) -> Dataset:
    """Independent draws from a mixture, with its entropy and density.

    The scale is one number, the root mean variance over dimensions of the training part, so that
    an isotropic component stays isotropic on the model's scale.

    Arguments:
        name: also the purpose of the random draws.
        mixture: the law of the data.
        n_train, n_validation, n_test: number of draws in each part.
        seed: of the draws.

    Raises:
        InputRefused: fewer than two training or test examples.
    """
    if n_train < 2 or n_test < 2 or n_validation < 0:
        raise InputRefused(f"{name}: ask for at least 2 training and 2 test examples")
    sizes = {"train": n_train, "validation": n_validation, "test": n_test}
    parts = {
        part: mixture.sample(count, generator(seed, name, part)) for part, count in sizes.items()
    }
    entropy, error = mixture.entropy()
    origin = Provenance(name, None, levels=None, licence="generated: free of rights")
    rule = "independent draws from the true density"
    sums = [digest for rows in parts.values() for digest in digests(rows.numpy())]
    return Dataset(
        name=name,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        levels=None,
        shift=parts["train"].mean(0),
        scale=float(parts["train"].var(0).mean().sqrt()),
        record=origin.record(parts, rule, sums, seed),
        truth=Truth(entropy, error, mixture.log_prob, mixture),
    )


def _isotropic(means: Tensor, std: float) -> GaussianMixture:
    """Equal weights, covariance std^2 I."""
    count, dims = means.shape
    covariances = (std**2 * torch.eye(dims, dtype=torch.float64)).expand(count, dims, dims)
    return GaussianMixture(
        torch.full((count,), 1 / count, dtype=torch.float64), means, covariances.contiguous()
    )
