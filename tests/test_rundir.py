"""The run directory: never overwritten, one writer at a time, and whole after any death."""

from __future__ import annotations

import errno
import json
import os
import shlex
from pathlib import Path

import pytest

from nelbo import rundir
from nelbo.errors import InputRefused, ResourceExhausted, UsageError
from nelbo.rundir import RunDirectory, default_path

ARGUMENTS = ["train", "digits", "--steps", "5", "--resume", "--out", "somewhere", "--seed=3"]


def made(path: Path) -> RunDirectory:
    directory = RunDirectory(path)
    directory.create({"recipe": "digits"}, ARGUMENTS)
    return directory


def test_what_a_new_directory_holds(tmp_path: Path) -> None:
    directory = made(tmp_path / "a" / "b")
    names = sorted(p.name for p in directory.path.iterdir())
    assert names == [".lock", "checkpoints", "evaluation", "recipe.json", "samples"]
    assert directory.open() == {"schema": 1, "recipe": "digits"} and directory.begun()


def test_an_existing_run_is_refused_with_two_commands(tmp_path: Path) -> None:
    path = tmp_path / "my run"
    made(path).release()
    before = sorted(p.name for p in path.rglob("*"))
    (tmp_path / "my run-2").mkdir()
    with pytest.raises(UsageError) as caught:
        made(path)
    lines = [shlex.split(line) for line in str(caught.value).splitlines() if line.startswith("  ")]
    kept = ["nelbo", "train", "digits", "--steps", "5", "--seed=3"]
    assert lines == [
        [*kept, "--out", str(path), "--resume"],
        [*kept, "--out", f"{path}-3"],
    ]
    assert sorted(p.name for p in path.rglob("*")) == before


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a run") as caught:
        made(tmp_path)
    assert "--resume" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]


def test_a_directory_without_files_is_as_good_as_none(tmp_path: Path) -> None:
    """What a start leaves that was killed before it wrote recipe.json."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".lock").touch()
    (tmp_path / ".tmp-recipe.json-1").write_text("{")
    assert made(tmp_path).begun()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "link"):
        with pytest.raises(UsageError, match="exists|cannot be made"):
            made(path)
    assert (tmp_path / "file").read_text() == "x"


def test_one_writer(tmp_path: Path) -> None:
    first = made(tmp_path / "run")
    with pytest.raises(UsageError, match="another process is writing"):
        RunDirectory(tmp_path / "run").lock()
    first.release()
    RunDirectory(tmp_path / "run").lock()


def test_the_lock_sweeps_up_after_the_dead(tmp_path: Path) -> None:
    owner = made(tmp_path / "run")
    left = owner.checkpoints / f".tmp-step-00000004-{os.getpid()}"
    left.mkdir()
    with pytest.raises(UsageError):
        RunDirectory(owner.path).lock()
    assert left.exists(), "the owner of the lock may be writing it"
    owner.release()
    RunDirectory(owner.path).lock()
    assert not left.exists()


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"no recipe.json"):
        RunDirectory(tmp_path).open()
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(InputRefused, match=r"recipe.json: not a valid JSON"):
        RunDirectory(tmp_path).open()
    (tmp_path / "recipe.json").write_text('{"schema": 7}')
    with pytest.raises(InputRefused, match="schema 7"):
        RunDirectory(tmp_path).open()


def test_status(tmp_path: Path) -> None:
    directory = made(tmp_path / "run")
    assert directory.seconds() == 0.0
    directory.status("stopped", 3, 9, "why", exit_code=143, seconds=1.5)
    assert json.loads((directory.path / "status.json").read_text()) == {
        "schema": 1,
        "state": "stopped",
        "step": 3,
        "steps": 9,
        "exit_code": 143,
        "message": "why",
        "seconds": 1.5,
    }
    assert directory.seconds() == 1.5


def steps(directory: RunDirectory) -> list[int]:
    text = (directory.path / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_metrics_are_added_and_rewound(tmp_path: Path) -> None:
    directory = made(tmp_path / "run")
    for step in range(1, 7):
        directory.metric({"step": step, "loss": 1.0})
    with open(directory.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    directory.rewind(4)
    assert steps(directory) == [1, 2, 3, 4]
    directory.metric({"step": 5})
    assert steps(directory) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="JSON compliant"):
        directory.metric({"step": 6, "loss": float("nan")})
    assert steps(directory) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("damage", [b"garbage\n", b'{"loss": 1}\n', b"[]\n", b"\xff\xfe\n", b"\n"])
def test_rewind_drops_damaged_lines(damage: bytes, tmp_path: Path) -> None:
    directory = made(tmp_path / "run")
    directory.rewind(0)
    directory.metric({"step": 1})
    with open(directory.path / "metrics.jsonl", "ab") as file:
        file.write(damage)
    directory.metric({"step": 2})
    directory.rewind(9)
    assert steps(directory) == [1, 2]


def test_a_full_disk_while_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = made(tmp_path / "run")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(ResourceExhausted, match=r"metrics.jsonl: could not be written"):
        directory.metric({"step": 1})


def test_log(tmp_path: Path) -> None:
    directory = made(tmp_path / "run")
    directory.log("first")
    directory.log("zweite Zeile äöü")
    lines = (directory.path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == ["first", "zweite Zeile äöü"]


def test_environment(tmp_path: Path) -> None:
    directory = made(tmp_path / "run")
    directory.environment("cpu")
    found = json.loads((directory.path / "environment.json").read_text())
    assert {"nelbo", "python", "torch", "platform", "device", "threads"} <= found.keys()
    assert found == rundir.environment("cpu")


def test_default_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NELBO_OUT", raising=False)
    assert default_path("digits") == Path("runs/digits")
    monkeypatch.setenv("NELBO_OUT", "/data/runs")
    assert default_path("digits") == Path("/data/runs/digits")
