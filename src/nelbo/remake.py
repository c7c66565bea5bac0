"""What to type to make a run and its figures again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from nelbo.runfiles import Run

ASIDE = frozenset({"path", "out", "resume"})


def commands(run: Run) -> list[str]:
    """What to type, in a clone of the repository, to make this run and its figures again."""
    commit, here = run.environment.get("commit"), shlex.quote(str(run.path))
    calls = re.search(r"-calls(\d+)-", run.measured.name)
    evaluation = f"nelbo evaluate {here}" + (f" --calls {calls[1]}" if calls else "")
    return [
        *([f"git checkout {shlex.quote(commit)}"] if commit else []),
        "pip install -c constraints.txt .",
        training(run),
        *([] if run.game else [evaluation]),
        *([comparison(run)] if run.game or run.comparison else []),
        f"nelbo sample {here}",
        f"nelbo report {here}",
    ]


def comparison(run: Run) -> str:
    """The command that measures a sampler against the run's own data."""
    return f"nelbo compare data {shlex.quote(str(run.path))}"


def training(run: Run) -> str:
    """The command that was typed, if the run kept it, else one of the same options."""
    typed = shlex.split(run.environment.get("command", ""))
    if typed[:2] == ["nelbo", "train"]:
        return shlex.join(word for word in typed if word != "--resume")
    options = run.recipe.get("options", {})
    path = [str(options["path"])] if options.get("path") is not None else []
    family = {"game": ["--game"], "diffusion": ["--no-game"]}.get(run.recipe.get("family", ""), [])
    words = ["nelbo", "train", run.recipe["recipe"], *path, *family, "--out", str(run.path)]
    for name, value in options.items():
        words += [] if name in ASIDE else _option(name, value)
    return shlex.join(words)


def _option(name: str, value: Any) -> Iterator[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        yield f"--{flag}" if value else f"--no-{flag}"
    elif isinstance(value, Mapping):
        for part, inner in value.items():
            yield from _option(f"{name}.{part}", inner)
    else:
        yield from (f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value)]))
