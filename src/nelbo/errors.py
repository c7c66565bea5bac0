"""Errors that tell a user what to do, each with the exit code that the command line gives it.

Anything else that escapes is a bug of ours (exit code 1) and keeps its traceback.
"""

from __future__ import annotations

import errno


class UsageError(ValueError):
    """The command or its options are off; the message holds what to type instead (exit code 2)."""

    exit_code = 2
    told = False
    """Whether another rank says it."""


class InputRefused(ValueError):
    """A file, array or checkpoint is not what it should be; the message names it (exit code 3)."""

    exit_code = 3
    told = False


class NumericalFailure(RuntimeError):
    """A loss or a gradient is not finite; the message says at which step (exit code 4)."""

    exit_code = 4
    told = False


class ResourceExhausted(RuntimeError):
    """Disk or memory ran out; what was saved before is intact (exit code 5)."""

    exit_code = 5
    told = False


class RankLost(ResourceExhausted):
    """Another process of the same run failed or does not answer.

    Arguments:
        message: which one, and what to do. code: the exit code of that process, where it is known.
        told: it has said itself why, so that nothing is left to say.
    """

    def __init__(self, message: str, code: int = 5, told: bool = False) -> None:
        super().__init__(message)
        self.exit_code = code
        self.told = told


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends in this error; 1 if it is a bug of ours."""
    if isinstance(error, UsageError | InputRefused | NumericalFailure | ResourceExhausted):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return ResourceExhausted.exit_code if _is_exhausted(error) else 1


def _is_exhausted(error: BaseException) -> bool:
    """A full disk, or memory that torch did not get (it raises RuntimeError, not MemoryError)."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    words = ("out of memory", "can't allocate memory", "not enough memory")
    refused = isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    return refused or isinstance(error, MemoryError)
