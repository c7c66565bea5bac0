"""The documents keep their word: links lead somewhere, commands parse, numbers come out."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from nelbo import cli
from nelbo.recipes.options import RECIPES

DOCS = Path(__file__).resolve().parents[1] / "docs"
NAMES = (
    "units",
    "likelihood",
    "conditioning",
    "steps",
    "interop",
    "flow",
    "samplers",
    "ddpm",
    "few_calls",
    "interop_openai",
    "metrics",
    "games",
    "scaling",
    "derivation",
    "speed",
)
PAGES = [DOCS / f"{name}.md" for name in NAMES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def commands() -> list[list[str]]:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    inline = [text for page in PAGES for text in re.findall(r"`(nelbo [^`]+)`", page.read_text())]
    words = [shlex.split(line) for line in [*lines, *inline]]
    own = [found[found.index("nelbo") :] for found in words if "nelbo" in found[:12]]
    return [found[1:] for found in own]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_that_hold_what_they_are_called(page: Path) -> None:
    links = re.findall(r"\[`?([^]`]+)`?\]\(([^)#]+)\)", page.read_text())
    assert links
    for name, target in links:
        file = (page.parent / target).resolve()
        assert file.is_file(), target
        if file.suffix == ".py" and "/" not in name and not name.endswith(".py"):
            source = file.read_text()
            for part in name.split("."):
                assert re.search(rf"\b(def|class|as) {part}\b|^    {part}: ", source, re.M), name


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert words[0] in cli.COMMANDS
    assert words[0] != "train" or words[1] in RECIPES
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words if word.startswith("--"))


def printed(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "docs", "exec"), {"__name__": "docs"})
    return out.getvalue()


def test_the_conversion_of_units_comes_out_as_printed() -> None:
    (code,) = blocks(DOCS / "units.md", "python")
    assert f"```\n{printed(code)}```" in (DOCS / "units.md").read_text()


def test_the_exact_game_comes_out_as_printed() -> None:
    code, _ = blocks(DOCS / "games.md", "python")
    assert f"```\n{printed(code)}```" in (DOCS / "games.md").read_text()


def test_the_certificate_comes_out_as_printed() -> None:
    """To .005 nats: fits may differ in rounding from machine to machine."""
    _, code = blocks(DOCS / "games.md", "python")
    shown = re.search(r"```\n(JSD >= .*?)```", (DOCS / "games.md").read_text(), re.S)
    assert shown is not None
    pattern = r"JSD >= (\d\.\d+) nats .*\nplug-in (\d\.\d+) ±"
    found, stated = (re.match(pattern, text) for text in (printed(code), shown[1]))
    assert found is not None and stated is not None
    numbers = [[float(x) for x in match.groups()] for match in (found, stated)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.005)


def test_the_plain_product_misses_what_the_weights_reach() -> None:
    """As the page prints it, to 0.03: sampling may differ in rounding from machine to machine."""
    (code,) = blocks(DOCS / "conditioning.md", "python")
    numbers = [float(x) for x in re.findall(r"(?:mean|variance) (-?\d\.\d+)", printed(code))]
    page = (DOCS / "conditioning.md").read_text()
    shown = re.search(r"```\n(plain product.*?)```", page, re.S)
    assert shown is not None
    stated = [float(x) for x in re.findall(r"(?:mean|variance) (-?\d\.\d+)", shown[1])]
    assert numbers == pytest.approx(stated, abs=0.03) and len(numbers) == 4
    assert abs(numbers[0] - 0.8) > 0.05 and abs(numbers[2] - 0.8) < 0.03


def test_a_function_is_measured_as_printed() -> None:
    """To 0.02 bits/dim: sampling may differ in rounding from machine to machine."""
    (code,) = blocks(DOCS / "interop.md", "python")
    found, assumed = printed(code).splitlines()
    page = (DOCS / "interop.md").read_text()
    shown = re.search(r"```\n(\d\.\d+) bits/dim\n(decoder variance.*)\n```", page)
    assert shown is not None and shown[2] == assumed
    assert float(found.split()[0]) == pytest.approx(float(shown[1]), abs=0.02)


def test_what_the_panel_sees_and_misses_comes_out_as_printed() -> None:
    """To a tenth of what is shown or .01: sampling may differ in rounding between machines."""
    page = (DOCS / "metrics.md").read_text()
    (code,) = blocks(DOCS / "metrics.md", "python")
    shown = re.search(r"```\n(modes 8 of 8.*?)```", page, re.S)
    assert shown is not None
    lines = [[line.split() for line in x.splitlines()] for x in (printed(code), shown[1])]
    found, stated = ({row[0]: row[1:] for row in rows if row[2:3] == ["±"]} for rows in lines)
    assert found.keys() == stated.keys() and len(found) == 10
    for name in found:
        numbers = [[float(row[k]) for k in (0, 3)] for row in (found[name], stated[name])]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.1, abs=0.01), name
