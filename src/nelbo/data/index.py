"""What the first reading of a large set found, kept so that it is not read again.

An index holds the SHA-256 of every example and little more. It lies in the user's cache (the
directory NELBO_CACHE, else XDG_CACHE_HOME/nelbo, else ~/.cache/nelbo) and is found by a key: the
path, how the data are understood, and size and time of change of every file. It is believed if

1. its key is the one that is asked for, and its own SHA-256 is right;
2. SAMPLED examples, drawn anew at every start, have the sums that it says.

Otherwise the data are read from the beginning. A change of one example that alters neither size
nor time of its file escapes with probability 1 - SAMPLED/n; a folder of images is safer, since
every file is checked against its sum whenever it is decoded. Where the cache cannot be written,
the data are read at every start.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nelbo.files import cache_folder, hidden

SAMPLED = 256
VERSION = 1


@dataclass(frozen=True)
class Index:
    """What is kept of a set.

    Arguments:
        sums: (n,) S32, SHA-256 of the bytes of each example.
        about: what else is known, JSON-able. more: further arrays by name.
    """

    sums: np.ndarray
    about: dict[str, Any]
    more: dict[str, np.ndarray]


def recalled(key: dict[str, Any], agrees: Callable[[Index, np.ndarray], bool]) -> Index | None:
    """The index of a set, if there is one and it is right.

    Arguments:
        key: see the module.
        agrees: whether the examples with these numbers have the sums of the index.
    """
    found = _read(_path(key), key)
    if found is None:
        return None
    draws = np.random.default_rng(int.from_bytes(os.urandom(8), "big"))
    n = len(found.sums)
    return found if agrees(found, draws.choice(n, min(n, SAMPLED), replace=False)) else None


def remember(key: dict[str, Any], index: Index) -> None:
    """Keep an index; a cache that cannot be written is no error."""
    path = _path(key)
    arrays = {"sums": index.sums, **{f"more.{k}": v for k, v in index.more.items()}}
    head = {"key": _plain(key), "about": index.about, "sum": _sum(arrays)}
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    temporary = hidden(path, "tmp")
    try:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _read(path: Path, key: dict[str, Any]) -> Index | None:
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        head = json.loads(arrays.pop("head").tobytes())
        if head["key"] != _plain(key) or head["sum"] != _sum(arrays):
            return None
        more = {k.removeprefix("more."): v for k, v in arrays.items() if k != "sums"}
        return Index(arrays["sums"], head["about"], more)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None  # absent or damaged: the data are read again


def _path(key: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()
    return cache_folder() / "indexes" / f"{name[:32]}.npz"


def _plain(key: dict[str, Any]) -> Any:
    return json.loads(json.dumps({**key, "version": VERSION}, sort_keys=True))


def _sum(arrays: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()
