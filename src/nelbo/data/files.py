"""Opening what a user names: it exists, is not empty, can be read, and fits in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from nelbo.errors import InputRefused

LIMIT = 16 * 2**30
Cache = Literal["auto", "ram", "none"]


def existing(path: str | Path) -> Path:
    """The path, which exists.

    Raises:
        InputRefused: nothing is there, or only a broken link.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise InputRefused(f"{path}: is a link to nothing; mend it or give another path")
    if not path.exists():
        raise InputRefused(f"{path}: does not exist; check the spelling of the path")
    return path


def existing_file(path: str | Path) -> Path:
    """A regular file with something in it.

    Raises:
        InputRefused: missing, not a file, or zero bytes long.
    """
    path = existing(path)
    if not path.is_file():
        raise InputRefused(f"{path}: is not a file; give the data file itself")
    if path.stat().st_size == 0:
        raise InputRefused(f"{path}: is empty (0 bytes); copy or download it again")
    return path


def existing_folder(path: str | Path) -> Path:
    """A folder.

    Raises:
        InputRefused: missing, or not a folder.
    """
    path = existing(path)
    if not path.is_dir():
        raise InputRefused(f"{path}: is not a folder; give the folder that holds the data")
    return path


def refuse_above(limit: int, size: int, what: str) -> None:
    """Refuse data that would not fit.

    Raises:
        InputRefused: `size` bytes exceed `limit`.
    """
    if size > limit:
        raise InputRefused(
            f"{what}: declares {size:,} bytes of data, more than the limit of {limit:,}; if that "
            "is meant, split the data or raise the limit"
        )


def in_memory(size: int, cache: Cache, limit: int, what: str) -> bool:
    """Whether data is held in memory (auto: if it takes at most a quarter of what is free).

    Arguments:
        size: bytes. cache: what was asked for. limit: most bytes.

    Raises:
        InputRefused: it should be, and is above the limit.
    """
    if cache == "ram":
        refuse_above(limit, size, what)
    return cache == "ram" or (cache == "auto" and size <= min(limit, room()))


def room() -> int:
    """Bytes that one process may take for data: a quarter of the free memory, shared by ranks."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // (4 * max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's refusal to read a file into one that names it.

    Raises:
        InputRefused: no permission, or an error of the disk.
    """
    try:
        yield
    except OSError as error:
        raise InputRefused(f"{path}: cannot be read ({error.strerror or error})") from error


def state(file: Any) -> tuple[int, int]:
    """Size and time of change of a file."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns
