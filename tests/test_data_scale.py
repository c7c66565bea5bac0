"""Data that do not fit in memory: the same split, batches and sums as in memory, and bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nelbo.data import files, part, statistics, survey
from nelbo.data.base import Dataset
from nelbo.data.part import Chosen, Lazy, head, pieces
from nelbo.data.sources import arrays, images, open_path
from nelbo.errors import InputRefused
from nelbo.files import cache_folder

PARTS = ("train", "validation", "test")


def levels(n: int = 300, channels: int = 3, side: int = 6) -> np.ndarray:
    found = np.random.default_rng(0).integers(0, 256, (n, channels, side, side), dtype=np.uint8)
    found[7] = found[3]  # copies stay together
    return found


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def pictures(folder: Path, n: int = 60, side: int = 8) -> Path:
    draws = np.random.default_rng(1)
    (folder / "below").mkdir(parents=True)
    for i in range(n):
        shape = (side, side) if i % 3 else (side, side, 3)
        pixels = draws.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("below" if i % 2 else ".") / f"{i}.png")
    return folder


def same(lazy: Dataset, kept: Dataset) -> None:
    assert lazy.rows is not None and kept.rows is not None
    for name in PARTS:
        asked, held = getattr(lazy, name), getattr(kept, name)
        assert isinstance(asked, Lazy) and isinstance(held, torch.Tensor)
        assert asked.shape == held.shape and len(asked) == len(held)
        rows = torch.randperm(len(held))[:7]
        assert torch.equal(asked[rows], held[rows]) and torch.equal(asked[:4], held[:4])
        assert torch.equal(asked[1], held[1]) and torch.equal(asked[:], held)
        assert torch.equal(torch.cat(list(pieces(asked, 13))), held)
        assert torch.equal(lazy.rows[name], kept.rows[name])
        assert torch.equal(lazy.encode(asked[:5]), kept.encode(held[:5]))
    one, two = (json.loads(json.dumps(d.record)) for d in (lazy, kept))
    for name in PARTS:
        # the bytes of a part in its own order are summed in memory alone
        assert len(two["split"][name].pop("sha256")) == 64
    assert one == two and lazy.offset() == kept.offset()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHW", "bool"])
def test_an_array_of_images_is_the_same_in_memory_and_on_disk(tmp_path, layout):
    array = {
        "NCHW": levels(),
        "NHWC": np.moveaxis(levels(), 1, 3).copy(),
        "NHW": levels()[:, 0],
        "bool": levels()[:, 0] > 127,
    }[layout]
    path = saved(tmp_path / "a.npy", array)
    same(arrays(path, cache="none"), arrays(path, cache="ram"))


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2"])
@pytest.mark.parametrize("at_once", [65_536, 50])
def test_vectors_are_the_same_to_the_last_bit(tmp_path, monkeypatch, dtype, at_once):
    monkeypatch.setattr(statistics, "AT_ONCE", at_once)
    array = np.random.default_rng(0).normal(3, 2, (200, 3)).astype(dtype)
    array[0, 0] = -0.0
    path = saved(tmp_path / "a.npy", array)
    lazy, kept = arrays(path, cache="none"), arrays(path, cache="ram")
    same(lazy, kept)
    assert torch.equal(lazy.shift, kept.shift)
    assert torch.equal(torch.as_tensor(lazy.scale), torch.as_tensor(kept.scale))
    assert isinstance(kept.train, torch.Tensor)
    assert torch.allclose(kept.shift, kept.train.mean(0), rtol=1e-13)
    spread = kept.train.std(0, correction=0)
    assert torch.allclose(torch.as_tensor(kept.scale), spread, rtol=1e-13)


def test_parts_of_an_npz_and_their_checksum(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x_train=levels(200), x_test=levels(40)[20:])
    same(arrays(path, cache="none"), arrays(path, cache="ram"))
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("x_test.npy")
    data = bytearray(path.read_bytes())
    data[info.header_offset + info.file_size - 5] ^= 1
    path.write_bytes(data)
    for cache in ("none", "ram"):
        with pytest.raises(InputRefused, match="x_test.*damaged.*CRC"):
            arrays(path, cache=cache)


def test_what_cannot_be_read_by_rows_is_said(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", levels())
    with pytest.raises(InputRefused, match="compressed"):
        arrays(tmp_path / "a.npz", cache="none")
    with pytest.raises(InputRefused, match="column by column"):
        arrays(saved(tmp_path / "b.npy", np.asfortranarray(levels())), cache="none")
    array = np.random.default_rng(0).normal(size=(9000, 2))
    array[8888, 1] = np.nan
    with pytest.raises(InputRefused, match="row 8888, column 1"):
        arrays(saved(tmp_path / "c.npy", array), cache="none")
    with pytest.raises(InputRefused, match="truncated"):
        path = saved(tmp_path / "d.npy", levels())
        path.write_bytes(path.read_bytes()[:-1])
        arrays(path, cache="none")


def test_what_fits_is_held_in_memory(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.npy", levels())
    assert isinstance(open_path(path).train, torch.Tensor)
    monkeypatch.setattr("nelbo.data.files.room", lambda: 1000)
    assert isinstance(open_path(path).train, Lazy)
    assert isinstance(open_path(path, cache="ram").train, torch.Tensor)
    assert isinstance(open_path(pictures(tmp_path / "p")).train, Lazy)


def test_room_is_shared_by_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = files.room()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert 0 < files.room() < alone / 100


def test_too_many_rows_at_once_are_refused(tmp_path, monkeypatch):
    data = arrays(saved(tmp_path / "a.npy", levels()), cache="none")
    monkeypatch.setattr(part, "LIMIT", 1000)
    with pytest.raises(InputRefused, match="do not fit in memory.*--limit"):
        data.train[:]
    assert isinstance(head(data.train, 100), Chosen) and len(head(data.train, 100)) == 100
    assert head(data.train, None) is data.train


def test_a_file_that_changes_under_a_run_is_refused(tmp_path):
    path = saved(tmp_path / "a.npy", levels())
    data = arrays(path, cache="none")
    saved(path, levels()[::-1])
    with pytest.raises(InputRefused, match=r"a\.npy: changed while it was in use"):
        data.train[:3]


# --- the index ---------------------------------------------------------------------------------


def test_an_index_spares_the_pass_and_is_not_trusted_blindly(tmp_path, monkeypatch):
    monkeypatch.setenv("NELBO_CACHE", str(tmp_path / "cache"))
    path = saved(tmp_path / "a.npy", levels())
    before, known = arrays(path, cache="none"), path.stat()
    passes = counted(monkeypatch, "nelbo.data.mapped.Mapped._pass")
    assert arrays(path, cache="none").record == before.record and passes == []

    (kept,) = (tmp_path / "cache" / "indexes").iterdir()
    whole = kept.read_bytes()
    for at in (len(whole) // 2, 200):  # a damaged index
        kept.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert arrays(path, cache="none").record == before.record
    assert len(passes) == 2

    changed = levels()
    changed[:200] ^= 1  # the same size, and the time put back
    saved(path, changed)
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    after = arrays(path, cache="none")
    assert len(passes) == 3 and after.record["sha256"] != before.record["sha256"]
    assert after.record["sha256"] == arrays(path, cache="ram").record["sha256"]


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Calls of a function from now on."""
    module, kind, function = name.rsplit(".", 2)
    home = sys.modules.get(f"{module}.{kind}") or getattr(sys.modules[module], kind)
    own, calls = getattr(home, function), []

    def count(*given, **named):
        calls.append(name)
        return own(*given, **named)

    monkeypatch.setattr(home, function, count)
    return calls


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NELBO_CACHE", str(tmp_path / "file"))
    assert len(arrays(saved(tmp_path / "a.npy", levels()), cache="none").train)


def test_where_indexes_lie(monkeypatch):
    monkeypatch.delenv("NELBO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/nelbo")


# --- memory ------------------------------------------------------------------------------------

SPARSE = """
import resource, sys
import numpy as np, torch
from nelbo.data.sources import arrays
from nelbo.data import mapped
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
data = arrays(sys.argv[1], cache="none")
after = peak()
for step in range(10):
    data.encode(data.train[torch.randint(len(data.train), (32,))])
print(after - before, peak() - after)
"""


def test_memory_is_bounded_on_a_file_of_a_quarter_of_a_gibibyte(tmp_path):
    n, shape = 1024, (3, 296, 296)
    path = tmp_path / "a.npy"
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (n, *shape))
    array[:, 0, 0, :2] = np.arange(2 * n, dtype=np.uint16).view(np.uint8).reshape(n, 4)[:, :2]
    del array
    assert path.stat().st_size > 2**28
    found = subprocess.run(
        [sys.executable, "-c", SPARSE, str(path)], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    opening, reading = map(int, found.stdout.split())
    assert opening < 130 * 2**20
    # 10 batches of 32: 80 MiB of rows as levels, of which one batch (and its floats, 32 MiB) is
    # held; pages of the file that were touched are the system's, and are counted here too
    assert reading < 200 * 2**20


def test_the_pass_over_a_folder_holds_a_window_of_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "WINDOW_BYTES", 2**18)
    folder = tmp_path / "p"
    folder.mkdir()
    for i in range(64):
        pixels = np.full((256, 256), i, np.uint8)
        pixels[0, :2] = i, 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
    tracemalloc.start()
    data = images(folder, cache="none")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.train) == 55 and peak + 2**20 < 64 * 2**16


# --- folders -----------------------------------------------------------------------------------


def test_a_folder_is_the_same_in_memory_and_on_disk(tmp_path):
    folder = pictures(tmp_path / "p")
    lazy, kept = images(folder, cache="none"), images(folder, cache="ram")
    same(lazy, kept)
    assert kept.record["conversions"] == {"grey to RGB": 40} and kept.shape() == (3, 8, 8)
    same(images(folder, size=5, cache="none"), images(folder, size=5, cache="ram"))
    grey = images(folder, channels=1, cache="none")
    same(grey, images(folder, channels=1, cache="ram"))


def test_the_index_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NELBO_CACHE", str(tmp_path / "cache"))
    folder = pictures(tmp_path / "p")
    before = images(folder, cache="none")
    passes = counted(monkeypatch, "nelbo.data.images.survey")
    assert images(folder, cache="none").record == before.record and passes == []
    Image.new("L", (8, 8), 3).save(folder / "new.png")
    after = images(folder, cache="none")
    assert len(passes) == 1 and after.record["examples"] == 61
    (folder / "new.png").unlink()
    again = images(folder, cache="none")
    assert again.record == before.record and len(passes) == 1


def test_bad_files_are_named_or_skipped(tmp_path):
    folder = pictures(tmp_path / "p")
    (folder / "20.png").write_bytes((folder / "20.png").read_bytes()[:40])
    (folder / "below" / "21.png").write_bytes(b"")
    for cache in ("none", "ram"):
        with pytest.raises(InputRefused, match=r"20\.png: cannot be decoded"):
            images(folder, cache=cache)
        with pytest.raises(InputRefused, match=r"21\.png: is empty"):
            images(folder, cache=cache, skip_bad=1)
    lazy = images(folder, cache="none", skip_bad=2)
    assert lazy.record["skipped"] == ["20.png", "below/21.png"]
    same(lazy, images(folder, cache="ram", skip_bad=2))


def test_a_picture_that_changes_under_a_run_is_refused_by_name(tmp_path):
    folder = pictures(tmp_path / "p")
    data = images(folder, cache="none")
    Image.new("L", (8, 8), 3).save(folder / "6.png")
    with pytest.raises(InputRefused, match=r"6\.png: is not the file that was read"):
        data.all  # noqa: B018
    (folder / "6.png").unlink()
    with pytest.raises(InputRefused, match=r"6\.png: does not exist"):
        data.all  # noqa: B018


def test_listing_keeps_the_order_of_paths(tmp_path):
    names = ["a/b.png", "a.png", "a-b/c.png", "a/a/z.png", "B.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(tmp_path / name)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    from nelbo.data.folder import listing
    from nelbo.data.images import SUFFIXES

    found = listing(tmp_path, SUFFIXES).names
    assert found == [str(p.relative_to(tmp_path)) for p in sorted(tmp_path / n for n in names)]


# --- parquet -----------------------------------------------------------------------------------


def table(path: Path, column: str, values: list, kind=None, group: int = 16) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    made = arrow.table({column: arrow.array(values, kind), "label": list(range(len(values)))})
    parquet.write_table(made, path, row_group_size=group)
    return path


def test_parquet_of_pictures_is_the_folder(tmp_path):
    folder = pictures(tmp_path / "p")
    data = [path.read_bytes() for path in sorted(folder.rglob("*.png"))]
    shards = tmp_path / "shards"
    shards.mkdir()
    table(shards / "0.parquet", "image", [{"bytes": d, "path": None} for d in data[:33]])
    table(shards / "1.parquet", "image", [{"bytes": d, "path": None} for d in data[33:]])
    lazy, kept = open_path(shards, cache="none"), open_path(shards, cache="ram")
    same(lazy, kept)
    other = images(folder)
    assert kept.record["sha256"] == other.record["sha256"]
    for name in PARTS:
        assert torch.equal(getattr(kept, name)[:], getattr(other, name)[:])


def test_parquet_of_numbers(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    rows = np.random.default_rng(0).normal(size=(100, 4))
    path = table(tmp_path / "a.parquet", "x", list(rows), arrow.list_(arrow.float64(), 4))
    lazy, kept = open_path(path, cache="none"), open_path(path, cache="ram")
    same(lazy, kept)
    npy = arrays(saved(tmp_path / "a.npy", rows))
    assert torch.equal(kept.train[:], npy.train[:]) and kept.levels is None
    bytes_ = [list(one.flatten()) for one in levels(50, 3, 4)]
    path = table(tmp_path / "b.parquet", "data", bytes_, arrow.list_(arrow.uint8()))
    same(open_path(path, cache="none"), open_path(path, cache="ram"))
    assert open_path(path).shape() == (3, 4, 4)


def test_parquet_that_is_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    path = table(tmp_path / "a.parquet", "name", ["a", "b"])
    with pytest.raises(InputRefused, match="which column.*name: string"):
        open_path(path)
    path = table(
        tmp_path / "b.parquet", "x", [[1.0], [1.0, 2.0]] * 9, arrow.list_(arrow.float32())
    )
    with pytest.raises(InputRefused, match="rows of different length"):
        open_path(path)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputRefused, match="c.parquet: is no Parquet file"):
        open_path(tmp_path / "c.parquet")
    path = table(tmp_path / "d.parquet", "x", [[float(i)] for i in range(40)])
    data = open_path(path, cache="none")
    table(path, "x", [[float(-i)] for i in range(40)])
    data.train.of.shards.kept.clear()
    with pytest.raises(InputRefused, match="d.parquet: changed"):
        data.train[:3]


def test_without_pyarrow_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputRefused, match=r"pip install 'nelbo\[parquet\]'"):
        open_path(tmp_path / "a.parquet")
