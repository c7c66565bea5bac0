"""The whole chain, computed once in a process of the tests."""

from __future__ import annotations

from functools import cache

from nelbo.derivation import chain
from nelbo.derivation.chain import Wrong
from nelbo.derivation.identity import Result


@cache
def everything() -> tuple[list[Result], list[Wrong]]:
    """All identities and all wrong variants, at seed 0."""
    return chain.run(chain.IDENTITIES), list(chain.errata())
