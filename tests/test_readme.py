"""The README keeps its word: its commands exist, its Python runs, its test command is CI's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nelbo import cli
from nelbo.recipes.options import RECIPES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].split() for block in blocks("sh") for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "nelbo"]


def test_ci_runs_the_command_of_the_readme() -> None:
    command = "pip install -c constraints.txt '.[test]' && pytest"
    assert f"```sh\n{command}\n```" in README
    assert command in (ROOT / ".ci" / "run").read_text().replace("pip install -q", "pip install")


def test_the_main_job_is_the_default_recipe() -> None:
    assert "pip install -c constraints.txt . && nelbo train digits" in README
    assert "digits" in RECIPES


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_parses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With --help behind them the options are parsed; an unknown one exits with 2."""
    name = words[0]
    assert name in cli.COMMANDS
    if name == "train":
        assert words[1] in RECIPES
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in (w for w in words if w.startswith("--")):
        assert option in shown


def test_the_python_runs() -> None:
    """The block as printed, with fewer updates and examples so that it takes seconds."""
    (code,) = blocks("python")
    short = code.replace("range(1500)", "range(3)").replace("[:1000]", "[:50]")
    short = short.replace("grid(200)", "grid(8)")
    assert short != code
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", short], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"bound -?\d.* nats/example \(n=50\), entropy 0\.582\n", done.stdout)


def test_every_link_to_a_file_exists() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_torch_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==2\.13\.0$", pins, re.M)
    assert torch.__version__.startswith("2.")
