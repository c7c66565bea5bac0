"""The checkpoints of a run, failing disks and kill -9: one that was whole stays."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nelbo import files
from nelbo.checkpoint import (
    MANIFEST,
    load,
    newest_valid,
    prune,
    save,
    step_path,
    steps,
)
from nelbo.errors import InputRefused, ResourceExhausted

State = dict[str, dict[str, Tensor]]


def _state(step: int = 0, size: int = 50) -> State:
    weights = torch.arange(size, dtype=torch.float32) + step
    return {
        "model": {"net.weight": weights, "net.bias": torch.full((3, 2), float(step))},
        "optimizer": {"step": torch.tensor(step)},
    }


def _save(root: Path, step: int) -> Path:
    path = step_path(root, step)
    save(path, _state(step), {"step": step})
    return path


def test_prune_keeps_the_newest_valid(tmp_path: Path) -> None:
    for step in range(1, 6):
        _save(tmp_path, step)
    (step_path(tmp_path, 5) / MANIFEST).unlink()
    assert prune(tmp_path, {2}) == [1, 3]
    assert [s for s, _ in steps(tmp_path)] == [2, 4, 5]
    (step_path(tmp_path, 4) / MANIFEST).unlink()
    (step_path(tmp_path, 2) / MANIFEST).unlink()
    assert prune(tmp_path, set()) == [], "nothing is removed while nothing is valid"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-0000000{i}" for i in (2, 4, 5)]


def _failing(real: Callable[..., Any], at: int, code: int = errno.EIO) -> Callable[..., Any]:
    """The real call, failing the `at`-th time."""
    count = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    return call


_ACTIONS = st.lists(
    st.sampled_from(["save", "fail", "damage newest", "damage oldest", "prune", "prune all"]),
    max_size=12,
)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(_ACTIONS)
def test_retention(actions: list[str]) -> None:
    """After any history, what `newest_valid` returned before a prune is there after it."""
    with tempfile.TemporaryDirectory() as folder:
        root, best, step = Path(folder), 1, 1
        _save(root, step)
        for action in actions:
            if action == "save":
                step += 1
                _save(root, step)
            elif action == "fail":
                with pytest.MonkeyPatch.context() as patch, pytest.raises(ResourceExhausted):
                    patch.setattr(os, "rename", _failing(os.rename, at=1))
                    _save(root, step + 1)
            elif action.startswith("damage"):
                path = steps(root)[-1 if action == "damage newest" else 0][1]
                (path / MANIFEST).write_bytes(b"")
            else:
                _check_prune(root, {best, step} if action == "prune" else set())


def _check_prune(root: Path, keep: set[int]) -> None:
    before = [step for step, _ in steps(root)]
    valid = [step for step, path in steps(root) if _is_valid(path)]
    removed = prune(root, keep)
    after = [step for step, _ in steps(root)]
    assert sorted(after + removed) == before and not keep & set(removed)
    if valid:
        assert newest_valid(root)[0] == valid[-1]
        assert all(step in keep or step >= valid[-1] for step in after)
    else:
        assert removed == []
    assert len(list(root.iterdir())) == len(after)


def _is_valid(path: Path) -> bool:
    try:
        load(path)
    except InputRefused:
        return False
    return True


_CALLS = [("fsync", i) for i in range(1, 6)] + [("rename", 1), ("open", 1), ("open", 2)]


@pytest.mark.parametrize(("name", "at"), _CALLS)
def test_a_failing_call_saves_nothing_and_harms_nothing(
    name: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(ResourceExhausted, match="bytes free"):
        patch.setattr(os, name, _failing(getattr(os, name), at))
        _save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    _save(tmp_path, 2)
    assert newest_valid(tmp_path)[0] == 2, "the retry succeeds"


def test_the_order_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then manifest, then their directory, then the name, then the directory above."""
    events: list[str] = []
    sync, rename = os.fsync, os.rename

    def note_sync(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def note_rename(source: Path, target: Path) -> None:
        events.append(f"{source.name} -> {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    _save(tmp_path / "root", 1)
    hidden = f".tmp-step-00000001-{os.getpid()}"
    assert events == [
        "model.safetensors",
        "optimizer.safetensors",
        MANIFEST,
        hidden,
        f"{hidden} -> step-00000001",
        "root",
    ]


def test_a_write_that_stops_halfway(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    big = {"model": {"w": torch.zeros(10**5)}}
    with pytest.raises(ResourceExhausted, match="400000 bytes needed"), _file_size_limit(10**5):
        save(step_path(tmp_path, 2), big, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert newest_valid(tmp_path)[0] == 1


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        path = _save(disk, 1)
        big = {"model": {"w": torch.zeros(10**6)}}
        with pytest.raises(ResourceExhausted, match=r"No space left .* 4000000 bytes needed"):
            save(step_path(disk, 2), big, {})
        assert [p.name for p in disk.iterdir()] == [path.name] and load(path).info["step"] == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceExhausted, match=r"Not a directory|File exists"):
        _save(tmp_path / "file", 1)


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _forked(body: Callable[[], None]) -> int:
    """Run `body` in a forked child, which costs milliseconds where a new import costs seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    try:
        body()
    finally:
        os._exit(0)


def _train(root: Path) -> None:
    step = steps(root)[-1][0] if steps(root) else 0
    while True:
        step += 1
        save(step_path(root, step), _state(step, size=20_000), {"step": step})
        prune(root, {step})


def _check_survivors(root: Path, at_least: int) -> int:
    """Every directory under a valid name is whole, and the newest step never goes back."""
    for step, path in steps(root):
        loaded = load(path)
        assert loaded.info == {"step": step}
        assert torch.equal(loaded.tensors["model"]["net.bias"], torch.full((3, 2), float(step)))
    newest = steps(root)[-1][0] if steps(root) else 0
    assert newest >= at_least
    files.clean_temporary(root)
    assert len(list(root.iterdir())) == len(steps(root)), "nothing half-made is left"
    return newest


def test_kill_at_random_moments(tmp_path: Path) -> None:
    draw, newest = random.Random(0), 0
    for _ in range(60):
        child = _forked(lambda: _train(tmp_path))
        time.sleep(draw.uniform(0.002, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        newest = _check_survivors(tmp_path, newest)
    assert newest > 20, "the children must have been saving when they were killed"


_TOUCHED = ["open", "fsync", "rename", "rmdir", "unlink", "mkdir"]


@pytest.mark.parametrize("after", [False, True])
def test_kill_at_every_system_call(after: bool, tmp_path: Path) -> None:
    """Die before (or right after) the k-th call that touches the disk, for every k of a save."""
    newest = _check_survivors(_seed(tmp_path), 0)
    for k in range(1, 200):
        child = _forked(lambda k=k: _die_at(tmp_path, k, after))  # type: ignore[misc]
        status = os.waitpid(child, 0)[1]
        newest = _check_survivors(tmp_path, newest)
        if status == 0:
            break
    assert status == 0 and k > 12 and newest > 2
    assert len(steps(tmp_path)) == 1, "the call that was not killed pruned the rest"


def _seed(root: Path) -> Path:
    _save(root, 1)
    return root


def _die_at(root: Path, k: int, after: bool) -> None:
    count = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            result = real(*arguments, **options) if count < k or after else None
            if count >= k:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in _TOUCHED:
        setattr(os, name, wrap(getattr(os, name)))
    step = steps(root)[-1][0] + 1
    _save(root, step)
    prune(root, {step})
