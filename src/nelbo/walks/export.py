"""Export: a run's model with its averaged weights, as a folder that another library loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nelbo import __version__
from nelbo.commands import Export
from nelbo.errors import InputRefused
from nelbo.interop.export import Origin, write
from nelbo.walks.played import is_game
from nelbo.walks.stored import open_run


def run(options: Export) -> dict[str, Any]:
    """`nelbo export`: open, convert, write, print where."""
    if is_game(options.run):
        raise InputRefused(
            f"{options.run}: a game's generator is no diffusion model, and --to {options.to} has "
            "no form for it; its weights are generator-ema.safetensors in each checkpoint"
        )
    stored = open_run(options.run, options.checkpoint)
    subject = stored.subject
    written = stored.directory.open()
    origin = Origin(
        name=options.out.resolve().name,
        recipe={"recipe": written["recipe"], "options": _public(written["options"])},
        data=_public(subject.dataset.record),
        step=stored.step,
        version=__version__,
    )
    dataset = subject.dataset
    write(options.out, subject.model, subject.times, dataset.shape(), dataset.levels, origin)
    value = {"schema": 1, "to": options.to, "folder": str(options.out), "step": stored.step}
    print(json.dumps(value) if options.json else options.out)
    return value


def _public(values: dict[str, Any]) -> dict[str, Any]:
    """The values with file names in place of paths, which are nobody else's business."""
    path = values.get("path")
    return {**values, "path": Path(path).name} if isinstance(path, str) else dict(values)
