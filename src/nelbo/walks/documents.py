"""What the documents of all measurements share: how they begin, and how they are shown."""

from __future__ import annotations

import json
from typing import Any

from nelbo.distributed import is_main
from nelbo.recipes.recipe import Subject
from nelbo.walks.stored import Stored, assumptions


def opening(subject: Subject, step: int, split: str, n: int) -> dict[str, Any]:
    """The schema, the data and the model: with them every document begins.

    Arguments:
        n: examples measured. step: of the checkpoint.
    """
    dataset = subject.dataset
    return {
        "schema": 1,
        "data": {
            "name": dataset.name,
            "split": split,
            "n": n,
            "dims": dataset.dims,
            "shape": list(dataset.shape()),
            "levels": dataset.levels,
            "sha256": dataset.record.get("sha256"),
        },
        "model": {"weights": "ema", "step": step, **subject.description},
    }


def marked(stored: Stored, value: dict[str, Any]) -> dict[str, Any]:
    """The document, with what was assumed of a checkpoint of another code base."""
    if stored.assumed is None:
        return value
    model = {**value["model"], "step": None}
    return {**value, "model": model, "assumed": stored.assumed}


def show(value: dict[str, Any], text: str, as_json: bool) -> None:
    """Print the document, or its text and what was assumed; of several ranks the first does."""
    if not is_main():
        return
    assumed = value.get("assumed")
    parts = [text, *([assumptions(assumed)] if assumed else [])]
    print(json.dumps(value, indent=1) if as_json else "\n\n".join(parts))
