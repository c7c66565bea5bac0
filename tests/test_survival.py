"""Training processes that are really killed: what they leave continues to the same bits.

A server process imports the library once and forks a child for every start, so that a start costs
a second. The children are real processes that run the command line, and die by real signals.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import command

from nelbo import cli
from nelbo.checkpoint import load, step_path, steps

SERVER = """
import json, os, signal, sys
import nelbo.cli, nelbo.walks.train, nelbo.recipes.options
import torch._dynamo  # or every first optimiser imports it

def strike(number, k):
    # a signal to itself before the k-th call that makes something durable or gives it its name
    count = 0
    def wrap(real):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == k:
                os.kill(os.getpid(), number)
            return real(*arguments, **options)
        return call
    for name in ("fsync", "rename", "replace", "rmdir"):
        setattr(os, name, wrap(getattr(os, name)))

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        code = 1
        try:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            if order["at"]:
                strike(order["number"], order["at"])
            if not order["report"]:
                nelbo.report.write = lambda run: run
            code = nelbo.cli.main(order["arguments"])
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
ENVIRONMENT = {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


class Server:
    """Starts of the command line, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )

    def _read(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def start(self, arguments: list[str], **more: int) -> int:
        """Process number of a new start; see `run`."""
        assert self.process.stdin is not None
        order = {"at": 0, "number": signal.SIGKILL, "report": False, "log": str(self.log), **more}
        print(json.dumps(order | {"arguments": arguments}), file=self.process.stdin, flush=True)
        return self._read()

    def wait(self) -> int:
        """How the start ended: its exit code, or minus the signal."""
        return self._read()

    def run(self, arguments: list[str], **more: int) -> int:
        """Start and wait.

        Arguments:
            at: send `number` (SIGKILL) before this durable call, counted from 1; 0 for never.
            report: with the report, which takes longer than the rest of a tiny run.
        """
        self.start(arguments, **more)
        return self.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(30)


MORE = [
    *("--steps", "40", "--save-every", "5", "--validate-every", "10"),
    *("--dropout", "0.2", "--samples", "2"),
]


def start(path: Path) -> list[str]:
    """The same words for the first start and all later ones."""
    return command(path, *MORE, "--accumulation", "2", "--quiet", "--resume")


@pytest.fixture(scope="module")
def straight(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    path = tmp_path_factory.mktemp("straight") / "run"
    assert server.run(start(path)) == 0, server.log.read_text()
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    """Losses and validation bounds by step, without clocks."""
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k in ("step", "grad_norm", "lr", "validation")}
        for row in found
    ]


def assert_same(path: Path, straight: Path) -> None:
    one, other = (load(step_path(p / "checkpoints", 40)) for p in (straight, path))
    assert one.tensors.keys() == other.tensors.keys()
    assert {"model", "model-ema", "model-optimizer"} == one.tensors.keys()
    for group, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.tensors[group][name]), f"{group}: {name}"
    assert rows(path) == rows(straight)
    status = json.loads((path / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("finished", 40, 0)
    assert not [p for p in path.rglob(".*") if p.name != ".lock"], "nothing half-made is left"


def newest(path: Path, at_least: int) -> int:
    """The newest step; everything under a checkpoint's name is whole."""
    found = [step for step, folder in steps(path / "checkpoints") if load(folder)]
    assert max(found, default=0) >= at_least
    return max(found, default=0)


def test_killed_at_every_call_of_a_save(server: Server, straight: Path, tmp_path: Path) -> None:
    """Starts die before their k-th durable call: first in the making, then all through a save."""
    path, step, moved = tmp_path / "run", 0, 0
    for k in [*range(1, 24), 30, 40]:
        if server.run(start(path), at=k, report=True) != -signal.SIGKILL:
            break
        before, step = step, newest(path, step)
        moved += step > before
    assert k > 15 and moved > 2, "it died often, and yet got on"
    assert server.run(start(path)) == 0, server.log.read_text()
    assert_same(path, straight)


def test_killed_at_random_moments(server: Server, straight: Path, tmp_path: Path) -> None:
    draw, path, step, killed = random.Random(0), tmp_path / "run", 0, 0
    for _ in range(5):
        child = server.start(start(path))
        time.sleep(draw.uniform(0.1, 1.0))
        with contextlib.suppress(ProcessLookupError):  # it was done before
            os.kill(child, signal.SIGKILL)
        killed += server.wait() == -signal.SIGKILL
        step = newest(path, step)
    assert killed >= 1
    assert server.run(start(path)) == 0, server.log.read_text()
    assert_same(path, straight)


def wait_for(path: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_saves_and_stops(
    number: signal.Signals, code: int, server: Server, straight: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    assert server.run(start(path), at=30, number=number) == code, server.log.read_text()
    status = json.loads((path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", code)
    assert 5 <= status["step"] < 40 and f"after step {status['step']}; saved" in status["message"]
    assert newest(path, 5) == status["step"]
    log = server.log.read_text()
    assert "Continue with --resume" in log and "Traceback" not in log
    assert server.run(start(path)) == 0, server.log.read_text()
    assert f"after step {status['step']}" in server.log.read_text()
    assert_same(path, straight)


def test_a_signal_while_measuring(server: Server, straight: Path, tmp_path: Path) -> None:
    """Training is over and saved; the rest is done by the next start."""
    path = tmp_path / "run"
    child = server.start([*start(path), "--calls", "None"])
    wait_for(step_path(path / "checkpoints", 40))
    time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    code = server.wait()
    assert code in (0, 143, -signal.SIGTERM), server.log.read_text()
    if code == 143:  # else it was done, or between two handlers
        status = json.loads((path / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("stopped", 143)
    assert server.run(start(path)) == 0, server.log.read_text()
    assert_same(path, straight)


def test_two_signals_end_it_at_once(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "run"
    slow = ["--batch", "512", "--steps", "10000", "--save-every", "10000"]
    child = server.start([*start(path), *slow])
    wait_for(step_path(path / "checkpoints", 0))
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    os.kill(child, signal.SIGTERM)
    assert server.wait() in (143, -signal.SIGTERM)
    assert newest(path, 0) < 10000


def test_python_m_nelbo_is_stopped_like_any_process(tmp_path: Path) -> None:
    """The whole way: a process of its own, SIGTERM, the exit code that a shell sees."""
    path = tmp_path / "run"
    running = subprocess.Popen(
        [sys.executable, "-m", "nelbo", *start(path), "--steps", "100000"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    wait_for(step_path(path / "checkpoints", 0))
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 143 and "saved. Continue with --resume" in err
    assert json.loads((path / "status.json").read_text())["state"] == "stopped"
