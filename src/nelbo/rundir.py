"""The run directory: what a run is, where it stands, and everything it has measured.

    recipe.json  status.json  metrics.jsonl  log.txt  environment.json
    checkpoints/step-00012000/  evaluation/*.json + *.npz  samples/  report.html  report/*.png

A directory that exists is never overwritten; a run is continued with --resume only. One process
at a time may write to it (a lock that dies with the process), of several ranks the first one: on
the others status, lines and records are dropped. What a later start learns is added.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from nelbo import __version__
from nelbo.distributed import is_main, world_size
from nelbo.errors import InputRefused, UsageError
from nelbo.files import (
    clean_temporary,
    exhausted,
    hidden,
    read_json,
    write_file,
    write_json_atomic,
)

SCHEMA = 1


def default_path(name: str) -> Path:
    """runs/NAME, or NAME below the directory that NELBO_OUT names."""
    return Path(os.environ.get("NELBO_OUT", "runs")) / name


class RunDirectory:
    """One run on disk.

    Arguments:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def create(self, recipe: Mapping[str, Any], arguments: list[str]) -> None:
        """Make the directory and write what the run is.

        A directory that holds no file is as good as none: an earlier start may have been killed
        before it wrote anything.

        Raises:
            UsageError: it exists; the message holds the commands to type.
        """
        if os.path.lexists(self.path) and (not self.path.is_dir() or _holds_files(self.path)):
            raise UsageError(self._exists(arguments))
        try:
            for folder in (self.checkpoints, self.evaluation, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UsageError(
                f"{self.path}: cannot be made ({error.strerror}); name another --out"
            ) from error
        self.lock()
        write_json_atomic(self.path / "recipe.json", {"schema": SCHEMA, **recipe})

    def _exists(self, arguments: list[str]) -> str:
        rest = _without(arguments, "--out")
        n = next(i for i in range(2, 10_000) if not Path(f"{self.path}-{i}").exists())
        other = shlex.join(["nelbo", *rest, "--out", f"{self.path}-{n}"])
        if not self.begun():
            return f"{self.path} exists and is not a run. To start one beside it:\n  {other}"
        same = shlex.join(["nelbo", *rest, "--out", str(self.path), "--resume"])
        return (
            f"{self.path} exists, and nothing in it is overwritten. To continue that run:\n"
            f"  {same}\nTo start another one beside it:\n  {other}"
        )

    def begun(self) -> bool:
        """Whether there is a run here to continue."""
        return (self.path / "recipe.json").is_file()

    def open(self) -> dict[str, Any]:
        """Read recipe.json of a run that exists.

        Raises:
            InputRefused: this is not a run directory.
        """
        if not self.begun():
            raise InputRefused(
                f"{self.path}: not a run directory (no recipe.json); "
                "`nelbo train RECIPE` makes one"
            )
        recipe: dict[str, Any] = read_json(self.path / "recipe.json")
        if recipe.get("schema") != SCHEMA:
            raise InputRefused(
                f"{self.path / 'recipe.json'}: schema {recipe.get('schema')}, this version of "
                f"nelbo reads schema {SCHEMA}"
            )
        return recipe

    def lock(self) -> None:
        """Keep other processes from writing here, until this one ends.

        Raises:
            UsageError: another process is at it.
        """
        self._lock = open(self.path / ".lock", "w", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{self.path}: another process is writing to this run; wait for it or stop it"
            ) from None
        for folder in (self.path, *(p for p in self.path.iterdir() if p.is_dir())):
            clean_temporary(folder)

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def status(self, state: str, step: int, steps: int, message: str = "", **more: Any) -> None:
        """Replace status.json: state is running, finished, stopped or failed."""
        if not is_main():
            return
        value = {"schema": SCHEMA, "state": state, "step": step, "steps": steps}
        write_json_atomic(
            self.path / "status.json", {**value, "exit_code": None, "message": message, **more}
        )

    def seconds(self) -> float:
        """Training seconds of earlier starts."""
        try:
            return float(read_json(self.path / "status.json").get("seconds", 0.0))
        except InputRefused:
            return 0.0

    def metric(self, row: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        self._append("metrics.jsonl", json.dumps(row, allow_nan=False))

    def rewind(self, step: int) -> None:
        """Drop the lines of metrics.jsonl that are half-written or lie after `step`.

        A start that continues from `step` writes them again.
        """
        if not is_main():
            return
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        kept = b"".join(line + b"\n" for line in lines if _step_of(line) <= step)
        temporary = hidden(path, "tmp")
        with exhausted(path, len(kept)):
            write_file(temporary, kept)
            os.replace(temporary, path)

    def log(self, text: str) -> None:
        """Add a dated line to log.txt."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._append("log.txt", f"{stamp} {text}")

    def _append(self, name: str, line: str) -> None:
        path, data = self.path / name, line.encode() + b"\n"
        if not is_main():
            return
        with exhausted(path, len(data)), open(path, "ab") as file:
            file.write(data)

    def environment(self, device: str) -> None:
        """Write environment.json of this start."""
        if is_main():
            write_json_atomic(self.path / "environment.json", environment(device))


def environment(device: str) -> dict[str, Any]:
    """Versions and machine, for the record."""
    return {
        "nelbo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "ranks": world_size(),
        "command": shlex.join(["nelbo", *sys.argv[1:]]),
    }


def _holds_files(path: Path) -> bool:
    """Whether anything is lost if a run begins here."""
    ours = (".lock", ".tmp-")
    return any(not p.is_dir() and not p.name.startswith(ours) for p in path.rglob("*"))


def _step_of(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinite if the line is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _without(arguments: list[str], option: str) -> list[str]:
    """The arguments without an option and its value, and without --resume."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == option:
            skip = True
        elif not argument.startswith(f"{option}=") and argument != "--resume":
            kept.append(argument)
    return kept
