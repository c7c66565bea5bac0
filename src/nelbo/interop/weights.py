"""Tensors from files that other programs wrote, believed only as far as they can be checked.

Names, shapes and types are compared with what the network needs before a byte of payload is read,
and everything that is missing, extra or of another shape is named: a network with half of its
weights still at random looks like any other. Pickles can run code when they are opened, so a .bin,
.pt, .pth or .ckpt file is refused unless the user trusts it, and then only its tensors are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from nelbo.errors import InputRefused
from nelbo.files import read_json

HEADER_LIMIT = 1 << 24
SHARDS = 1000
NAMED = 4
"""How many tensors a refusal names before it counts the others."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SUFFIX, INDEX = ".safetensors", ".index.json"
_SAFE_TORCH = (2, 10)
_FLOATS = {"F64", "F32", "F16", "BF16"}

Shapes = dict[str, tuple[int, ...]]
Rename = Callable[[str], str]


def inside(path: Path, root: Path) -> Path:
    """The path, if it is a plain file that lies in `root` also after links are followed.

    Raises:
        InputRefused: it is missing, no file, or a link out of the folder.
    """
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputRefused(
            f"{path}: cannot be read ({getattr(error, 'strerror', error)})"
        ) from error
    if not real.is_relative_to(root.resolve()):
        raise InputRefused(
            f"{path}: is a link that leads out of {root}; copy the folder with its files first: "
            "cp -rL"
        )
    if not real.is_file():
        raise InputRefused(f"{path}: is not a plain file")
    return path


def locate(folder: Path, stem: str) -> list[Path]:
    """The files that hold the weights `stem` of a folder, safetensors before pickles.

    Raises:
        InputRefused: none is there; the message lists the names that were looked for.
    """
    single = [folder / f"{stem}{SUFFIX}", folder / f"{stem}{SUFFIX}{INDEX}"]
    variants = sorted(folder.glob(f"{stem}.*{SUFFIX}")) if folder.is_dir() else []
    for path in [*single, *variants, folder / f"{stem}.bin"]:
        if path.exists() or path.is_symlink():
            return _shards(path) if path.name.endswith(INDEX) else [path]
    raise InputRefused(
        f"{folder}: holds no weights ({stem}{SUFFIX}, {stem}{SUFFIX}{INDEX} or {stem}.bin)"
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each a plain name in the same folder."""
    value = read_json(inside(index, index.parent), HEADER_LIMIT)
    table = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise InputRefused(f"{index}: has no weight_map of tensor names to file names")
    names = sorted(set(table.values()))
    for name in names:
        plain = Path(name).name == name and name.endswith(SUFFIX) and "\\" not in name
        if not plain:
            raise InputRefused(
                f"{index}: names the shard {name!r}, which is not a plain {SUFFIX} file name"
            )
    if not 1 <= len(names) <= SHARDS:
        raise InputRefused(f"{index}: names {len(names)} shards, the limit is {SHARDS}")
    return [index.parent / name for name in names]


def header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, types and shapes of the tensors of a safetensors file; no payload is read.

    Raises:
        InputRefused: it is no safetensors file, or its header is too large.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise InputRefused(
                f"{path}: truncated or no safetensors file ({size} bytes, a header of {length})"
            )
        text = file.read(length)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"{path}: damaged header ({error})") from error
    rows = {k: v for k, v in value.items() if k != "__metadata__"} if _table(value) else None
    if rows is None or not all(_row(v) for v in rows.values()):
        raise InputRefused(f"{path}: damaged header (it is no table of tensors)")
    return rows


def _table(value: object) -> bool:
    return isinstance(value, dict)


def _row(value: Any) -> bool:
    shape = value.get("shape") if isinstance(value, dict) else None
    return isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)


def load(
    paths: list[Path],
    expected: Mapping[str, Tensor],
    rename: Rename = str,
    trust_pickle: bool = False,
) -> dict[str, Tensor]:
    """The tensors of some files, float32, exactly those that a network expects.

    Arguments:
        expected: name -> tensor of the right shape (on any device, also meta).
        rename: from the names in the file to those of the network.
        trust_pickle: whether a pickle may be opened.
    Raises:
        InputRefused: anything missing, unexpected, repeated, of another shape, or not finite.
    """
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} shards)"
    found: dict[str, Tensor] = {}
    names: Shapes = {}
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    safe = all(path.suffix == SUFFIX for path in paths)
    if safe:
        for path in paths:
            _add(names, {k: tuple(v["shape"]) for k, v in header(path).items()}, rename, path)
        check(names, shapes, where)
    for path in paths:
        _add(found, state_of(path, trust_pickle), rename, path)
    return exactly(found, shapes, where)


def _add(into: dict[str, Any], more: Mapping[str, Any], rename: Rename, path: Path) -> None:
    for name, value in more.items():
        own = rename(name)
        if own in into:
            raise InputRefused(f"{path}: tensor {name!r} is there twice")
        into[own] = value


def check(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Demand the names and shapes of `expected`, nothing missing and nothing more.

    Raises:
        InputRefused: begins with `where`; names the first tensors of each kind of fault.
    """
    shapes = [
        f"{name!r} is {_by(found[name])}, expected {_by(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = [
        *_list("missing", [repr(name) for name in expected if name not in found]),
        *_list("unexpected", [repr(name) for name in found if name not in expected]),
        *_list("of another shape", shapes),
    ]
    if faults:
        raise InputRefused(f"{where}: does not fit its configuration: {'; '.join(faults)}")


def exactly(
    found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Tensor]:
    """The tensors in float32, after `check`.

    Raises:
        InputRefused: as `check`, or a tensor that holds no real, finite numbers.
    """
    check({name: tuple(tensor.shape) for name, tensor in found.items()}, expected, where)
    return {name: _float(tensor, name, where) for name, tensor in found.items()}


def _list(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    count = f"{len(names)} tensor{'s' * (len(names) > 1)}"
    return [f"{count} {kind}: {', '.join(names[:NAMED])}{more}"]


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _float(tensor: Tensor, name: str, where: str) -> Tensor:
    if not tensor.is_floating_point():
        raise InputRefused(f"{where}: tensor {name!r} holds {tensor.dtype}, not real numbers")
    value = tensor.float().contiguous()
    if not bool(torch.isfinite(value).all()):
        raise InputRefused(f"{where}: tensor {name!r} holds NaN or infinite values")
    return value


def state_of(path: Path, trust_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of one file: safetensors, or a pickle that the user trusts.

    Raises:
        InputRefused: damaged, of another kind, or a pickle without --trust-pickle.
    """
    if path.suffix == SUFFIX:
        return _safetensors(path)
    if path.suffix not in PICKLES:
        kinds = ", ".join((SUFFIX, *PICKLES))
        raise InputRefused(f"{path}: is no file of weights that is read here ({kinds})")
    if not trust_pickle:
        raise InputRefused(
            f"{path}: is a pickle, which can run code when it is opened. Convert it to "
            f"{SUFFIX}, or, if you trust where it came from, add --trust-pickle (only tensors are "
            "read then)"
        )
    return _pickle(path)


def _safetensors(path: Path) -> dict[str, Tensor]:
    rows = header(path)
    kinds = {str(row.get("dtype")) for row in rows.values()} - _FLOATS
    if kinds:
        raise InputRefused(f"{path}: holds tensors of type {', '.join(sorted(kinds))}")
    try:
        return safetensors.load_file(path)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise InputRefused(f"{path}: truncated or damaged ({error}); fetch it again") from error


def _pickle(path: Path) -> dict[str, Tensor]:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _SAFE_TORCH:
        raise InputRefused(
            f"{path}: pickles are read with torch 2.10 or later only (this is "
            f"{torch.__version__}): before, even their tensors could run code"
        )
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle raises; nothing else is tried
        reason = str(error).split("\n")[0][:200]
        raise InputRefused(f"{path}: cannot be read as tensors alone ({reason})") from error
    if not isinstance(value, dict) or not all(isinstance(v, Tensor) for v in value.values()):
        raise InputRefused(f"{path}: is no table of tensors (a state_dict)")
    return {str(name): tensor for name, tensor in value.items()}
