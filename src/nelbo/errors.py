"""Errors that tell a user what to do, each with the exit code that the command line gives it.

Anything else that escapes is a bug of ours (exit code 1) and keeps its traceback.
"""

from __future__ import annotations


class UsageError(ValueError):
    """The command or its options are off; the message holds what to type instead (exit code 2)."""

    exit_code = 2


class InputRefused(ValueError):
    """A file, array or checkpoint is not what it should be; the message names it (exit code 3)."""

    exit_code = 3


class NumericalFailure(RuntimeError):
    """A loss or a gradient is not finite; the message says at which step (exit code 4)."""

    exit_code = 4


class ResourceExhausted(RuntimeError):
    """Disk or memory ran out; what was saved before is intact (exit code 5)."""

    exit_code = 5
