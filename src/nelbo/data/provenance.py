"""The record of a data set: where it came from, what was done to it, checksums of its parts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Provenance:
    """What the record says of the source; `conversions` counts examples by what was done."""

    name: str
    path: Path | None
    levels: int | None
    licence: str = "not stated by the files"
    conversions: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        """What error messages name."""
        return self.name if self.path is None else str(self.path)

    def record(
        self, parts: dict[str, Tensor], rule: str, sums: Sequence[bytes], seed: int | None = None
    ) -> dict[str, Any]:
        """The JSON-able record.

        Arguments:
            parts: the examples of each part.
            rule: how they were split.
            sums: SHA-256 of each example as read; their order does not matter.
            seed: of the split or of the draws, where there is one.
        """
        split: dict[str, Any] = {"rule": rule, "seed": seed}
        for part, rows in parts.items():
            checksum = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
            split[part] = {"n": len(rows), "sha256": checksum}
        return {
            "name": self.name,
            "path": None if self.path is None else str(self.path),
            "sha256": hashlib.sha256(b"".join(sorted(sums))).hexdigest(),
            "examples": sum(map(len, parts.values())),
            "shape": list(parts["train"].shape[1:]),
            "levels": self.levels,
            "split": split,
            "licence": self.licence,
            "conversions": dict(self.conversions),
            "skipped": list(self.skipped),
            "warnings": list(self.warnings),
        }
