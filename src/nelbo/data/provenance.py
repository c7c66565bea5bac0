"""The record of a data set: where it came from, what was done to it, checksums of its parts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nelbo.data.part import Part


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
        self,
        parts: Mapping[str, Part],
        rule: str,
        sums: Sequence[bytes] | np.ndarray,
        seed: int | None = None,
        ordered: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, Any]:
        """The JSON-able record.

        Arguments:
            parts: the examples of each part.
            rule: how they were split.
            sums: SHA-256 of each example as read; their order does not matter.
            seed: of the split or of the draws, where there is one.
            ordered: by part the sums of its examples in its order. Their SHA-256 also tells a part
                that is not in memory, whose bytes would have to be read again in its order.
        """
        split: dict[str, Any] = {"rule": rule, "seed": seed}
        for part, rows in parts.items():
            split[part] = {"n": len(rows)}
            if isinstance(rows, Tensor):
                split[part]["sha256"] = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
            if ordered is not None:
                split[part]["sha256_of_sums"] = hashlib.sha256(ordered[part].tobytes()).hexdigest()
        return {
            "name": self.name,
            "path": None if self.path is None else str(self.path),
            "sha256": _of_all(sums),
            "examples": sum(map(len, parts.values())),
            "shape": list(parts["train"].shape[1:]),
            "levels": self.levels,
            "split": split,
            "licence": self.licence,
            "conversions": dict(self.conversions),
            "skipped": list(self.skipped),
            "warnings": list(self.warnings),
        }


def _of_all(sums: Sequence[bytes] | np.ndarray) -> str:
    """SHA-256 of the sorted sums."""
    if isinstance(sums, np.ndarray):
        return hashlib.sha256(np.sort(sums).tobytes()).hexdigest()
    return hashlib.sha256(b"".join(sorted(sums))).hexdigest()
