"""The panel: every companion score with its spread and with its floor, at one n.

For each of several seeds the real rows are cut at random into two disjoint parts of n, a and b,
and n fake rows f are drawn. The row of a score is

    fake   mean and standard deviation over seeds of score(a, f)
    real   mean and standard deviation over seeds of score(a, b): what a perfect sampler would get

Both use the same extractor and the same n on both sides, since nearly all scores depend on n. A
fake row within the spread of the real one says that this score sees no difference at this n, and
nothing more: scores on features cannot certify closeness, nor a distance (`nelbo.jsd` can, from
below). The deviation is that of one such figure, not a standard error: rows are shared between
seeds where the data are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nelbo.errors import InputRefused, NumericalFailure
from nelbo.extractors import Extractor
from nelbo.neighbours import neighbourhoods, training_distance_ratio
from nelbo.panels import BETTER, Panel, Row, Spread
from nelbo.randomness import generator, seeded
from nelbo.scores import fid, kid, mmd_test, sliced_wasserstein

LEAST, MOST = 6, 1000
SEEDS = 5
Sampler = Callable[[int], Tensor | np.ndarray]
Fakes = Sampler | Tensor | np.ndarray


def panel(
    real: Tensor | np.ndarray,
    fakes: Fakes,
    extractor: Extractor,
    *,
    n: int | None = None,
    seeds: int = SEEDS,
    seed: int = 0,
    training: Tensor | np.ndarray | None = None,
    permutations: int = 199,
) -> Panel:
    """Score a sampler, or an array of samples, against real rows, and real rows against real.

    Arguments:
        real: (N, *shape) rows that neither the model nor the extractor has seen.
        fakes: a callable n -> (n, *shape), called once per seed with the global generators seeded,
            or an array (M, *shape), of which random subsets are taken.
        extractor: for rows of this kind.
        n: rows on either side; None: the most up to 1000 that N/2 and M allow.
        seeds: repetitions, at least two. seed: of all draws.
        training: rows the model was trained on, for training_distance_ratio.
        permutations: of each p-value.
    Raises:
        InputRefused: too few rows, a sampler that raises, returns another shape or type, or
            repeats itself.
    """
    if seeds < 2:
        raise InputRefused(f"seeds={seeds}: a spread needs at least two")
    real_rows, source = _tensor(real), fakes if callable(fakes) else _tensor(fakes)
    n = _size(len(real_rows), source, n)
    pool = _draw(real_rows, min(len(real_rows), 2 * n * seeds), seed, "pool")
    known = extractor.features(pool)
    drawn = [extractor.features(rows) for rows in _fakes(source, n, seeds, seed, real_rows)]
    trained = None if training is None else extractor.features(_tensor(training))
    skipped = _refusals(known, n, trained)
    found: list[tuple[dict[str, float], dict[str, float]]] = []
    for k, fake in enumerate(drawn):
        order = torch.randperm(len(known), generator=generator(seed, "halves", k))
        a, b = known[order[:n]], known[order[n : 2 * n]]
        measure = _Measure(trained, tuple(skipped), permutations, seed + k)
        found.append((measure(a, fake), measure(a, b)))
    rows = [
        Row(name, *(Spread.of([pair[side][name] for pair in found]) for side in (0, 1)))
        for name in BETTER
        if name not in skipped
    ]
    return Panel(extractor.as_json(), n, seeds, tuple(rows), skipped, _words(source, n))


@dataclass(frozen=True)
class _Measure:
    trained: Tensor | None
    skipped: tuple[str, ...]
    permutations: int
    seed: int

    def __call__(self, real: Tensor, fake: Tensor) -> dict[str, float]:
        near = neighbourhoods(real, fake)
        test = mmd_test(real, fake, permutations=self.permutations, seed=self.seed)
        found = {
            "kid": kid(real, fake),
            "precision": near.precision,
            "recall": near.recall,
            "density": near.density,
            "coverage": near.coverage,
            "sliced_w2_squared": sliced_wasserstein(real, fake, seed=self.seed),
            "mmd2": test.mmd2,
            "mmd_p": test.p,
        }
        if "fid" not in self.skipped:
            found["fid"] = fid(real, fake)
        if self.trained is not None and "training_distance_ratio" not in self.skipped:
            found["training_distance_ratio"] = training_distance_ratio(real, fake, self.trained)
        return found


def _refusals(known: Tensor, n: int, trained: Tensor | None) -> dict[str, str]:
    """Scores that cannot be computed here, and why."""
    skipped = {}
    if n <= known.shape[1]:
        skipped["fid"] = (
            f"n={n} examples in {known.shape[1]} dimensions make singular covariances: take "
            f"n > {known.shape[1]}, or features of fewer dimensions"
        )
    if trained is None:
        skipped["training_distance_ratio"] = "No training rows were given"
        return skipped
    try:
        training_distance_ratio(known[:n], known[:n], trained)
    except InputRefused as refusal:
        skipped["training_distance_ratio"] = str(refusal)
    return skipped


def _size(real: int, source: Fakes, n: int | None) -> int:
    """n, as asked for or as many as there are."""
    most = real // 2
    if not callable(source):
        most = min(most, len(source))
    n = min(most, MOST) if n is None else n
    if not LEAST <= n <= most:
        held = "any number of" if callable(source) else str(len(source))
        raise InputRefused(
            f"n={n} rows on either side from {real} real and {held} generated ones: real rows are "
            f"halved to compare them with themselves, so that n can be {LEAST} to {most} here"
        )
    return n


def _fakes(
    source: Sampler | Tensor, n: int, seeds: int, seed: int, real: Tensor
) -> Iterator[Tensor]:
    """n rows for each seed."""
    before: Tensor | None = None
    for k in range(seeds):
        if not callable(source):
            yield _draw(source, n, seed, f"fakes {k}")
            continue
        with seeded(seed, "sampler", k):
            rows = _called(source, n, real)
        if before is not None and torch.equal(rows, before):
            raise InputRefused(
                "the sampler repeats itself: two calls gave the same rows. Let it draw from "
                "torch's global generator, or pass its samples as an array"
            )
        before = rows
        yield rows


def _called(sampler: Sampler, n: int, real: Tensor) -> Tensor:
    try:
        rows = _tensor(sampler(n))
    except (InputRefused, NumericalFailure):
        raise
    except Exception as error:  # whatever a user's sampler raises, with its traceback kept
        raise InputRefused(f"the sampler raised {type(error).__name__}: {error}") from error
    want = (n, *real.shape[1:])
    if tuple(rows.shape) != want:
        raise InputRefused(f"the sampler returned {tuple(rows.shape)}, asked for {want}")
    return rows


def _draw(rows: Tensor, n: int, seed: int, purpose: str) -> Tensor:
    """n of the rows without replacement."""
    return rows[torch.randperm(len(rows), generator=generator(seed, purpose))[:n]]


def _tensor(rows: object) -> Tensor:
    if isinstance(rows, np.ndarray):
        rows = torch.from_numpy(np.ascontiguousarray(rows))
    if not isinstance(rows, Tensor):
        raise InputRefused(f"examples are {type(rows).__name__}, expected a tensor or an array")
    return rows.detach().cpu()


def _words(source: Sampler | Tensor, n: int) -> str:
    if callable(source):
        return "each seed: a fresh sample, a new cut of the real rows, new random directions"
    if len(source) == n:
        return (
            f"each seed: the same {n} generated rows, a new cut of the real rows, new random "
            "directions; the spread between samples is not seen"
        )
    return (
        f"each seed: {n} of the {len(source)} generated rows, a new cut of the real rows, new "
        "random directions; subsets overlap, so the spread between samples is understated"
    )
