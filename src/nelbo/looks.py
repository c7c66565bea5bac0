r"""How often data were looked at.

A certificate is true with probability 1 - alpha for one look at fresh pairs. Whoever looks M times
and shows the best must pay alpha/M each; who does not count cannot pay. The ledger is a file of
JSON lines that only grows: the look is written, and on the disk, *before* the set is opened, so
that a run that is killed has looked all the same.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from nelbo.errors import InputRefused
from nelbo.files import exhausted


class Ledger:
    """Looks at held-out reals, appended under a lock.

    Arguments:
        path: of the file; made at the first look, and its folder too.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def look(self, data_hash: str, about: str) -> int:
        """Write down one more look at the reals; how many there were, this one included.

        Arguments:
            data_hash: of the reals, however they are cut: another seed opens other pairs of them,
                not other reals.
            about: what looks at it: sampler, step, seed.

        Raises:
            InputRefused: the file holds something else. ResourceExhausted: it cannot be written.
        """
        with exhausted(self.path, 200):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                text = file.read()
                count: int = 1 + sum(line["data"] == data_hash for line in self._lines(text))
                # A line cut short by a kill is ended, not continued.
                start = "" if not text or text.endswith("\n") else "\n"
                line = json.dumps({"data": data_hash, "look": count, "about": about})
                file.write(f"{start}{line}\n")
                file.flush()
                os.fsync(file.fileno())
        return count

    def looks(self, data_hash: str) -> int:
        """Looks at the reals so far."""
        if not self.path.exists():
            return 0
        text = self.path.read_text(encoding="utf-8")
        return sum(line["data"] == data_hash for line in self._lines(text))

    def _lines(self, text: str) -> list[dict[str, Any]]:
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict) and isinstance(entry.get("data"), str):
                found.append(entry)
            elif not line.startswith('{"data": '[: len(line)]):
                raise InputRefused(
                    f"{self.path}: line {number} is no look at held-out reals; this is not a "
                    "ledger: give another file"
                )
        return found
