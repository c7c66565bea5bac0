"""What `nelbo derive` can be told; see `commands`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Derive:
    """The derivation as numbers: every identity with its sides, and whether they agree."""

    what: tyro.conf.Positional[tuple[str, ...]] = ()
    """Identities (I7, telescoping), chapters (game), and at most one run directory, whose trained
    model and data are then looked at; everything, on small exact models, by default."""
    errata: bool = False
    """Instead: wrong variants from papers and lecture notes, which have to disagree."""
    examples: int | None = None
    """Of a run: how many of its test examples; by default about a minute's worth."""
    latents: int | None = None
    """Of a run: how many of the latents of its chain; by default about a minute's worth."""
    checkpoint: str = "newest"
    """Of a run: newest, best (by its validation), or a step."""
    seed: int = 0
    """Of the draws."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of a run: where to compute."""
    threads: int | None = None
    """CPU threads; 1 for the small models, which gain nothing from more."""
    page: Path | None = None
    """Write the whole chain as a page into this folder: HTML, Markdown and pictures. Of a run,
    derivation.html is always written, into its directory."""
    json: bool = False
    """Print one JSON document."""
    quiet: bool = False
    """No progress on stderr."""
