"""What a person sees: progress on stderr, results on stdout.

On a terminal progress is one live line with rate and time left; elsewhere it is a plain line every
30 seconds, without carriage returns or colours. Tables are plain text that fits 80 columns. Of
several ranks the first one speaks.
"""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

from nelbo.estimate import Estimate
from nelbo.ranks import is_main

PLAIN_SECONDS = 30.0


def say(text: str) -> None:
    """A line on stderr."""
    if not is_main():
        return
    print(text, file=sys.stderr, flush=True)


def clean(text: str) -> str:
    """Text without control characters, fit for a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


class Meter:
    """Progress of one task; a context manager.

    Arguments:
        title: what is being done. total: units in all. unit: name of a unit of work.
    """

    def __init__(self, title: str, total: int, unit: str, quiet: bool = False) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.quiet = quiet or not is_main()
        self.started = time.monotonic()
        self.first: int | None = None
        self.last = self.started
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Meter:
        if not self.quiet and _live():
            self.bar, self.task = _bar(self.title, self.total)
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Show that `done` units are done.

        Arguments:
            note: a figure to show beside it. total: a better count of all units.
        """
        self.total = self.total if total is None else total
        self.first = done if self.first is None else self.first
        if self.bar is not None:
            rate = f"{self._rate(done):.4g} {self.unit}/s"
            self.bar.update(self.task, completed=done, total=self.total, note=note, rate=rate)
        elif not self.quiet and time.monotonic() - self.last >= PLAIN_SECONDS:
            self.last = time.monotonic()
            say(self._line(done, note))

    def _rate(self, done: int) -> float:
        elapsed = time.monotonic() - self.started
        return (done - (self.first or 0)) / elapsed if elapsed > 0 else 0.0

    def _line(self, done: int, note: str) -> str:
        rate = self._rate(done)
        left = _clock((self.total - done) / rate) if rate > 0 else "?"
        share = 100 * done / max(self.total, 1)
        end = f", {note}" if note else ""
        return (
            f"{self.title} {done}/{self.total} {self.unit} ({share:.0f} %), "
            f"{rate:.4g}/s, {left} left{end}"
        )


def _live() -> bool:
    if os.environ.get("TERM") == "dumb":
        return False
    return sys.stderr.isatty()


def _bar(title: str, total: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )
    return bar, bar.add_task(title, total=total, note="", rate="")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def figure(estimate: Estimate) -> str:
    """`3.021 ± 0.004`: two digits of the error, no unit."""
    return str(estimate).split(f" {estimate.unit}", maxsplit=1)[0]


def table(rows: list[list[str]], header: list[str]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = []
    for number, row in enumerate(cells):
        parts = [
            row[k].ljust(widths[k]) if k == 0 else row[k].rjust(widths[k])
            for k in range(len(header))
        ]
        lines.append("  ".join(parts).rstrip())
        if number == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)
