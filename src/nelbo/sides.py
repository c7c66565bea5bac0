r"""The two sides of a comparison, real and fake, brought to one form or refused.

A classifier finds any difference, also one that nobody meant: uint8 pixels against pixels that
were not rounded are told apart by "is it on the grid", and JSD = log 2 whatever the quality. So
both sides must be of one kind (integer levels or real vectors), one shape and one range. A sampler
that repeats itself has rows that are not independent, and no certificate is true of it.
"""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nelbo.data.sources import open_path
from nelbo.data.sums import digests
from nelbo.errors import InputRefused, ResourceExhausted
from nelbo.randomness import seeded

Source = Tensor | np.ndarray | Path | str
Sampler = Callable[[int], Tensor]
COPIES = 0.1
"""Share of copies above which rows have atoms, and draws from a density have not."""
SPANS, STEPS = 100.0, 4.0
"""Ratio of the ranges of two sides, of real vectors and of levels, that is no accident."""
AS_IS = "If they are independent, and the law has atoms, pass as_is=True (--as-is)"


def read(source: Source, what: str) -> Tensor:
    """Rows of a tensor, an array or a file: levels as uint8, everything else as float64.

    Arguments:
        source: (n, *shape) integers in 0..255, bits or floats; or a path that
            `nelbo.data.sources.open_path` reads, of which all parts are taken.
        what: the name of this side in messages.

    Raises:
        InputRefused: no rows, NaN or infinite values, integers beyond 0..255, complex values.
    """
    if isinstance(source, Path | str):
        return read(open_path(source).all, f"{what} ({source})")
    rows = _tensor(source, what)
    if rows.ndim < 2 or 0 in rows.shape:
        raise InputRefused(f"{what}: shape {tuple(rows.shape)}; give (n, *shape), n at least 1")
    if rows.is_complex():
        raise InputRefused(f"{what}: complex values; give their parts as real vectors")
    return _real_rows(rows, what) if rows.is_floating_point() else _levels(rows, what)


def _tensor(source: Tensor | np.ndarray, what: str) -> Tensor:
    if isinstance(source, Tensor):
        return source.detach().cpu()
    if not isinstance(source, np.ndarray):
        raise InputRefused(f"{what}: {type(source).__name__}; give a tensor, an array or a path")
    if source.dtype.kind not in "buif":
        raise InputRefused(f"{what}: values of type {source.dtype}; give integers or floats")
    # NumPy has byte orders, strides and widths that torch does not know.
    known = {"f": np.float64, "b": np.uint8}.get(source.dtype.kind, np.int64)
    return torch.from_numpy(np.array(source, np.uint8 if source.dtype == np.uint8 else known))


def _real_rows(rows: Tensor, what: str) -> Tensor:
    values = rows.double() + 0.0  # -0 and 0 are one value, so they have one digest
    bad = torch.nonzero(~torch.isfinite(values).flatten(1).all(1)).flatten()
    if len(bad):
        raise InputRefused(
            f"{what}: {len(bad)} of {len(rows)} rows hold NaN or infinite values, the first is "
            f"row {int(bad[0])}; such a row is no sample: mend what made it"
        )
    return values


def _levels(rows: Tensor, what: str) -> Tensor:
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high > 255:
        raise InputRefused(
            f"{what}: integers from {low} to {high}; levels are 0..255, anything else is a real "
            "vector: convert both sides to float"
        )
    return rows.to(torch.uint8)


def copies(rows: Tensor) -> float:
    """Share of rows that have an equal row before them."""
    return 1 - len(set(digests(rows.numpy()))) / len(rows)


class Fakes(ABC):
    """Where fakes come from: independent rows for each part of a certificate."""

    name: str

    @abstractmethod
    def most(self) -> int | None:
        """Rows that there are; None if as many as wanted."""

    @abstractmethod
    def draw(self, n: int, part: str) -> Tensor:
        """n rows (n, *shape) that no other part has."""


class Again(Fakes):
    """The same fakes for every certificate of a family: each part is drawn once."""

    def __init__(self, source: Fakes) -> None:
        self.source, self.name = source, source.name
        self._drawn: dict[str, Tensor] = {}

    def most(self) -> int | None:
        return self.source.most()

    def draw(self, n: int, part: str) -> Tensor:
        if part not in self._drawn:
            self._drawn[part] = self.source.draw(n, part)
        assert len(self._drawn[part]) == n, "every certificate must ask for the same parts"
        return self._drawn[part]


class Stored(Fakes):
    """Fakes of an array or a file, dealt out in an order fixed by the seed."""

    def __init__(self, source: Source, seed: int, name: str | None = None) -> None:
        self.rows = read(source, "the fakes")
        self.name = name or (str(source) if isinstance(source, Path | str) else "array")
        draws = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(len(self.rows), generator=draws)
        self._dealt = 0

    def most(self) -> int | None:
        return len(self.rows)

    def draw(self, n: int, part: str) -> Tensor:
        chosen = self._order[self._dealt : self._dealt + n]
        if len(chosen) < n:
            raise InputRefused(
                f"the fakes are {len(self.rows)} rows, {self._dealt + n} are needed for one fake "
                "per real; give more, or fewer reals (n=...)"
            )
        self._dealt += n
        return self.rows[chosen]


class Drawn(Fakes):
    """Fakes of a sampler n -> (n, *shape), each part from a seed of its own.

    Arguments:
        sampler: called under `nelbo.randomness.seeded`; it must draw from torch's global
            generator, or by its own means give other rows at each call.
        seed: of all calls.
        name: what certificates call it.
    """

    def __init__(self, sampler: Sampler, seed: int, name: str | None = None) -> None:
        self.sampler, self.seed = sampler, seed
        self.name = name or str(getattr(sampler, "__qualname__", type(sampler).__name__))
        self._calls = 0

    def most(self) -> int | None:
        return None

    def draw(self, n: int, part: str) -> Tensor:
        self._calls += 1
        call = f"the sampler {self.name}, call {self._calls} ({n} rows for {part})"
        try:
            # what a sampler prints is not a result
            out = contextlib.redirect_stdout(sys.stderr)
            with out, seeded(self.seed, "sampler", part), torch.no_grad():
                rows = self.sampler(n)
        except (MemoryError, ResourceExhausted):
            raise
        except (Exception, SystemExit) as error:
            raise InputRefused(
                f"{call}, raised {type(error).__name__}: {error}; it must return {n} rows"
            ) from error
        if not isinstance(rows, Tensor | np.ndarray):
            raise InputRefused(f"{call}, returned {type(rows).__name__}, not a tensor of rows")
        if rows.ndim < 2 or len(rows) != n:
            raise InputRefused(
                f"{call}, returned shape {tuple(rows.shape)}; it must return exactly ({n}, *shape)"
            )
        return read(rows, call)


def fakes(sampler: Sampler | Source | Fakes, seed: int, name: str | None = None) -> Fakes:
    """The fakes of a sampler, an array or a file.

    Raises:
        InputRefused: it is none of these, or `read` refuses the rows.
    """
    if isinstance(sampler, Fakes):
        return sampler
    if isinstance(sampler, Path | str) and (Path(sampler) / "recipe.json").is_file():
        raise InputRefused(
            f"{sampler} is a run: give nelbo.walks.opponents.run_sampler({str(sampler)!r}), or "
            "type nelbo compare"
        )
    if isinstance(sampler, Tensor | np.ndarray | Path | str):
        return Stored(sampler, seed, name)
    if not callable(sampler):
        raise InputRefused(
            f"a sampler is a function n -> (n, *shape), an array or a path, not "
            f"{type(sampler).__name__}"
        )
    return Drawn(sampler, seed, name)


def refuse_mismatch(real: Tensor, fake: Tensor, as_is: bool = False) -> None:
    """Refuse sides that differ in what no model was asked to learn (T14).

    Arguments:
        real, fake: rows as `read` gives them.
        as_is: let pass another range.

    Raises:
        InputRefused: another shape, kind of values, or range.
    """
    if real.shape[1:] != fake.shape[1:]:
        raise InputRefused(
            f"the reals have shape {tuple(real.shape[1:])}, the fakes {tuple(fake.shape[1:])}; "
            "bring both to one shape by the same steps"
        )
    if real.is_floating_point() != fake.is_floating_point():
        names = ["real numbers" if x.is_floating_point() else "levels" for x in (real, fake)]
        raise InputRefused(
            f"the reals are {names[0]}, the fakes {names[1]}: the type alone would tell them "
            "apart, JSD = log 2 whatever the quality. Round both to levels (uint8), or give both "
            "as floats after the same steps"
        )
    if real.is_floating_point():
        _refuse_grid(real, fake)
    if not as_is:
        _refuse_range(real, fake)


def _refuse_grid(real: Tensor, fake: Tensor) -> None:
    on = [bool((x == x.round()).all()) for x in (real, fake)]
    # A constant side is named as such elsewhere.
    if on[0] != on[1] and bool((fake != fake.flatten()[0]).any()):
        names = ["integers" if whole else "not rounded" for whole in on]
        raise InputRefused(
            f"the values of the reals are {names[0]}, those of the fakes {names[1]}: the grid "
            "alone would tell them apart. Round both, or add the same noise to both"
        )


def _refuse_range(real: Tensor, fake: Tensor) -> None:
    (a, b), (c, d) = ((float(x.min()), float(x.max())) for x in (real, fake))
    if real.is_floating_point():
        apart = d - c > SPANS * (b - a) or b - a > SPANS * (d - c)
    else:
        apart = d > STEPS * b or b > STEPS * d
    if apart and c < d:
        raise InputRefused(
            f"the reals lie in {a:g}..{b:g}, the fakes in {c:g}..{d:g}: the scale alone would "
            "tell them apart. Bring both to the same units; if the range is the sampler's own "
            "doing, pass as_is=True (--as-is)"
        )


def refuse_repeats(rows: Tensor, real: Tensor, what: str, earlier: Tensor | None = None) -> None:
    """Refuse fakes that repeat themselves more than the reals do.

    Arguments:
        rows: of one draw. real: reals. what: the sampler in messages. earlier: a draw before.

    Raises:
        InputRefused: a constant sampler, copies within a draw, or rows of an earlier draw again.
    """
    own, usual = digests(rows.numpy()), copies(real)
    kinds = len(set(own))
    if kinds == 1 < len(own) and len(set(digests(real.numpy()))) > 1:
        raise InputRefused(f"{what} is a constant sampler: all its {len(own)} rows are equal")
    atoms = usual > COPIES
    # A law with atoms may well be narrower than that of the reals; a few rows for ever may not.
    most = max(0.95, (1 + usual) / 2) if atoms else COPIES if rows.is_floating_point() else 0.5
    share = 1 - kinds / len(own)
    if share > most:
        raise InputRefused(
            f"{what}, repeats itself: {share:.0%} of its rows are copies of others (of the reals "
            f"{usual:.0%}); rows must be independent draws. {AS_IS}"
        )
    if earlier is None:
        return
    before = digests(earlier.numpy())
    again = len(set(own) & set(before)) / kinds
    short = min(len(own), len(before))
    replayed = kinds >= 4 and own[:short] == before[:short]
    if replayed or (not atoms and again > most):
        raise InputRefused(
            f"{what}, repeats itself: {again:.0%} of its rows came in an earlier call too; draw "
            f"from torch's global generator, which has another seed at each call. {AS_IS}"
        )
