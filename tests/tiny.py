"""The smallest training run that has every part of a run: a few seconds, start to report."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from nelbo.cli import main

TINY = [
    *("--steps", "12", "--batch", "16", "--channels", "16", "--multipliers", "1", "1"),
    *("--attention", "--latents", "20", "--save-every", "4", "--validate-every", "6"),
    *("--validate-calls", "4", "--threads", "1", "--samples", "4", "--calls", "4"),
]


def command(out: Path, *more: str) -> list[str]:
    """`train digits` with the tiny configuration; later options win."""
    return ["train", "digits", *TINY, "--out", str(out), *more]


def silent(arguments: list[str]) -> tuple[int, str, str]:
    """Run a command in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()
