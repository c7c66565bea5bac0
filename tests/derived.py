"""The whole chain, computed once in a process of the tests; what every identity has to satisfy."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from nelbo.derivation import chain
from nelbo.derivation.chain import Wrong
from nelbo.derivation.identity import Identity, Result


@cache
def everything() -> tuple[list[Result], list[Wrong]]:
    """All identities and all wrong variants, at seed 0."""
    return chain.run(chain.IDENTITIES), list(chain.errata())


def exists(name: str) -> bool:
    """Whether a dotted name leads to a function, a class or a property."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part)
        return callable(value) or isinstance(value, property)
    return False


def check_statement(one: Identity) -> None:
    """It says what it is, and names functions that are there."""
    said = (one.title, one.latex, one.text, one.assumes, one.source)
    assert all(said) and len(one.steps) >= 2 and one.functions
    assert "$" not in one.latex
    for name in one.functions:
        assert exists(name), name


def check_lines(one: Identity, seed: int) -> None:
    """Its sides agree, and come from functions that are there."""
    for line in one.lines(seed):
        assert line.agrees, line
        for name in (side.by for side in line.sides if side.by):
            assert exists(name), name
