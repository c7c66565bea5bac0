"""A module of the user's own as features: code by path, weights by path, both by hash.

`file.py:function` names a function that takes nothing and returns a torch module of
(B, *shape) -> (B, k). The file is Python and is run: it can do whatever its author wrote, so that
only a file that one trusts belongs here. Weights come from safetensors, which cannot run code, and
must fit the module exactly. The hash is SHA-256 over the SHA-256 of both files and over the
weights as they ended up in the module: code that reads further files cannot hide them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from nelbo.errors import InputRefused
from nelbo.extractors import Features, Inputs, digest_of
from nelbo.interop.weights import load
from nelbo.randomness import seeded

NAME = "nelbo_user_module"


def opened(where: str, inputs: Inputs, weights: Path | None = None) -> Features:
    """The features of a user's module.

    Arguments:
        where: "path/to/file.py:function".
        inputs: what it will read; images come in [-1, 1], vectors as stored, in the module's type.
        weights: safetensors with exactly the module's tensors; None: as the function left them.
            Weights drawn at random there are drawn from one fixed seed.
    Raises:
        InputRefused: no such file or function, it raises, it returns no module, or weights that
            do not fit.
    """
    path, name = _parts(where)
    code = _read(path)
    with seeded(0, "user module"):
        module = _made(function(where), where)
    files = [hashlib.sha256(code).hexdigest()]
    if weights is not None:
        files.append(hashlib.sha256(_read(weights)).hexdigest())
        module.load_state_dict(load([weights], module.state_dict()))
    note = f"{path.name} sha256 {files[0]}"
    if weights is not None:
        note += f", {weights.name} sha256 {files[1]}"
    digest = hashlib.sha256(":".join([*files, digest_of(module.state_dict())]).encode())
    return Features(f"{path.name}:{name}", inputs, module, digest=digest.hexdigest(), note=note)


def _parts(where: str) -> tuple[Path, str]:
    path, colon, function = where.rpartition(":")
    if not colon or not path.endswith(".py") or not function.isidentifier():
        raise InputRefused(f"{where!r}: name the function as path/to/file.py:function")
    return Path(path), function


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputRefused(f"{path}: cannot be read ({error.strerror or error})") from error


def function(where: str) -> Callable[..., Any]:
    """A function of the user's, which runs the file that it stands in.

    What the file or the function prints goes to stderr: it is not a result.

    Arguments:
        where: "path/to/file.py:function".
    Raises:
        InputRefused: no such file or function, or the file raises.
    """
    path, name = _parts(where)
    _read(path)
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(loaded)
    except (Exception, SystemExit) as error:  # whatever it raises, with its traceback kept
        raise InputRefused(f"{path}: raised {type(error).__name__}: {error}") from error
    found = getattr(loaded, name, None)
    if not callable(found):
        raise InputRefused(f"{path}: has no function {name!r}")
    made: Callable[..., Any] = found

    @functools.wraps(made)
    def quietly(*arguments: Any) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return made(*arguments)

    return quietly


def _made(make: Callable[..., Any], where: str) -> nn.Module:
    try:
        module = make()
    except Exception as error:  # as above
        raise InputRefused(f"{where}: raised {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise InputRefused(f"{where}: returned {type(module).__name__}, expected a torch module")
    return module
