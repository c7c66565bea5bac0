r"""Cutting the reals into the part that fits, the part that chooses, and the part that certifies.

FIT trains the classifiers, CAL chooses among them, and C, the certificate set, is opened once.
Only C must be independent of everything that came before it: of the sampler, and of D. Copies of
one example, or rows of one subject, would carry FIT into C, so what belongs together stays in one
part; a row of FIT that equals a row of C is dropped. Where rows are draws from a law with atoms,
such as bits, equal rows are independent all the same, and keeping them together would give C
another law than the data: there the rows are dealt out one by one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.data.sums import digests
from nelbo.errors import InputRefused, UsageError
from nelbo.randomness import generator
from nelbo.sides import COPIES, copies

LEAST_FIT, LEAST_CAL, LEAST = 16, 4, 16
SHARES = (0.45, 0.10, 0.45)


@dataclass(frozen=True)
class Parts:
    """The reals, cut.

    Arguments:
        fit, calibration, certificate: (n, *shape) stored rows; the certificate part is shuffled.
        hash: 16 hexadecimal digits of the SHA-256 of the rows of C in the order of their digests.
        rule: how it was cut. dropped: rows of FIT that equalled one of C.
    """

    fit: Tensor
    calibration: Tensor
    certificate: Tensor
    hash: str
    rule: str
    dropped: int


def together(real: Tensor, copies_together: bool | None) -> bool:
    """Whether equal rows are copies of one example (True) or draws of an atom (False)."""
    if copies_together is not None:
        return copies_together
    atoms = not real.is_floating_point() and real.ndim == 2 and copies(real) > COPIES
    return not atoms


def in_groups(real: Tensor, groups: Tensor | None, keep: bool, seed: int) -> list[list[int]]:
    """The indices of rows that belong together, in an order fixed by the seed.

    Arguments:
        groups: (n,) a number per row, or None. keep: keep equal rows together.
    """
    marks: list[list[object]] = []
    if groups is not None:
        if groups.shape != (len(real),):
            raise InputRefused(
                f"groups of shape {tuple(groups.shape)} for {len(real)} reals; give each a number"
            )
        marks.append(list(groups.tolist()))
    if keep:
        marks.append(list(digests(real.numpy())))
    found = _connected(marks, len(real))
    order = torch.randperm(len(found), generator=generator(seed, "groups")).tolist()
    return [found[i] for i in order]


def cut(
    real: Tensor,
    *,
    seed: int,
    total: int,
    shares: Sequence[float] = SHARES,
    groups: Tensor | None = None,
    fit_real: Tensor | None = None,
    keep: bool = True,
) -> Parts:
    """FIT, CAL and C of the reals.

    Arguments:
        total: reals of which the shares are taken; those beyond go to FIT.
        shares: of FIT, CAL and C. fit_real: reals that a sampler may have seen, for FIT alone.
        groups, keep: see `in_groups`.

    Raises:
        InputRefused: too few rows, or groups too large to be cut.
        UsageError: shares that are no shares.
    """
    if len(shares) != 3 or min(shares) < 0 or not 0.99 < sum(shares) < 1.01:
        raise UsageError(f"shares {tuple(shares)}: give those of FIT, CAL and C, with sum 1")
    sizes = {"C": round(shares[2] * total), "CAL": round(shares[1] * total)}
    dealt: dict[str, list[int]] = {"C": [], "CAL": [], "FIT": []}
    for group in in_groups(real, groups, keep, seed):
        part = next((p for p, size in sizes.items() if len(dealt[p]) < size), "FIT")
        dealt[part] += group
    shuffled = torch.tensor(dealt["C"], dtype=torch.long)
    shuffled = shuffled[torch.randperm(len(shuffled), generator=generator(seed, "C"))]
    # A group that did not fit whole would leave more reals than fakes.
    certificate = real[shuffled[: sizes["C"]]]
    calibration = real[dealt["CAL"][: max(sizes["CAL"], 0)]]
    fit = real[dealt["FIT"]]
    if fit_real is not None:
        fit = torch.cat([fit, fit_real])
    fit, dropped = _without(fit, certificate) if keep else (fit, 0)
    refuse_few(len(fit), len(calibration), len(certificate), shares)
    rule = "equal rows in one part" if keep else "row by row, the law has atoms"
    rule += "" if groups is None else ", groups in one part"
    return Parts(fit, calibration, certificate, set_hash(certificate), rule, dropped)


def refuse_few(fit: int, calibration: int, certificate: int, shares: Sequence[float]) -> None:
    """Raise InputRefused if a part is too small, with the least number of reals."""
    if fit < LEAST_FIT or calibration < LEAST_CAL or certificate < LEAST:
        wanted = zip((LEAST_FIT, LEAST_CAL, LEAST), shares, strict=True)
        least = max(int(size / share) + 1 for size, share in wanted if share > 0)
        raise InputRefused(
            f"too few rows: FIT, CAL and C have {fit}, {calibration} and {certificate}, they need "
            f"{LEAST_FIT}, {LEAST_CAL} and {LEAST}; that is at least {least} reals that are not "
            "copies, and as many fakes"
        )


def set_hash(rows: Tensor) -> str:
    """16 hexadecimal digits that name a set of rows, in whatever order."""
    return hashlib.sha256(b"".join(sorted(digests(rows.numpy())))).hexdigest()[:16]


def _without(fit: Tensor, certificate: Tensor) -> tuple[Tensor, int]:
    held = set(digests(certificate.numpy()))
    kept = [i for i, digest in enumerate(digests(fit.numpy())) if digest not in held]
    return fit[kept], len(fit) - len(kept)


def _connected(marks: list[list[object]], n: int) -> list[list[int]]:
    """Rows linked by a common mark of any kind, by union of trees."""
    above = list(range(n))

    def root(i: int) -> int:
        while above[i] != i:
            above[i] = above[above[i]]
            i = above[i]
        return i

    for kind in marks:
        first: dict[object, int] = {}
        for i, mark in enumerate(kind):
            above[root(i)] = root(first.setdefault(mark, i))
    found: dict[int, list[int]] = {}
    for i in range(n):
        found.setdefault(root(i), []).append(i)
    return list(found.values())
