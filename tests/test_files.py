"""Files replaced completely or not at all, leftovers of the dead, JSON that is refused."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nelbo import files
from nelbo.errors import InputRefused, ResourceExhausted


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    files.write_json_atomic(path, {"a": [1, None, 0.1]})
    assert files.read_json(path) == {"a": [1, None, 0.1]}
    with pytest.raises(ValueError):
        files.write_json_atomic(path, {"a": float("inf")})
    with pytest.raises(ResourceExhausted, match="status.json"), _file_size_limit(10):
        files.write_json_atomic(path, {"b": "x" * 100})
    assert files.read_json(path) == {"a": [1, None, 0.1]}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not a valid JSON"),
        (b'{"a": NaN}', "not finite"),
        (b'{"a": -Infinity}', "not finite"),
        (b'{"a": 1e999}', "not finite"),
        (b'{"a": 1, "a": 2}', "repeated"),
        (b"[" * 10**5, "not a valid JSON"),
        (b"9" * 10**4, "not a valid JSON"),
        (b'"\xff"', "cannot be read"),
        (b" " * ((1 << 20) + 1), "limit"),
    ],
    ids=range(9),
)
def test_json_that_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(InputRefused, match=rf"x\.json.*{message}"):
        files.read_json(tmp_path / "x.json")


def test_json_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"x\.json: cannot be read"):
        files.read_json(tmp_path / "x.json")


def test_clean_temporary(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        dead = child.pid
    old = time.time() - files.STALE_SECONDS - 60
    names = {
        f".tmp-step-00000001-{dead}": True,
        f".trash-step-00000001-{dead}": True,
        f".tmp-step-00000002-{os.getpid()}": True,
        f".tmp-step-00000003-{os.getppid()}": False,
        f".trash-step-00000004-{os.getppid()}": True,
        "step-00000001": False,
        ".tmp-mine": False,
    }
    for name in names:
        (tmp_path / name / "inside").mkdir(parents=True)
    (tmp_path / f".tmp-status.json-{dead}").write_text("{")
    os.utime(tmp_path / f".trash-step-00000004-{os.getppid()}", (old, old))
    cleaned = {path.name for path in files.clean_temporary(tmp_path)}
    assert cleaned == {n for n, gone in names.items() if gone} | {f".tmp-status.json-{dead}"}
    assert {p.name for p in tmp_path.iterdir()} == {n for n, gone in names.items() if not gone}
    assert files.clean_temporary(tmp_path / "nothing") == []


def test_set_aside_frees_the_name_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "step-00000007"
    for i in range(2):
        path.mkdir()
        (path / "content").write_text(str(i))
        aside = files.set_aside(path)
        assert aside.name == f"step-00000007.refused-{i}" and not path.exists()
        assert (aside / "content").read_text() == str(i)


def test_a_directory_is_renamed_before_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step-00000007"
    (path / "inside").mkdir(parents=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rmdir", _interrupted)
        files.remove_directory(path)
    assert [p.name for p in tmp_path.iterdir()] == [f".trash-{path.name}-{os.getpid()}"]
    path.mkdir()
    files.remove_directory(path)
    assert list(tmp_path.iterdir()) == []


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
