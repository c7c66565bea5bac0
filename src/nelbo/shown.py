"""The pictures of a comparison, from the files of a run directory alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from nelbo import figures, gamefigures
from nelbo.runfiles import Array, Json, Run

FIGURES = ("ladder", "sandwich", "witness", "convincing")


@dataclass(frozen=True)
class Picture:
    """One figure as PNGs: for the page, and for a phone where that needs another layout."""

    wide: bytes
    narrow: bytes | None = None

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height, from the PNG's header."""
        return int.from_bytes(self.wide[16:20], "big"), int.from_bytes(self.wide[20:24], "big")


def both(drawing: Callable[[float], bytes]) -> Picture:
    """A drawing for the page and for a phone."""
    return Picture(drawing(figures.WIDE), drawing(figures.NARROW))


def pictures(run: Run) -> dict[str, Picture]:
    """Every figure that the run's comparison allows, by name."""
    document, drawn = run.comparison, dict[str, Picture]()
    if len(document.get("ladder") or ()) > 1:
        drawn["ladder"] = both(partial(gamefigures.ladder, *_rungs(document["ladder"])))
    drawn |= _held(document.get("sandwich") or {})
    return drawn | _witness(run)


def _held(sandwich: Json) -> dict[str, Picture]:
    """Both sides on one axis, where there is more than one."""
    exact, upper = sandwich.get("exact") or {}, sandwich.get("jsd_nats_upper")
    known = exact.get("jsd_nats")
    if known is None and upper is None:
        return {}
    name = "after one blur" if exact.get("blurred") else "exact"
    sides = sandwich["jsd_nats_lower"], (name, known), upper
    return {"sandwich": both(partial(gamefigures.sandwich, *sides))}


def _rungs(ladder: list[Json]) -> tuple[Array, Array, Array]:
    """Log-SNR, certified and exact nats of the rungs; nan where nothing is known."""
    rows = [(r["logsnr"], r["certificate"]["jsd_nats_lower"], r.get("exact")) for r in ladder]
    table = np.array([[math.nan if x is None else x for x in row] for row in rows], float)
    return table[:, 0], table[:, 1], table[:, 2]


def _witness(run: Run) -> dict[str, Picture]:
    """D over the plane for vectors, the samples it takes for real most and least for images."""
    found = run.witness
    if "witness_learned" in found:
        plane = (found["witness_x"], found["witness_y"], found["witness_learned"])
        clouds = _cloud(run, "real"), _cloud(run, "samples")
        drawing = partial(gamefigures.witness, *plane, found.get("witness_optimal"), clouds)
        return {"witness": both(drawing)}
    if "witness_most" in found:
        logits = found["witness_most_logits"], found["witness_least_logits"]
        images = found["witness_most"], found["witness_least"], logits
        return {"convincing": both(partial(gamefigures.convincing, *images, _levels(run)))}
    return {}


def _levels(run: Run) -> int | None:
    levels: int | None = run.data.get("levels")
    return levels


def _cloud(run: Run, name: str) -> Array:
    points = run.samples.get(name, np.empty((0, 2)))
    return points if points.ndim == 2 and points.shape[1] == 2 else np.empty((0, 2))
