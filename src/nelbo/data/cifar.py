"""CIFAR-10's binary batches: records of one label byte and 3,072 bytes, planar RGB, 32x32.

The 50,000 images of data_batch_1..5.bin are trained on, the 10,000 of test_batch.bin tested on
(Krizhevsky, 2009). Whether the files are the published ones is checked by their MD5 sums.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from nelbo.data.base import Dataset
from nelbo.data.files import existing_file, existing_folder, reading
from nelbo.data.provenance import Provenance
from nelbo.data.splits import Rows, by_part, fractions
from nelbo.errors import InputRefused

PUBLISHED = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
TEST = "test_batch.bin"
FOLDER = "cifar-10-batches-bin"
RECORD = 3073
LICENCE = "none stated; A. Krizhevsky (2009) asks to be cited. Do not redistribute"


def cifar10(path: str | Path, *, validation: int | None = None) -> Dataset:
    """CIFAR-10, 256 levels, (3, 32, 32), with labels and its own test part.

    Arguments:
        path: the folder with the six .bin files, or the one above it.
        validation: number of training images to validate on; by default 5 %.

    Raises:
        InputRefused: a file is missing, cut off, or not of this format.
    """
    folder = existing_folder(path)
    if not (folder / TEST).exists() and (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    origin = Provenance("cifar10", folder, levels=256, licence=LICENCE)
    read = {name: _records(folder, name, origin) for name in PUBLISHED}
    train = np.concatenate([records for name, records in read.items() if name != TEST])
    if validation is None:
        (validation,) = fractions(len(train), str(folder), 0.05)
    return by_part(_rows(train), _rows(read[TEST]), origin, validation=validation)


def is_cifar10(folder: Path) -> bool:
    """Whether a folder holds the test batch, itself or one level down."""
    return (folder / TEST).exists() or (folder / FOLDER / TEST).exists()


def _records(folder: Path, name: str, origin: Provenance) -> np.ndarray:
    """(n, 3073) uint8."""
    _refuse_pickles(folder, name)
    path = existing_file(folder / name)
    with reading(path):
        data = path.read_bytes()
    if len(data) % RECORD:
        raise InputRefused(
            f"{path}: {len(data):,} bytes are not a whole number of records of {RECORD}; the file "
            "is truncated or of another kind, download it again"
        )
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != PUBLISHED[name]:
        origin.warnings.append(f"{name} is not the published file (its MD5 sum differs)")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    if records[:, 0].max() > 9:
        raise InputRefused(
            f"{path}: a label above 9; this is not CIFAR-10's binary version (CIFAR-100 has two "
            "label bytes), give the folder cifar-10-batches-bin"
        )
    return records


def _refuse_pickles(folder: Path, name: str) -> None:
    if not (folder / name).exists() and (folder / name.removesuffix(".bin")).exists():
        raise InputRefused(
            f"{folder}: holds the Python version of CIFAR-10, whose files are pickles and are not "
            f"opened; get the binary version ({FOLDER})"
        )


def _rows(records: np.ndarray) -> Rows:
    return Rows(records[:, 1:].reshape(-1, 3, 32, 32), labels=records[:, 0])
