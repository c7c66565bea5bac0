"""Arrays, IDX files and CIFAR-10's batches: what is read, what is refused and how."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from nelbo.data.sources import arrays, cifar10, idx, open_path
from nelbo.errors import InputRefused


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def vectors(rows: int = 40, columns: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(3.0, [1.0, 20.0, 0.1][:columns], (rows, columns))


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def idx_bytes(array: np.ndarray, kind: int = 8) -> bytes:
    head = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def mnist(folder: Path, train: int = 40, test: int = 10) -> Path:
    for part, count, seed in (("train", train, 0), ("t10k", test, 1)):
        images, labels = noise(count, 5, 4, seed=seed), noise(count, seed=seed) % 10
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder


def cifar(folder: Path, per_batch: int = 8) -> Path:
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for seed, name in enumerate(names):
        records = noise(per_batch, 3073, seed=seed)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())
    return folder


def header_only(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    """An .npy that declares a shape and holds ten bytes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + bytes(10)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((40, 5, 4), (1, 5, 4)),
        ((40, 5, 4, 3), (3, 5, 4)),
        ((40, 3, 5, 4), (3, 5, 4)),
        ((40, 5, 4, 1), (1, 5, 4)),
    ],
)
def test_layouts_are_told_from_the_shape(tmp_path, shape, expected):
    array = noise(*shape)
    data = arrays(saved(tmp_path / "a.npy", array))
    assert data.shape() == expected and data.levels == 256 and data.train.dtype == torch.uint8
    first = int(data.rows["train"][0])
    source = array[first] if array.ndim == 4 else array[first][None]
    source = np.moveaxis(source, 2, 0) if shape[-1] in (1, 3) else source
    assert np.array_equal(data.train[0], source)


def test_a_given_layout_settles_what_the_shape_does_not(tmp_path):
    path = saved(tmp_path / "a.npy", noise(40, 3, 5, 3))
    with pytest.raises(InputRefused, match="a.npy.*give the layout"):
        arrays(path)
    assert arrays(path, layout="NHWC").shape() == (3, 3, 5)
    assert arrays(path, layout="NCHW").shape() == (3, 5, 3)
    with pytest.raises(InputRefused, match="not the layout NHW"):
        arrays(path, layout="NHW")


def test_bool_arrays_have_two_levels(tmp_path):
    data = arrays(saved(tmp_path / "a.npy", noise(40, 5, 4) > 127))
    assert data.levels == 2 and set(data.train.unique().tolist()) == {0, 1}


def test_stated_levels_must_hold_the_values(tmp_path):
    path = saved(tmp_path / "a.npy", noise(40, 5, 4) % 17)
    assert arrays(path, levels=17).levels == 17
    with pytest.raises(InputRefused, match="up to 16 do not fit 16 levels"):
        arrays(path, levels=16)


def test_vectors_are_standardised_by_the_training_part(tmp_path):
    data = arrays(saved(tmp_path / "a.npy", vectors().astype(np.float32)))
    assert data.levels is None and data.train.dtype == torch.float64
    x = data.encode(data.train).double()
    torch.testing.assert_close(x.mean(0), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(3).double())
    assert data.offset() == pytest.approx(float(data.train.std(0, correction=0).log().sum()))
    torch.testing.assert_close(data.decode(x), data.train)


def test_npz_with_its_own_parts(tmp_path):
    path = tmp_path / "mnist.npz"
    test = noise(10, 5, 4, seed=1)
    np.savez(path, x_train=noise(40, 5, 4), x_test=test, y_train=noise(40))
    data = arrays(path)
    assert np.array_equal(data.test[:, 0], test) and len(data.train) + len(data.validation) == 40


def test_npz_with_its_own_three_parts(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(
        path,
        train_images=noise(40, 5, 4),
        val_images=noise(7, 5, 4, seed=1),
        test_images=noise(10, 5, 4, seed=2),
    )
    data = arrays(path)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [40, 7, 10]


def test_npz_keys(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, first=vectors(), second=noise(40, 5, 4))
    with pytest.raises(InputRefused, match="first, second; say which by its key"):
        arrays(path)
    assert arrays(path, key="first").levels is None
    assert arrays(path, key="second").levels == 256
    with pytest.raises(InputRefused, match="no array 'third'"):
        arrays(path, key="third")


def test_array_split_ignores_the_order_of_the_rows(tmp_path):
    array = noise(40, 5, 4)
    first = arrays(saved(tmp_path / "a.npy", array))
    second = arrays(saved(tmp_path / "b.npy", array[::-1]))
    assert torch.equal(first.test, second.test)
    assert first.record["sha256"] == second.record["sha256"]


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_objects_are_never_opened(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    array = np.array([Trap(), Trap()], dtype=object)
    np.save(path, array) if ending == "npy" else np.savez(path, x=array)
    with pytest.raises(InputRefused, match=rf"a\.{ending}.*pickle.*never loaded"):
        arrays(path)


def test_a_bare_pickle_is_never_opened(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputRefused, match="pickles are never opened"):
        arrays(path)


@pytest.mark.parametrize("shape", [(10**13,), (2**40, 2**40), (100, 5, 4)])
def test_an_npy_that_declares_more_than_it_holds(tmp_path, shape):
    path = tmp_path / "a.npy"
    path.write_bytes(header_only(shape))
    with pytest.raises(InputRefused, match=r"a\.npy: (declares|is truncated)"):
        arrays(path)


def test_an_npz_that_declares_more_than_it_holds(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header_only((2**20, 5, 4)))
    with pytest.raises(InputRefused, match="a.npz: array 'x': is truncated"):
        arrays(path)


def test_an_npz_that_unpacks_to_far_more(tmp_path, monkeypatch):
    monkeypatch.setattr("nelbo.data.npy.RATIO_FROM", 2**16)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.zeros((2**14, 5, 4), np.uint8))
    with pytest.raises(InputRefused, match="a.npz.*like an attack"):
        arrays(path)


def test_the_memory_limit(tmp_path):
    path = saved(tmp_path / "a.npy", noise(40, 5, 4))
    with pytest.raises(InputRefused, match="a.npy: declares 800 bytes.*limit of 100"):
        arrays(path, limit=100, cache="ram")
    assert len(arrays(path, limit=100).train) == 34  # read row by row


@pytest.mark.parametrize("names", [["../x.npy"], ["x.npy", "x.npy"], ["x.txt"]])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_files_that_are_no_npz(tmp_path, names):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, header_only((10,)))
    with pytest.raises(InputRefused, match="a.npz: is not an .npz file"):
        arrays(path)


def test_damaged_npz(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=noise(40, 5, 4))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputRefused, match="a.npz.*damaged"):
        arrays(path)
    changed = bytearray(whole)
    changed[200] ^= 255
    path.write_bytes(bytes(changed))
    with pytest.raises(InputRefused, match="a.npz.*damaged"):
        arrays(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, bad):
    array = vectors()
    array[7, 2] = bad
    with pytest.raises(InputRefused, match="a.npy: 1 value.*row 7, column 2; remove"):
        arrays(saved(tmp_path / "a.npy", array))


def test_constant_data(tmp_path):
    array = vectors()
    array[:, 1] = 0.1
    with pytest.raises(InputRefused, match=r"a.npy: column\(s\) 1 are constant"):
        arrays(saved(tmp_path / "a.npy", array))
    with pytest.raises(InputRefused, match="b.npy.*constant data"):
        arrays(saved(tmp_path / "b.npy", np.full((40, 5, 4), 9, np.uint8)))


def test_too_few_examples(tmp_path):
    with pytest.raises(InputRefused, match="a.npy: 5 example.*too few"):
        arrays(saved(tmp_path / "a.npy", noise(5, 5, 4)))


def test_repeated_values_are_pointed_out(tmp_path):
    array = vectors()
    array[:, 1] = array[:, 1].round(-1)
    data = arrays(saved(tmp_path / "a.npy", array))
    assert any("column(s) 1 repeat" in note for note in data.record["warnings"])


@pytest.mark.parametrize(
    "array",
    [
        noise(40, 5, 4).astype(np.int64),
        np.zeros((40, 5, 4)),
        np.zeros(40),
        noise(40, 6),
        np.zeros((40, 3), np.complex128),
        np.zeros((0, 5, 4), np.uint8),
        noise(2, 3, 4, 5, 6),
        np.zeros((40, 3), np.uint16),
    ],
    ids=[
        "int64",
        "float images",
        "float column",
        "uint8 table",
        "complex",
        "none",
        "5-d",
        "uint16",
    ],
)
def test_arrays_that_are_neither_images_nor_vectors(tmp_path, array):
    with pytest.raises(InputRefused, match="a.npy"):
        arrays(saved(tmp_path / "a.npy", array))


@pytest.mark.parametrize("reader", [arrays, idx, cifar10, open_path])
def test_missing_paths(tmp_path, reader):
    with pytest.raises(InputRefused, match="nowhere: does not exist"):
        reader(tmp_path / "nowhere")


@pytest.mark.parametrize("reader", [arrays, idx, open_path])
def test_files_of_zero_bytes(tmp_path, reader):
    (tmp_path / "empty").touch()
    with pytest.raises(InputRefused, match="empty: is empty"):
        reader(tmp_path / "empty")


def test_links_are_followed_and_broken_ones_named(tmp_path):
    path = saved(tmp_path / "a.npy", noise(40, 5, 4))
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    assert torch.equal(arrays(tmp_path / "link").test, arrays(path).test)
    with pytest.raises(InputRefused, match="broken: is a link to nothing"):
        arrays(tmp_path / "broken")


def test_mnist_folder_keeps_its_test_part_and_labels(tmp_path):
    data = idx(mnist(tmp_path))
    assert np.array_equal(data.test[:, 0], noise(10, 5, 4, seed=1))
    assert np.array_equal(data.labels["test"], noise(10, seed=1) % 10)
    assert len(data.train) + len(data.validation) == 40 and data.shape() == (1, 5, 4)
    train = noise(40, seed=0) % 10
    assert np.array_equal(data.labels["train"], train[data.rows["train"]])


@pytest.mark.parametrize("packed", [False, True])
def test_one_idx_file_is_split_by_content(tmp_path, packed):
    path, content = tmp_path / "images", idx_bytes(noise(40, 5, 4))
    path.write_bytes(gzip.compress(content) if packed else content)
    data = idx(path)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [34, 2, 4]
    assert torch.equal(open_path(path).test, data.test)


def test_labels_given_as_images(tmp_path):
    mnist(tmp_path)
    with pytest.raises(InputRefused, match="labels-idx1-ubyte: holds labels.*images-idx3"):
        idx(tmp_path / "train-labels-idx1-ubyte")


@pytest.mark.parametrize("cut", [2, 10, 100, 815])
@pytest.mark.parametrize("packed", [False, True])
def test_truncated_idx(tmp_path, cut, packed):
    path, content = tmp_path / "images", idx_bytes(noise(40, 5, 4))[:cut]
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputRefused, match="images: is (truncated|not an IDX)"):
        idx(path)


def test_truncated_gzip(tmp_path):
    path, content = tmp_path / "images.gz", gzip.compress(idx_bytes(noise(40, 5, 4)))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputRefused, match="images.gz: is truncated or damaged"):
        idx(path)


def test_idx_that_declares_what_it_does_not_hold(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 4000, 1000, 1000) + bytes(50))
    with pytest.raises(InputRefused, match="images: is truncated"):
        idx(path)
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 4_000_000, 9000, 9000) + bytes(50))
    with pytest.raises(InputRefused, match="images: declares"):
        idx(path)


def test_idx_of_another_kind(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(noise(40, 5, 4), kind=0x0D))
    with pytest.raises(InputRefused, match="type 0x0d"):
        idx(path)
    path.write_bytes(idx_bytes(noise(40, 5, 4)) + b"x")
    with pytest.raises(InputRefused, match="longer than its header"):
        idx(path)
    path.write_bytes(b"hello, world")
    with pytest.raises(InputRefused, match="images: is not an IDX file"):
        idx(path)


def test_mnist_folder_without_its_test_part_or_with_wrong_labels(tmp_path):
    mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(noise(9)))
    with pytest.raises(InputRefused, match="t10k-labels.*belong to them"):
        idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(InputRefused, match="holds no t10k-images-idx3-ubyte"):
        idx(tmp_path)


def test_cifar10_is_planar_and_keeps_its_test_part(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    cifar(folder)
    data = cifar10(tmp_path, validation=5)
    records = noise(8, 3073, seed=5)
    assert np.array_equal(data.test.flatten(1), records[:, 1:])
    assert np.array_equal(data.labels["test"], records[:, 0] % 10)
    assert data.shape() == (3, 32, 32) and (len(data.train), len(data.validation)) == (35, 5)
    assert len([n for n in data.record["warnings"] if "not the published file" in n]) == 6
    assert torch.equal(open_path(folder).test, data.test)


def test_damaged_cifar10(tmp_path):
    cifar(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputRefused, match="data_batch_3.bin.*truncated"):
        cifar10(tmp_path)
    path.write_bytes(b"\x63" + whole[1:])
    with pytest.raises(InputRefused, match="data_batch_3.bin: a label above 9"):
        cifar10(tmp_path)
    path.unlink()
    with pytest.raises(InputRefused, match="data_batch_3.bin: does not exist"):
        cifar10(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(b"pickle")
    with pytest.raises(InputRefused, match="pickles and are not opened"):
        cifar10(tmp_path)


def test_open_path_names_what_it_knows(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(InputRefused, match="notes.txt: is neither"):
        open_path(path)
    mnist(tmp_path)
    assert open_path(tmp_path).name == "idx"
    assert open_path(saved(tmp_path / "a.npy", vectors())).levels is None
