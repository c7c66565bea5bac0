"""The devices of a few-call evaluation, made from a subject's training data."""

from __future__ import annotations

from torch import Tensor

from nelbo.controls import Control, Shrinkage, Wiener
from nelbo.data.features import features
from nelbo.errors import UsageError
from nelbo.fewcalls import Plan
from nelbo.processes.gaussian import Gaussian
from nelbo.recipes.recipe import Subject

FITTED, MOST_DIMS = 8192, 4096
"""Training examples for the covariance of the Wiener control, and the largest one."""
BLOCKS = (8, 7, 6, 5, 4, 3, 2)
NAMES = ("wiener", "shrinkage", "features", "allocation", "pairing", "crossfit")


def parse(names: str) -> frozenset[str]:
    """The devices that --without switches off.

    Raises:
        UsageError: a name is unknown.
    """
    found = frozenset(name.strip() for name in names.split(",") if name.strip())
    unknown = sorted(found - set(NAMES))
    if unknown:
        raise UsageError(f"--without {', '.join(unknown)}: there are {', '.join(NAMES)}")
    return found


def controls_of(subject: Subject, without: frozenset[str]) -> tuple[Control, ...]:
    """Linear denoisers: of the training data where it is affordable, and of each image."""
    process, dataset = subject.model.process, subject.dataset
    if not isinstance(process, Gaussian):
        return ()
    found: list[Control] = []
    if "wiener" not in without and dataset.dims <= MOST_DIMS:
        found.append(Wiener.of(process, dataset.encode(dataset.train[:FITTED])))
    if "shrinkage" not in without and len(dataset.shape()) == 3:
        found += [Shrinkage(process, dataset.shape(), b) for b in blocks(dataset.shape())]
    return tuple(found)


def blocks(shape: tuple[int, ...]) -> list[int]:
    """The two largest sides of blocks that tile an image."""
    return [b for b in BLOCKS if shape[1] % b == 0 and shape[2] % b == 0][:2]


def plan_of(subject: Subject, rows: Tensor, pilot: Tensor, without: frozenset[str]) -> Plan:
    """All devices but those in `without`.

    Arguments:
        rows: (n, *shape) stored, to be measured. pilot: (m, *shape) stored training examples.
    """
    known = None
    if "features" not in without:
        known = features(subject.dataset, rows), features(subject.dataset, pilot)
    return Plan(
        controls=controls_of(subject, without),
        features=known,
        allocate="allocation" not in without,
        latin="pairing" not in without,
        crossfit="crossfit" not in without,
    )


def used(plan: Plan) -> dict[str, bool]:
    """The devices of a plan, for the document."""
    return {
        "controls": len(plan.controls) > 0,
        "features": plan.features is not None and plan.features[0].shape[1] > 0,
        "allocation": plan.allocate,
        "pairing": plan.latin,
        "crossfit": plan.crossfit,
    }
