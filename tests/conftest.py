"""One finished tiny run, trained once per test process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import command, silent


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from the cache of whoever runs the tests, or written to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NELBO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests may add evaluations to it, and change nothing."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    code, _, err = silent(command(path))
    assert code == 0, err
    return path


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without their report, which takes longer than the rest of a tiny run."""
    monkeypatch.setattr("nelbo.report.write", lambda run: run / "report.html")
