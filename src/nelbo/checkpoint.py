"""Checkpoints: directories of safetensors and JSON that exist completely or not at all.

A checkpoint is written under a temporary name, every file and the directory are fsynced, the
manifest last, and one rename gives it its name: a process killed at any moment leaves either the
whole checkpoint or none. The manifest holds size and SHA-256 of every file, the table of its
tensors, and a digest of itself; `load` believes nothing that does not agree with it. Removal runs
the same way backwards (rename, then delete), and only after a newer checkpoint has been verified.
What the tensors mean is not this module's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from nelbo.errors import InputRefused
from nelbo.files import exhausted, hidden, read_json, remove_directory, sync_directory, write_file

SCHEMA = 1
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 1 << 24
SUFFIX = ".safetensors"
_FIELDS = {"bytes", "sha256", "tensors"}
_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint: `info` as it was given, `tensors[stem][name]` on the CPU."""

    info: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def bytes_needed(tensors: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Payload of a checkpoint in bytes, headers and manifest apart."""
    return sum(t.numel() * t.element_size() for state in tensors.values() for t in state.values())


def save(
    directory: Path, tensors: Mapping[str, Mapping[str, Tensor]], info: Mapping[str, Any]
) -> None:
    """Write a checkpoint that exists completely or not at all.

    Arguments:
        directory: final name; must not exist.
        tensors: file stem -> tensor name -> tensor of any dtype and device.
        info: JSON values (finite numbers), given back by `load`.
    Raises:
        InputRefused: the directory exists already.
        ResourceExhausted: it could not be written; nothing is left of it, others are untouched.
    """
    if os.path.lexists(directory):
        raise InputRefused(f"{directory}: exists already, and a checkpoint is never overwritten")
    for stem in tensors:
        assert _STEM.fullmatch(stem), f"{stem!r} is no plain file name"
    # Through JSON and back, so that the digest sees what a reader will see (keys as strings).
    info = json.loads(json.dumps(dict(info), allow_nan=False))
    temporary = hidden(directory, "tmp")
    try:
        with exhausted(directory, bytes_needed(tensors)):
            _write(temporary, tensors, info)
            _publish(temporary, directory)
    except BaseException:
        # Best effort: the error under way says more than a failure to tidy up after it.
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(
    temporary: Path, tensors: Mapping[str, Mapping[str, Tensor]], info: Mapping[str, Any]
) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = {}
    for stem, state in tensors.items():
        own = _own(state)
        data = safetensors.save(own)
        write_file(temporary / f"{stem}{SUFFIX}", data)
        files[stem + SUFFIX] = {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "tensors": {name: _row(tensor) for name, tensor in own.items()},
        }
    manifest = {"schema": SCHEMA, "files": files, "info": info}
    text = json.dumps(manifest | {"digest": _digest(manifest)}, indent=1).encode()
    assert len(text) <= MANIFEST_LIMIT, "a manifest that could not be read back"
    write_file(temporary / MANIFEST, text)
    sync_directory(temporary)


def _publish(temporary: Path, directory: Path) -> None:
    os.rename(temporary, directory)
    try:
        sync_directory(directory.parent)
    except OSError:
        # An exception means "not saved", and a retry must find the name free.
        remove_directory(directory)
        raise


def _own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        pointer = plain.untyped_storage().data_ptr()
        own[name] = plain.clone() if pointer in seen else plain
        seen.add(pointer)
    return own


def _row(tensor: Tensor) -> dict[str, Any]:
    payload = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _kind(tensor) | {"crc32": zlib.crc32(payload.data)}


def _kind(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _digest(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def load(directory: Path) -> Loaded:
    """Read a checkpoint and verify every byte of it against its manifest.

    Raises:
        InputRefused: something is missing, extra, damaged or foreign; the message names the file
            and, where it can be told, the tensor.
    """
    try:
        manifest = _read_manifest(directory)
        _check_names(directory, manifest["files"])
        tensors = {
            name.removesuffix(SUFFIX): _read_tensors(directory / name, row)
            for name, row in manifest["files"].items()
        }
    except OSError as error:
        raise InputRefused(f"{directory}: cannot be read ({error.strerror or error})") from error
    return Loaded(manifest["info"], tensors)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if path.is_symlink():
        raise InputRefused(f"{path}: is a symbolic link; a checkpoint holds plain files only")
    manifest: dict[str, Any] = read_json(path, MANIFEST_LIMIT)
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise InputRefused(
            f"{path}: checkpoint format {schema!r}, but this version of nelbo reads {SCHEMA}; "
            "use the version that wrote it"
        )
    digest = manifest.pop("digest", None)
    if digest != _digest(manifest) or not _well_formed(manifest):
        raise InputRefused(f"{path}: damaged (its digest does not match); use another checkpoint")
    return manifest


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    files = manifest.get("files")
    return (
        isinstance(manifest.get("info"), dict)
        and isinstance(files, dict)
        and all(_STEM.fullmatch(name) and name.endswith(SUFFIX) for name in files)
        and all(isinstance(row, dict) and row.keys() == _FIELDS for row in files.values())
    )


def _check_names(directory: Path, files: Mapping[str, Any]) -> None:
    with os.scandir(directory) as entries:
        plain = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    expected = {MANIFEST, *files}
    faults = [f"{name}: missing" for name in sorted(expected - plain.keys())]
    faults += [f"{name}: not in the manifest" for name in sorted(plain.keys() - expected)]
    faults += [f"{name}: not a plain file" for name in sorted(plain) if not plain[name]]
    if faults:
        raise InputRefused(f"{directory}: {_list(faults)}; use another checkpoint")


def _read_tensors(path: Path, row: Mapping[str, Any]) -> dict[str, Tensor]:
    size = path.stat().st_size
    # A file far beyond its stated size is not worth reading to find out more.
    if size > 2 * row["bytes"] + (1 << 20):
        raise InputRefused(f"{path}: {size} bytes, but the manifest says {row['bytes']}")
    data = path.read_bytes()
    try:
        tensors = safetensors.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputRefused(
            f"{path}: truncated or damaged, {size} of {row['bytes']} bytes ({error}); "
            "use another checkpoint"
        ) from error
    found = {name: _row(tensor) for name, tensor in tensors.items()}
    faults = _differences(found, row["tensors"])
    if not faults and hashlib.sha256(data).hexdigest() != row["sha256"]:
        faults = ["SHA-256 does not match the manifest"]
    if faults:
        raise InputRefused(f"{path}: {_list(faults)}; use another checkpoint")
    return tensors


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Demand the names, shapes and dtypes of `expected`, nothing missing and nothing more.

    Raises:
        InputRefused: begins with `where` and names the tensors that differ.
    """
    faults = _differences(
        {name: _kind(tensor) for name, tensor in found.items()},
        {name: _kind(tensor) for name, tensor in expected.items()},
    )
    if faults:
        raise InputRefused(f"{where}: {_list(faults)}; it belongs to another model or version")


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    faults = [f"tensor {name!r} is missing" for name in expected if name not in found]
    faults += [f"tensor {name!r} is unexpected" for name in found if name not in expected]
    for name, row in expected.items():
        for field in ("shape", "dtype", "crc32"):
            have, want = found.get(name, row).get(field), row.get(field)
            if have != want:
                faults.append(f"tensor {name!r} has {field} {have}, expected {want}")
    return faults


def _list(faults: list[str], most: int = 8) -> str:
    more = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return ", ".join(faults[:most] + more)


def step_path(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies: `root/step-00012000`."""
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[tuple[int, Path]]:
    """Directories `step-%08d` below root by increasing step, valid or not."""
    if not root.is_dir():
        return []
    found = ((_STEP.fullmatch(path.name), path) for path in root.iterdir())
    return sorted((int(m[1]), p) for m, p in found if m and p.is_dir() and not p.is_symlink())


def newest_valid(root: Path) -> tuple[int, Loaded, list[str]]:
    """The newest checkpoint that verifies.

    Returns:
        its step, its content, and why each newer one was skipped.
    Raises:
        InputRefused: there is none.
    """
    problems: list[str] = []
    for step, path in reversed(steps(root)):
        try:
            return step, load(path), problems
        except InputRefused as error:
            problems.append(str(error))
    raise InputRefused("\n".join([f"{root}: holds no valid checkpoint", *problems]))


def prune(root: Path, keep: set[int]) -> list[int]:
    """Remove checkpoints that are not kept and older than the newest that verifies.

    Nothing is removed while none verifies, and what is newer than that one is left as evidence.

    Arguments:
        keep: steps to leave alone (best, last, the one resumed from).
    Returns:
        the steps removed.
    """
    old = [step for step, _ in steps(root) if step not in keep]
    try:
        newest = newest_valid(root)[0] if old else 0
    except InputRefused:
        return []
    removed = [step for step in old if step < newest]
    for step in removed:
        remove_directory(step_path(root, step))
    return removed
