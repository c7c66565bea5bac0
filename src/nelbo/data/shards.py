"""Row groups of Parquet files: read whole, one column alone, the last few kept."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from nelbo.data.files import existing_file, reading, room, state
from nelbo.errors import InputRefused

SUFFIX = ".parquet"
IMAGE_NAMES, NUMBER_NAMES = ("image", "img", "bytes"), ("x", "data", "vector", "values")


class Shards:
    """Row groups of one column, of which the last few that were read are kept.

    Arguments:
        path: file or folder. column: see `parquet`.
    """

    def __init__(self, path: Path, column: str | None) -> None:
        self.path = path
        paths = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
        self.files = [existing_file(one) for one in paths]
        self.arrow = _arrow()
        self.states = [state(file) for file in self.files]
        opened = [self._open(file) for file in self.files]
        self.groups = [
            (number, group, file.metadata.row_group(group).num_rows)
            for number, file in enumerate(opened)
            for group in range(file.metadata.num_row_groups)
        ]
        self.ends = np.cumsum([rows for _, _, rows in self.groups], dtype=np.int64)
        if not len(self.ends) or not self.ends[-1]:
            raise InputRefused(f"{path}: holds no rows; write it again")
        self.column, self.encoded = self._choice(opened[0].schema_arrow, column)
        self.kept: OrderedDict[int, Any] = OrderedDict()
        self.lock = threading.Lock()
        self.most = room() // 4

    def __len__(self) -> int:
        return int(self.ends[-1])

    def group(self, number: int) -> Any:
        """An Arrow array: the rows of a group.

        Raises:
            InputRefused: its file is damaged, or changed.
        """
        with self.lock:
            if number not in self.kept:
                self.kept[number] = self._read(number)
                while len(self.kept) > 1 and sum(a.nbytes for a in self.kept.values()) > self.most:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(number)
            return self.kept[number]

    def where(self, row: int) -> tuple[int, int]:
        """Group of a row, and its place there."""
        group = int(np.searchsorted(self.ends, row, side="right"))
        return group, row - int(self.ends[group]) + self.groups[group][2]

    def _read(self, number: int) -> Any:
        file, group, _ = self.groups[number]
        path = self.files[file]
        with reading(path):
            if state(path) != self.states[file]:
                raise InputRefused(
                    f"{path}: changed while it was in use; put the old file back, or start a new "
                    "run"
                )
        read = self._open(path)
        try:
            found = read.read_row_group(group, columns=[self.column]).column(0).combine_chunks()
        except (self.arrow.ArrowException, OSError) as error:
            raise InputRefused(
                f"{path}: row group {group} is damaged ({error}); write it again"
            ) from error
        found = found.chunk(0) if hasattr(found, "chunk") else found
        found = found.field("bytes") if self.arrow.types.is_struct(found.type) else found
        if found.null_count:
            raise InputRefused(f"{path}: row group {group} has empty rows; take them out")
        return found

    def _open(self, path: Path) -> Any:
        try:
            return self.arrow.parquet.ParquetFile(path)
        except (self.arrow.ArrowException, OSError) as error:
            raise InputRefused(f"{path}: is no Parquet file ({error}); write it again") from error

    def _choice(self, schema: Any, column: str | None) -> tuple[str, bool]:
        """The column that is read, and whether it holds encoded images."""
        known = {name: self._kind(schema.field(name).type) for name in schema.names}
        usable = [name for name in schema.names if known[name] is not None]
        usual = [name for name in (*IMAGE_NAMES, *NUMBER_NAMES) if name in usable]
        found = [column] if column is not None else usable if len(usable) == 1 else usual[:1]
        if not found or found[0] not in usable:
            names = ", ".join(f"{name}: {schema.field(name).type}" for name in schema.names)
            raise InputRefused(
                f"{self.path}: which column holds images (bytes) or lists of numbers? It has "
                f"{names}; name one such column"
            )
        return found[0], bool(known[found[0]])

    def _kind(self, kind: Any) -> bool | None:
        """True for encoded images, False for lists of numbers, None for others."""
        types = self.arrow.types
        if types.is_struct(kind):
            names = [kind.field(i).name for i in range(kind.num_fields)]
            return True if "bytes" in names else None
        if types.is_binary(kind) or types.is_large_binary(kind):
            return True
        lists = types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind)
        plain = lists and (types.is_floating(kind.value_type) or types.is_uint8(kind.value_type))
        return False if plain else None

    @property
    def marks(self) -> str:
        """SHA-256 of names, sizes and times of the files, and of the column."""
        about = [(file.name, *one) for file, one in zip(self.files, self.states, strict=True)]
        return hashlib.sha256(repr((about, self.column)).encode()).hexdigest()


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputRefused(
            "Parquet files are read by pyarrow, which is not installed: pip install "
            "'nelbo[parquet]'"
        ) from error
    return pyarrow
