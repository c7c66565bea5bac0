"""SHA-256 of examples, and arrays of such sums.

NumPy sorts and compares the type S32 as bytes, so that a sum takes 32 bytes and not the 73 of a
Python object in a list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def digests(values: np.ndarray) -> list[bytes]:
    """SHA-256 of each example's bytes, little-endian and in C order."""
    plain = np.ascontiguousarray(values)
    return [hashlib.sha256(row.tobytes()).digest() for row in plain]


def packed(sums: Sequence[bytes] | np.ndarray) -> np.ndarray:
    """(n,) S32."""
    return sums if isinstance(sums, np.ndarray) else np.array(sums, "S32")


def sums_of(values: np.ndarray) -> np.ndarray:
    """(n,) S32: SHA-256 of each example's bytes."""
    return packed(digests(values))
