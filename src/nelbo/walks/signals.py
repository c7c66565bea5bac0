"""Stopping on request: the first signal asks, the second one insists."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from nelbo.distributed import agree
from nelbo.ranks import launched

STOPS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """A context in which SIGTERM and SIGINT set a flag that the loop reads between updates.

    The second signal finds the handlers of before, so it ends the process at once. Not so under
    torchrun, which sends its own after that of a terminal, and kills what does not end.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        for number in STOPS:
            self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if not launched():
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def agree(self) -> None:
        """Ask all ranks to stop where one was asked; all of them come here between updates."""
        self.signal = agree(self.signal or 0) or None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self.signal or 0)


@contextmanager
def ending() -> Iterator[None]:
    """A context in which SIGTERM raises SystemExit(143), as SIGINT raises KeyboardInterrupt."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
