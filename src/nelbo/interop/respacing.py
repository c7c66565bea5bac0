"""Respacing strings: which steps of a chain of T are kept, as OpenAI's code bases write it.

"250" keeps 250 steps, "10,15,20" cuts the chain into three sections and keeps so many of each:
a section of `size` steps from `start` and count c gives

    start + round(m (size - 1)/(c - 1)),   m = 0..c-1,

first and last step of the section included (c = 1: the first). "ddim25" keeps 0, s, 2s, ... with
the smallest integer stride s that gives exactly 25 steps, which in general is without the last.

References:
    Nichol and Dhariwal (2021), section 4; Song, Meng, Ermon (2021), appendix D.2 ("ddim").
"""

from __future__ import annotations

from itertools import accumulate, repeat

from nelbo.errors import UsageError


def respacing(steps: int, spec: str) -> list[int]:
    """The 0-based numbers of the steps that are kept, increasing.

    Arguments:
        steps: T.
        spec: counts separated by commas, or "ddim" and a count; "" keeps all steps.

    Raises:
        UsageError: the string is not of this form, asks for more than a section holds, for no
            step at all, or for a count that no integer stride gives.
    """
    if spec.startswith("ddim"):
        return _strided(steps, _count(spec.removeprefix("ddim"), spec))
    counts = [_count(part, spec) for part in spec.split(",")] if spec else [steps]
    size, longer = divmod(steps, len(counts))
    sizes = [size + (section < longer) for section in range(len(counts))]
    starts = [0, *accumulate(sizes)]
    kept = []
    for start, size, count in zip(starts[:-1], sizes, counts, strict=True):
        kept += [start + offset for offset in _section(size, count, spec)]
    if not kept:
        raise UsageError(f"respacing {spec!r} keeps no step")
    return kept


def _section(size: int, count: int, spec: str) -> list[int]:
    if count > size:
        raise UsageError(
            f"respacing {spec!r} asks for {count} steps of a section that has {size}: ask for "
            f"{size} at most, or for fewer sections"
        )
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    # The position is a running sum, as in the original: a product would round elsewhere.
    return [round(x) for x in accumulate(repeat(stride, max(count - 1, 0)), initial=0.0)][:count]


def _strided(steps: int, count: int) -> list[int]:
    for stride in range(1, steps):
        if len(range(0, steps, stride)) == count:
            return list(range(0, steps, stride))
    raise UsageError(
        f"respacing 'ddim{count}': no integer stride keeps exactly {count} of {steps} steps; take "
        f"another count, or '{count}' without ddim"
    )


def _count(text: str, spec: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise UsageError(
            f"respacing {spec!r} is not understood: write '250', '10,15,20' or 'ddim25'"
        )
    return int(text)
