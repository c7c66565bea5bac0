"""All identities in the order in which a reader derives them, by chapters; found by id or name.

The chain begins with the likelihood of a latent variable model, takes it apart into the bound and
the bound into its Gaussian terms, goes on with what is trained and how it is measured, and ends
with the game and what a discriminator proves. Beside it stand the wrong variants, which have to
disagree: they show that the check can fail.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nelbo.derivation import (
    algebra,
    between,
    certified,
    conditioned,
    continuum,
    conventions,
    dequantised,
    divergences,
    draws,
    edges,
    evidence,
    flows,
    grids,
    inpainted,
    minima,
    minimax,
    multiplied,
    noise,
    omissions,
    onecurve,
    ratio,
    refinement,
    simpleweight,
    slack,
    slips,
    steps,
    strata,
    telescoping,
    twovariances,
    weights,
    wiener,
    wrongbounds,
    wrongterms,
)
from nelbo.derivation.identity import Erratum, Identity, Line, Result
from nelbo.errors import UsageError


@dataclass(frozen=True)
class Chapter:
    """Identities that belong together.

    Arguments:
        name: a word for the command line. title: a line for a reader.
    """

    name: str
    title: str
    identities: tuple[Identity, ...]


_MODULES: tuple[Any, ...] = (
    algebra,
    between,
    certified,
    conditioned,
    continuum,
    conventions,
    dequantised,
    divergences,
    draws,
    edges,
    evidence,
    flows,
    grids,
    inpainted,
    minima,
    minimax,
    multiplied,
    noise,
    omissions,
    onecurve,
    ratio,
    refinement,
    simpleweight,
    slack,
    slips,
    steps,
    strata,
    telescoping,
    twovariances,
    weights,
    wiener,
    wrongbounds,
    wrongterms,
)
"""Each with IDENTITIES and ERRATA."""
_ALL: tuple[Identity, ...] = tuple(one for module in _MODULES for one in module.IDENTITIES)


def _number(name: str) -> int:
    """7 of "I7"."""
    return int(name[1:])


def _chapter(name: str, title: str, first: int, last: int) -> Chapter:
    own = [one for one in _ALL if first <= _number(one.id) <= last]
    return Chapter(name, title, tuple(sorted(own, key=lambda one: _number(one.id))))


CHAPTERS: tuple[Chapter, ...] = (
    _chapter("likelihood", "From the likelihood to the bound", 1, 17),
    _chapter("gaussian", "The terms of the bound are squared errors", 18, 25),
    _chapter("objectives", "What is trained", 34, 38),
    _chapter("estimation", "How the bound is measured", 39, 46),
    _chapter("tighter", "Tighter than the bound", 47, 52),
    _chapter("conditioning", "Sampling under a condition", 53, 57),
    _chapter("game", "The game and the Jensen-Shannon divergence", 26, 33),
    _chapter("instrument", "What a discriminator proves", 61, 65),
)
IDENTITIES: tuple[Identity, ...] = tuple(one for c in CHAPTERS for one in c.identities)
ERRATA: tuple[Erratum, ...] = tuple(
    sorted((e for module in _MODULES for e in module.ERRATA), key=lambda e: _number(e.id))
)
LATER = {
    "I58": "the code length of a path: bits after less bits before = -log2 w(x_{1:N})",
    "I59": "the expected code length is L(x_0)/log 2",
    "I60": "initial bits: the largest deficit of bits that are popped before others are pushed",
}
"""Identities of bits-back coding, which come with the coder."""


@dataclass(frozen=True)
class Wrong:
    """A wrong variant beside the right value, computed."""

    erratum: Erratum
    line: Line
    seconds: float

    @property
    def caught(self) -> bool:
        """Whether it disagrees, as it has to."""
        return not self.line.agrees

    def as_json(self) -> dict[str, Any]:
        """Its JSON object."""
        one = self.erratum
        return {
            "id": one.id,
            "identity": one.identity,
            "printed": one.printed,
            "right": one.right,
            "why": one.why,
            "caught": self.caught,
            **self.line.as_json(),
            "seconds": self.seconds,
        }


def find(word: str) -> Identity:
    """An identity by its id, its name, or the id of an erratum that belongs to it.

    Raises:
        UsageError: there is none; names near ones.
    """
    return of_words([word])[0]


def of_words(words: Sequence[str]) -> list[Identity]:
    """The identities that are meant by ids, names, ids of errata, or names of chapters.

    Raises:
        UsageError: a word means none; names near ones.
    """
    found: dict[str, Identity] = {}
    for word in words:
        found |= {one.id: one for one in _meant(word)}
    return list(found.values())


def known(word: str) -> bool:
    """Whether a word means an identity or a chapter, if only one to come."""
    return word.lower() in _table() or word.upper() in LATER


def _meant(word: str) -> tuple[Identity, ...]:
    table = _table()
    if word.lower() in table:
        return table[word.lower()]
    later = LATER.get(word.upper())
    if later is not None:
        raise UsageError(
            f"{word.upper()} is of bits-back coding and comes with the coder, "
            f"which is not here yet: {later}"
        )
    near = difflib.get_close_matches(word.lower(), table, n=4, cutoff=0.5)
    shown = [name.upper() if re.fullmatch(r"[ei]\d+", name) else name for name in near]
    hint = f"near it are {', '.join(shown)}" if near else "`nelbo derive` lists them all"
    raise UsageError(f"no identity {word!r}: {hint}")


def _table() -> dict[str, tuple[Identity, ...]]:
    """What each word means; where an identity and a chapter share a name, the identity."""
    by_id = {one.id: one for one in IDENTITIES}
    table = {chapter.name: chapter.identities for chapter in CHAPTERS}
    table |= {e.id.lower(): (by_id[e.identity],) for e in ERRATA}
    table |= {one.name: (one,) for one in IDENTITIES}
    return table | {one.id.lower(): (one,) for one in IDENTITIES}


def errata_of(identity: Identity) -> list[Erratum]:
    """The wrong variants of an identity."""
    return [erratum for erratum in ERRATA if erratum.identity == identity.id]


def named_of(identity: Identity, words: Sequence[str]) -> list[Erratum]:
    """Those of its wrong variants that words name by their ids."""
    named = {word.upper() for word in words}
    return [erratum for erratum in errata_of(identity) if erratum.id in named]


def compute(identity: Identity, seed: int = 0) -> Result:
    """An identity with its lines."""
    started = time.perf_counter()
    lines = tuple(identity.lines(seed))
    return Result(identity, lines, time.perf_counter() - started)


def run(identities: Sequence[Identity], seed: int = 0) -> list[Result]:
    """All of them, in the order given."""
    return [compute(identity, seed) for identity in identities]


def tried(erratum: Erratum, seed: int = 0) -> Wrong:
    """A wrong variant beside the right value."""
    started = time.perf_counter()
    line = erratum.line(seed)
    return Wrong(erratum, line, time.perf_counter() - started)


def errata(seed: int = 0) -> Iterator[Wrong]:
    """All wrong variants, one after the other."""
    return (tried(erratum, seed) for erratum in ERRATA)


def document(results: Sequence[Result], wrong: Sequence[Wrong] = ()) -> dict[str, Any]:
    """The JSON document (schema 1)."""
    return {
        "schema": 1,
        "agrees": all(r.agrees for r in results) and all(w.caught for w in wrong),
        "identities": [result.as_json() for result in results],
        "errata": [one.as_json() for one in wrong],
    }
