"""Files that are replaced completely or not at all, and JSON that is not believed blindly.

New content goes to a hidden sibling, `.tmp-NAME-PROCESS`, is fsynced, and takes its name by one
rename, so that a process killed at any moment leaves the old content or the new. What is to be
deleted is first renamed to `.trash-NAME-PROCESS`. `clean_temporary` sweeps up after the dead.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nelbo.errors import InputRefused, ResourceExhausted

STALE_SECONDS = 3600.0
_LEFTOVER = re.compile(r"\.(?:tmp|trash)-.+-(\d{1,9})")


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace a JSON file in one rename; a reader sees the old or the new one.

    Raises:
        ValueError: a number is not finite (write None for what is unknown).
        ResourceExhausted: it could not be written; the old file is intact.
    """
    data = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
    temporary = hidden(path, "tmp")
    try:
        with exhausted(path, len(data)):
            write_file(temporary, data)
            os.replace(temporary, path)
            sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path, limit: int = 1 << 20) -> Any:
    """Read a JSON file of at most `limit` bytes, with finite numbers and no repeated keys.

    Raises:
        InputRefused: missing, too large, not JSON; the message names the file.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputRefused(f"{path}: {size} bytes, the limit is {limit}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputRefused(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputRefused(f"{path}: cannot be read as UTF-8 ({error.reason})") from error
    try:
        return json.loads(
            text,
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=_unrepeated,
        )
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{path}: not a valid JSON file ({error})") from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"number {text} is not finite")
    return number


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is repeated")
    return dict(pairs)


def remove_directory(directory: Path) -> None:
    """Delete a directory such that a kill never leaves half of it under its name."""
    trash = hidden(directory, "trash")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(directory, trash)
    shutil.rmtree(trash)


def set_aside(directory: Path) -> Path:
    """Rename a refused directory, so that its name is free again and nothing is lost."""
    names = (directory.with_name(f"{directory.name}.refused-{i}") for i in range(10**6))
    aside = next(name for name in names if not os.path.lexists(name))
    os.rename(directory, aside)
    sync_directory(directory.parent)
    return aside


def clean_temporary(root: Path) -> list[Path]:
    """Remove what killed processes left behind; call it when no save is under way.

    Leftovers of living processes are spared for an hour: process numbers are used again, above
    all in containers, where a run's predecessor often had its own number.
    """
    cleaned = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _LEFTOVER.fullmatch(path.name)
        if match and (not _alive(int(match[1])) or _stale(path)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            cleaned.append(path)
    return cleaned


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _stale(path: Path) -> bool:
    return time.time() - path.lstat().st_mtime > STALE_SECONDS


@contextmanager
def exhausted(path: Path, needed: int) -> Iterator[None]:
    """Turn a failed write of `path` into ResourceExhausted, with the bytes needed and free."""
    try:
        yield
    except OSError as error:
        root = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(root).free
        raise ResourceExhausted(
            f"{path}: could not be written ({error.strerror or error}); {needed} bytes needed, "
            f"{free} bytes free in {root}. What was saved before is intact: make room there, "
            "then run again with --resume"
        ) from error


def hidden(path: Path, kind: str) -> Path:
    """The hidden sibling of a path, for this process and this kind of use (tmp, trash)."""
    return path.with_name(f".{kind}-{path.name}-{os.getpid()}")


def write_file(path: Path, data: bytes) -> None:
    """Write bytes and wait until the disk has them."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Wait until the disk has the names in a directory."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """Where what can be made again is kept: NELBO_CACHE, XDG_CACHE_HOME/nelbo or ~/.cache/nelbo.

    Raises:
        InputRefused: none is named, and the user has no home.
    """
    own = os.environ.get("NELBO_CACHE")
    if own:
        return Path(own)
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "nelbo"
    except RuntimeError as error:
        raise InputRefused("no home directory: name a folder by NELBO_CACHE") from error
