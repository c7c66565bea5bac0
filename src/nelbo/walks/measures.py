"""The companion metrics of a comparison: on which features, and with what."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nelbo.commands import Compare
from nelbo.companions import panel
from nelbo.data.mixture import GaussianMixture
from nelbo.errors import UsageError
from nelbo.extractors import Extractor, Inputs, standardized, whitened
from nelbo.featurenets import Labelled, classifier, random_network
from nelbo.interop.modules import opened
from nelbo.panels import Panel
from nelbo.randomness import generator
from nelbo.walks.heldout import Reals

NAMES = ("auto", "raw", "pca", "classifier", "random")
FEATURES = 32
FITTED = 0.3
"""Share of the reals that features are fitted to where there are no others."""
APART = 6.0
"""Standard deviations between modes that can be counted."""
MOST_MODES = 100


def is_module(features: str) -> bool:
    """Whether features are named as FILE.py:FUNCTION."""
    return ":" in features


class Prepared(NamedTuple):
    """Features, and the reals that are scored on them."""

    extractor: Extractor
    scored: Tensor


def prepared(options: Compare, held: Reals) -> Prepared | None:
    """The features that are asked for, fitted; None without metrics.

    Raises:
        UsageError: features that these data have not.
    """
    if not options.metrics:
        return None
    fit, scored = _parted(options, held)
    return Prepared(extractor_of(options, held, fit), scored)


def measured(options: Compare, held: Reals, fakes: Any, on: Prepared) -> Panel:
    """Every metric on one set of features."""
    with contextlib.redirect_stdout(sys.stderr):
        return panel(
            on.scored,
            fakes,
            on.extractor,
            seeds=options.seeds,
            seed=options.seed,
            training=held.fit,
        )


def _parted(options: Compare, held: Reals) -> tuple[Tensor, Tensor]:
    """Reals to which features are fitted, and others, which are scored."""
    if held.fit is not None:
        return held.fit, held.rows
    if held.dataset.truth is not None:
        return held.dataset.train[:], held.rows  # the rows are draws of their own
    order = torch.randperm(len(held.rows), generator=generator(options.seed, "features"))
    count = round(FITTED * len(held.rows))
    return held.rows[order[:count]], held.rows[order[count:]]


def extractor_of(options: Compare, held: Reals, fit: Tensor) -> Extractor:
    """The features that --features names, fitted to reals that are not scored."""
    dataset, name = held.dataset, options.features
    inputs = Inputs.of(held.rows, dataset.levels)
    if is_module(name):
        return opened(name, inputs, options.weights)
    if name not in NAMES:
        raise UsageError(f"--features {name}: take {', '.join(NAMES)} or FILE.py:FUNCTION")
    pictures, labelled = len(dataset.shape()) == 3, dataset.labels is not None
    if name == "auto":
        known = labelled and held.fit is not None
        name = "raw" if not pictures else "classifier" if known else "random"
    if name == "raw":
        return standardized(fit, dataset.levels)
    if name == "pca":
        return whitened(fit, min(FEATURES, dataset.dims, len(fit) - 1), dataset.levels)
    if name == "random":
        return random_network(inputs, options.seed)
    return _classifier(options, held)


def _classifier(options: Compare, held: Reals) -> Extractor:
    labels, dataset = held.dataset.labels, held.dataset
    if labels is None or held.fit is None:
        raise UsageError("--features classifier needs a run's own data with labels: take random")
    part = "validation" if len(dataset.validation) else "train"
    known = {p: Labelled(getattr(dataset, p), labels[p]) for p in ("train", part)}
    return classifier(
        known["train"], known[part], levels=dataset.levels, dims=FEATURES, seed=options.seed
    )


def apart(mixture: GaussianMixture) -> bool:
    """Whether a mixture has few modes, equal and round, that do not overlap."""
    if len(mixture.means) > MOST_MODES or len(mixture.means) < 2:
        return False
    widths = torch.linalg.eigvalsh(mixture.covariances).sqrt()
    alike = bool((widths - widths[0, 0]).abs().max() < 1e-9 * widths[0, 0])
    return alike and float(torch.pdist(mixture.means).min()) > APART * float(widths[0, 0])
