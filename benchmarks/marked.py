"""Tables that programs write into pages, between two comments that readers do not see."""

from __future__ import annotations


def between(text: str, name: str, inside: str) -> str:
    """A page with what stands between the marks of this name replaced.

    Raises:
        ValueError: the page has no such marks.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if text.count(first) != 1 or text.count(last) != 1:
        raise ValueError(f"the page needs the marks {first.strip()} and {last} once each")
    before, rest = text.split(first)
    return f"{before}{first}{inside.strip()}\n{last}{rest.split(last)[1]}"
