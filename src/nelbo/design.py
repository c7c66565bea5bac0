r"""Which examples meet which times: the design of a few-call evaluation.

A design spends c network calls per example on average in two replicates. A replicate measures some
of the examples, each at k numbers v in (0, 1), which pick the terms under their probabilities:

    c ≥ 2        both replicates measure all examples, k = ⌈c/2⌉ and ⌊c/2⌋;
    1 < c < 2    the first measures all once, the second a share c − 1 of them;
    c ≤ 1        the first measures a share .9 c once, the second .1 c: examples of the first.

The second replicate is what tells the noise from the examples. Within a replicate the pairing is a
Latin hypercube: m examples meet the m cells of (0, 1) in random order, one node in each, so that
what depends on the time alone costs nothing, and what depends on the example alone costs nothing
where all are measured. The k strata of one example hold mirrored pairs of nodes,

    v = (2j + 2w)/k and (2j + 2 − 2w)/k,

so that what is linear in a stratum costs nothing either. Every node is uniform on its stratum.

References:
    McKay, Beckman, Conover 1979 (Latin hypercube); Neyman 1934 (strata, two phases);
    Hammersley, Morton 1956 (antithetic nodes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.errors import UsageError
from nelbo.randomness import generator

LEAST = 100
"""Network calls in all, below which less than two per example do not tell an error."""
REPEATED = 0.1
"""Share of the calls that goes to examples already measured, where not all are measured twice."""


@dataclass(frozen=True)
class Replicate:
    """`examples` examples are measured, each at `nodes` times."""

    examples: int
    nodes: int

    @property
    def calls(self) -> int:
        """Network calls of this replicate."""
        return self.examples * self.nodes


def replicates(n: int, calls: float) -> tuple[Replicate, Replicate]:
    """The two replicates of a design of `calls` network calls per example.

    Raises:
        UsageError: too few calls in all, or a fraction of a call where it has no meaning.
    """
    if enough(n, calls) > calls:
        raise UsageError(
            f"--calls {calls:g}: {round(calls * n)} network calls for {n} examples do not tell an "
            f"error; take at least {enough(n, calls):g}"
        )
    if calls >= 2:
        if calls != int(calls):
            raise UsageError(f"--calls {calls:g}: from 2 on, take a whole number")
        whole = int(calls)
        return Replicate(n, whole - whole // 2), Replicate(n, whole // 2)
    total = round(calls * n)
    first = n if calls > 1 / (1 - REPEATED) else min(n, total - round(REPEATED * total))
    return Replicate(first, 1), Replicate(total - first, 1)


def enough(n: int, calls: float) -> float:
    """`calls` per example, or as many as the least design of n examples takes: 2 always do."""
    if calls >= 2 or calls * n >= LEAST:
        return calls
    return min(math.ceil(1000 * LEAST / n) / 1000, 2.0)


@dataclass(frozen=True)
class Design:
    """Nodes of every example.

    Arguments:
        folds: (n,) int64, the fold of every example.
        first: (n, k) numbers in (0, 1) of the first replicate, nan where it does not look.
        second: (n, k') of the second; its examples are examples of the first.
    """

    folds: Tensor
    first: Tensor
    second: Tensor

    @property
    def both(self) -> Tensor:
        """(n, k + k')."""
        return torch.cat([self.first, self.second], 1)

    @property
    def calls(self) -> int:
        """Network calls in all."""
        return int(self.both.isfinite().sum())


def design(
    n: int, calls: float, folds: int, seed: int, *purpose: str | int, latin: bool = True
) -> Design:
    """Draw a design: a function of (n, calls, folds, seed, purpose) and of nothing else.

    Arguments:
        folds: at most so many parts, each a design of its own, so that what is fitted on the
            others is independent of it.
        latin: False: every node is drawn from all of (0, 1), on its own.
    """
    shape = replicates(n, calls)
    draws = generator(seed, "evaluation", "design", *purpose)
    count = max(1, min(folds, min(r.examples for r in shape) // 2))
    order = torch.randperm(n, generator=draws)
    member = torch.zeros(n, dtype=torch.int64)
    tables = [torch.full((n, r.nodes), math.nan, dtype=torch.float64) for r in shape]
    for number, part in enumerate(order.chunk(count)):
        member[part] = number
        for table, r in zip(tables, shape, strict=True):
            some = part[: _share(len(part), r.examples, n)]
            table[some] = nodes(len(some), r.nodes, draws, latin)
    return Design(member, *tables)


def _share(part: int, examples: int, n: int) -> int:
    """Examples of a fold that a replicate measures; at least two, or a fold would be left out."""
    return min(part, max(2, round(part * examples / n)))


def nodes(m: int, k: int, draws: torch.Generator, latin: bool = True) -> Tensor:
    """(m, k) numbers in (0, 1), a column uniform on its stratum, mirrored two by two."""
    if not latin:
        return torch.rand(m, k, generator=draws, dtype=torch.float64)
    columns: list[Tensor] = []
    for j in range(k // 2):
        w = _latin(m, draws)
        columns += [(2 * j + 2 * w) / k, (2 * j + 2 - 2 * w) / k]
    if k % 2:
        columns.append((k - 1 + _latin(m, draws)) / k)
    return torch.stack(columns, 1)


def _latin(m: int, draws: torch.Generator) -> Tensor:
    """(m,) one number in each of the m cells of (0, 1), in random order."""
    cell = torch.randperm(m, generator=draws)
    return (cell + torch.rand(m, generator=draws, dtype=torch.float64)) / m
