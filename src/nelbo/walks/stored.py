"""A run as it lies on disk, opened: recipe, data, and a model with the weights of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nelbo import checkpoint, console, distributed
from nelbo.commands import Elsewhere, Evaluate, Sample
from nelbo.data.base import Dataset
from nelbo.errors import InputRefused, UsageError
from nelbo.files import exhausted, hidden
from nelbo.interop.foreign import Assumptions
from nelbo.recipes import foreign
from nelbo.recipes.build import build
from nelbo.recipes.families import DIFFUSION, Run, restored
from nelbo.recipes.groups import Options
from nelbo.recipes.recipe import Subject
from nelbo.rundir import RunDirectory
from nelbo.speed import prepared

PLAYER = "model"


@dataclass(frozen=True)
class Stored:
    """An opened run: the subject's model holds the averaged weights of `step`.

    Arguments:
        assumed: what was assumed of a checkpoint of another code base; None for a run.
        keeps: whether figures are written to the directory, or printed alone; of several ranks the
            first writes.
    """

    directory: RunDirectory
    subject: Subject
    step: int
    info: dict[str, Any]
    assumed: dict[str, str] | None = None
    keeps: bool = True

    @property
    def part(self) -> Literal["test", "all"]:
        """The part of the data that is measured unless another one is asked for."""
        return "test" if self.assumed is None else "all"


def device_of(name: str) -> str:
    """The device that --device names.

    Raises:
        UsageError: it is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device was found; take --device cpu")
    return name


def options_of(directory: RunDirectory) -> Run:
    """The options with which a run was started."""
    written = directory.open()
    try:
        return restored(written["recipe"], written["options"], written.get("family", DIFFUSION))
    except (ValueError, TypeError, KeyError) as error:
        raise InputRefused(f"{directory.path / 'recipe.json'}: {error}") from error


def check_data(directory: RunDirectory, dataset: Dataset) -> None:
    """Refuse data that is no longer what the run was trained on."""
    before = directory.open().get("data", {}).get("sha256")
    now = dataset.record.get("sha256")
    if before != now:
        raise InputRefused(
            f"{dataset.record.get('path', dataset.name)}: the data changed since "
            f"this run was started (SHA-256 {str(now)[:12]}..., then {str(before)[:12]}...); "
            "put the old data back, or start a new run"
        )


def open_run(path: Path, which: str = "newest", device: str = "cpu") -> Stored:
    """Build the model of a run and load the averaged weights of a checkpoint.

    Arguments:
        which: "newest", "best" (by its validation), or a step number.
    Raises:
        InputRefused: no run, no valid checkpoint, data that changed, tensors that do not fit, or
            a game.
    """
    directory = RunDirectory(path)
    options = options_of(directory)
    if not isinstance(options, Options):
        raise InputRefused(
            f"{path}: a generator has no likelihood: nelbo compare data {path} measures its "
            "samples"
        )
    recipe = build(options)
    check_data(directory, recipe.dataset)
    step, loaded = choose(directory, which)
    state = loaded.tensors.get(f"{PLAYER}-ema", {})
    where = str(_at(directory, step))
    checkpoint.check_tensors(state, recipe.model.state_dict(), where)
    recipe.model.load_state_dict(state)
    recipe.model.to(device).eval()
    prepared(recipe.model.network, device)
    return Stored(directory, recipe, step, loaded.info, keeps=distributed.is_main())


def open_checkpoint(options: Evaluate | Sample, device: str) -> Stored:
    """A run, or a checkpoint of another code base, whichever the path holds.

    Raises:
        UsageError: options that fit the other kind only, or an --out that exists.
    """
    if foreign.is_foreign(options.run):
        return _open_foreign(options, device)
    given = [name for name in ("data", "size") if getattr(options, name, None) is not None]
    given += ["out"] if isinstance(options, Evaluate) and options.out is not None else []
    given += [k for k, v in vars(options.elsewhere).items() if v != getattr(Elsewhere(), k)]
    if given and options.run.exists():
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for checkpoints of other code bases; "
            f"{options.run} is none: a run is measured on its own data"
        )
    return open_run(options.run, options.checkpoint, device)


def opened(options: Evaluate, device: str) -> tuple[Stored, Evaluate]:
    """What `open_checkpoint` gives, and the options with the part of the data that is meant."""
    stored = open_checkpoint(options, device)
    return stored, dataclasses.replace(options, split=options.split or stored.part)


def opened_beside(options: Evaluate, path: Path, which: str, device: str) -> Stored:
    """Another run, or checkpoint of another code base, on the data of `options`."""
    there = dataclasses.replace(options, run=path, checkpoint=which, out=None)
    if not foreign.is_foreign(path):
        there = dataclasses.replace(there, data=None, size=None, elsewhere=Elsewhere())
    return open_checkpoint(there, device)


def _open_foreign(options: Evaluate | Sample, device: str) -> Stored:
    if options.checkpoint != "newest":
        raise UsageError(f"{options.run} holds one set of weights: leave out --checkpoint")
    said, data, size = options.elsewhere, None, None
    if isinstance(options, Evaluate):
        data, size = options.data, options.size
        if data is None:
            raise UsageError(f"{options.run} holds no data to measure it on: add --data PATH")
        if options.out is not None and options.out.exists():
            raise UsageError(f"{options.out} exists, and is not overwritten: name another --out")
    checkpoint = foreign.Checkpoint(
        path=options.run,
        assumptions=Assumptions(
            scaling=said.scaling,
            levels=said.levels,
            edge=said.edge,
            clip=said.clip,
            label=said.label,
        ),
        trust_pickle=said.trust_pickle,
        flags=said.flags,
    )
    subject, assumed = foreign.subject(checkpoint, data, size)
    subject.model.to(device).eval()
    directory = RunDirectory(options.run if options.out is None else options.out)
    keeps = options.out is not None and distributed.is_main()
    return Stored(directory, subject, 0, {}, assumed, keeps)


def assumptions(assumed: dict[str, str]) -> str:
    """What was assumed, one line each."""
    rows = [f"  {name:9}{text}" for name, text in assumed.items()]
    return console.clean("\n".join(["assumed, since the files do not say:", *rows]))


def choose(directory: RunDirectory, which: str) -> tuple[int, checkpoint.Loaded]:
    """The step and the tensors of the checkpoint that --checkpoint names."""
    if which == "newest":
        step, loaded, problems = checkpoint.newest_valid(directory.checkpoints)
        if (first := distributed.on_main(lambda: step)) != step:
            # a run that is still training: all ranks take what the first one found
            step, loaded = first, checkpoint.load(_at(directory, first))
        for problem in problems:
            console.say(f"skipped: {problem}")
        return step, loaded
    wanted = best_step(directory) if which == "best" else which
    known = [str(step) for step, _ in checkpoint.steps(directory.checkpoints)]
    if str(wanted) not in known:
        raise UsageError(
            f"--checkpoint {which}: of {directory.path} take newest, best or one of the steps "
            f"{', '.join(known)} (training keeps as many as --keep says)"
        )
    step = int(str(wanted))
    return step, checkpoint.load(_at(directory, step))


def _at(directory: RunDirectory, step: int) -> Path:
    return checkpoint.step_path(directory.checkpoints, step)


def best_step(directory: RunDirectory) -> int | None:
    """The checkpoint with the lowest validation figure; None if none was validated."""
    scores: list[tuple[float, int]] = []
    for step, path in checkpoint.steps(directory.checkpoints):
        score = _validation(path)
        if score is not None:
            scores.append((score, step))
    return min(scores)[1] if scores else None


def _validation(path: Path) -> float | None:
    try:
        info = checkpoint.load(path).info
    except InputRefused:
        return None  # an invalid checkpoint cannot be the best; loading it would say why
    value = info.get("validation")
    return None if value is None else float(value["mean"])


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Replace an .npz file in one rename.

    Raises:
        ResourceExhausted: it could not be written; the old file is intact.
    """
    temporary = hidden(path, "tmp")
    try:
        with exhausted(path, sum(np.asarray(a).nbytes for a in arrays.values())):
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
