"""What a person sees: a live line on a terminal, plain lines elsewhere, tables, safe text."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from nelbo import console
from nelbo.console import Meter, clean, figure, table
from nelbo.estimate import Estimate


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_come_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Meter("train", 1000, "steps") as meter:
        for step in range(0, 1001, 10):
            meter.update(step, f"loss {step}")
            clock.now += 1.0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train 300/1000 steps (30 %), 10/s, 1:10 left, loss 300",
        "train 600/1000 steps (60 %), 10/s, 0:40 left, loss 600",
        "train 900/1000 steps (90 %), 10/s, 0:10 left, loss 900",
    ]
    assert "\r" not in err and "\x1b" not in err


def test_the_rate_of_a_continued_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What earlier starts did is no work of this one."""
    clock = Clock(monkeypatch)
    with Meter("train", 1000, "steps") as meter:
        meter.update(900)
        clock.now += 40
        meter.update(920)
    assert "920/1000 steps (92 %), 0.5/s, 2:40 left" in capsys.readouterr().err


def test_a_better_total(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Meter("evaluate", 1, "calls") as meter:
        meter.update(0, total=400)
        clock.now += 31
        meter.update(100, total=400)
    assert "evaluate 100/400 calls (25 %)" in capsys.readouterr().err


def test_quiet_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Meter("train", 10, "steps", quiet=True) as meter:
        clock.now += 100
        meter.update(5)
    assert isinstance(sys.stderr, Terminal) and sys.stderr.getvalue() == ""
    assert capsys.readouterr().out == ""


def live(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", **variables}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Meter("train", 10, "steps") as meter:
        for step in range(11):
            meter.update(step, "loss 1.234 bits/dim")
            time.sleep(0.02)
    return terminal.getvalue()


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d)[;\dm]")


def test_a_terminal_gets_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = live(monkeypatch)
    assert "loss 1.234 bits/dim" in text and "steps/s" in text and COLOUR.search(text)


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    text = live(monkeypatch, NO_COLOR="1")
    assert "loss 1.234 bits/dim" in text and not COLOUR.search(text)


def test_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", live(monkeypatch, NO_COLOR="1", COLUMNS="60"))
    assert max(len(line) for line in re.split(r"[\r\n]", text)) <= 60


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    text = live(monkeypatch, TERM="dumb")
    assert "\x1b" not in text and "\r" not in text and len(text.splitlines()) == 11


def test_a_bar_is_stopped_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    meter = Meter("train", 10, "steps")
    with pytest.raises(ZeroDivisionError), meter:
        raise ZeroDivisionError
    assert not meter.bar.live.is_started


def test_clean_removes_control_characters() -> None:
    assert clean("a\x1b[31mred\x07\r\nb\u202e") == "a?[31mred??\nb?"
    assert clean("λ ± äöü 数") == "λ ± äöü 数"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01")]
)
def test_clock(seconds: float, text: str) -> None:
    assert console._clock(seconds) == text


def test_figure() -> None:
    assert figure(Estimate(3.0214, 0.0041, 0.001, 100)) == "3.0214 ± 0.0041"


def test_table_columns_line_up() -> None:
    text = table([["prior", "1.25", "x"], ["a longer name", "-10.5", ""]], ["term", "nats", "n"])
    assert text.splitlines() == [
        "term            nats  n",
        "-------------  -----  -",
        "prior           1.25  x",
        "a longer name  -10.5",
    ]
