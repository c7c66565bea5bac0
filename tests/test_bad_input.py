"""Bad input through the command line: exit 3, the file and the remedy named, nothing lost."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import shutil
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TINY, command, silent

from nelbo import checkpoint
from nelbo.checkpoint import load, step_path, steps

pytestmark = pytest.mark.usefixtures("no_report")

SMALL = [*TINY, "--multipliers", "1", "--quiet"]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pictures(folder: Path, count: int = 30, shape: tuple[int, ...] = (4, 4)) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(noise(*shape, seed=i)).save(folder / f"{i:02}.png")
    return folder


def idx_bytes(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


# --- data: each case makes a bad input and says what the message must hold -----------------------

Case = tuple[str, Path, list[str]]


def empty_folder(root: Path) -> Case:
    (root / "d").mkdir()
    return "images", root / "d", ["holds no images", ".png"]


def missing_path(root: Path) -> Case:
    return "images", root / "nowhere", ["nowhere"]


def text_called_png(root: Path) -> Case:
    (pictures(root / "d") / "note.png").write_text("hello")
    return "images", root / "d", ["note.png"]


def truncated_jpeg(root: Path) -> Case:
    file = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(file, "jpeg")
    (pictures(root / "d") / "cut.jpg").write_bytes(file.getvalue()[:-900])
    return "images", root / "d", ["cut.jpg"]


def deep_png(root: Path) -> Case:
    raw = b"".join(b"\0" + noise(8).tobytes() for _ in range(4))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 0, 0, 0, 0))
    data = head + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    (pictures(root / "d") / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return "images", root / "d", ["deep.png", "16"]


def bomb(root: Path) -> Case:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    data = head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (pictures(root / "d") / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return "images", root / "d", ["bomb.png"]


def mixed_sizes(root: Path) -> Case:
    Image.fromarray(noise(6, 4)).save(pictures(root / "d") / "tall.png")
    return "images", root / "d", ["tall.png", "size"]


def object_npy(root: Path) -> Case:
    np.save(root / "o.npy", np.array([{"a": 1}] * 40, dtype=object), allow_pickle=True)
    return "vectors", root / "o.npy", ["o.npy"]


def object_npz(root: Path) -> Case:
    np.savez(root / "o.npz", x=np.array([[1], "a"], dtype=object))
    return "vectors", root / "o.npz", ["o.npz"]


def zip_of_something(root: Path) -> Case:
    with zipfile.ZipFile(root / "z.npz", "w") as file:
        file.writestr("readme.txt", "hello")
    return "vectors", root / "z.npz", ["z.npz"]


def vector_file(root: Path, change: Callable[[np.ndarray], object]) -> Path:
    values = np.random.default_rng(0).normal(size=(60, 3))
    change(values)
    np.save(root / "v.npy", values)
    return root / "v.npy"


def not_a_number(root: Path) -> Case:
    return (
        "vectors",
        vector_file(root, lambda v: v.__setitem__((7, 1), np.nan)),
        ["v.npy", "row 7"],
    )


def infinite(root: Path) -> Case:
    return (
        "vectors",
        vector_file(root, lambda v: v.__setitem__((9, 0), np.inf)),
        ["v.npy", "row 9"],
    )


def constant_vectors(root: Path) -> Case:
    return "vectors", vector_file(root, lambda v: v.fill(2.0)), ["v.npy", "constant"]


def constant_images(root: Path) -> Case:
    np.save(root / "c.npy", np.full((60, 4, 4), 7, np.uint8))
    return "images", root / "c.npy", ["c.npy"]


def few_examples(root: Path) -> Case:
    np.save(root / "f.npy", noise(12, 4, 4))
    return "images", root / "f.npy", ["fewer than a batch of 16", "batch size"]


def labels_as_images(root: Path) -> Case:
    (root / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(noise(60) % 10)))
    return "mnist", root / "train-labels-idx1-ubyte.gz", ["train-labels-idx1-ubyte.gz", "labels"]


def vectors_as_images(root: Path) -> Case:
    return "images", vector_file(root, lambda v: None), ["vectors"]


def images_as_vectors(root: Path) -> Case:
    np.save(root / "i.npy", noise(60, 4, 4))
    return "vectors", root / "i.npy", ["recipe images"]


def not_cifar(root: Path) -> Case:
    return "cifar10", pictures(root / "d"), ["data_batch_1.bin"]


CASES = [
    empty_folder,
    missing_path,
    text_called_png,
    truncated_jpeg,
    deep_png,
    bomb,
    mixed_sizes,
    object_npy,
    object_npz,
    zip_of_something,
    not_a_number,
    infinite,
    constant_vectors,
    constant_images,
    few_examples,
    labels_as_images,
    vectors_as_images,
    images_as_vectors,
    not_cifar,
]


@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_refused(case: Callable[[Path], Case], tmp_path: Path) -> None:
    recipe, path, words = case(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    more = SMALL if recipe not in ("vectors", "swissroll") else ["--batch", "16", "--quiet"]
    code, out, err = silent(["train", recipe, str(path), *more, "--out", str(tmp_path / "run")])
    assert code == 3 and out == "", err
    assert err.startswith("nelbo: ") and "Traceback" not in err
    assert all(word in err for word in words), err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "run").exists()


def test_sizes_are_mended_by_the_named_option(tmp_path: Path) -> None:
    _, path, _ = mixed_sizes(tmp_path)
    arguments = ["train", "images", str(path), *SMALL, "--size", "4", "--steps", "1"]
    assert silent([*arguments, "--out", str(tmp_path / "run")])[0] == 0


def test_data_that_changed(tmp_path: Path) -> None:
    """A run keeps to the data that it was started on."""
    np.save(tmp_path / "d.npy", noise(60, 4, 4))
    run = ["train", "images", str(tmp_path / "d.npy"), *SMALL, "--out", str(tmp_path / "run")]
    assert silent([*run, "--steps", "1"])[0] == 0
    np.save(tmp_path / "d.npy", noise(60, 4, 4, seed=1))
    for arguments in ([*run, "--resume"], ["evaluate", str(tmp_path / "run")]):
        code, _, err = silent(arguments)
        assert code == 3 and "d.npy: the data changed" in err and "put the old data back" in err


# --- runs that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evaluate", "sample", "report"])
def test_what_is_no_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        code, out, err = silent([name, str(path)])
        assert code == 3 and out == "" and str(path) in err and "nelbo train" in err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"schema": 1', '"schema": 2', "schema 2"),
        ('"recipe": "digits"', '"recipe": "magic"', "no recipe 'magic'"),
        ('"steps": 12', '"stages": 12', "stages"),
        ("{", "[", "not a valid JSON"),
    ],
)
def test_a_damaged_recipe(old: str, new: str, words: str, run_copy: Path) -> None:
    path = run_copy / "recipe.json"
    path.write_text(path.read_text().replace(old, new, 1))
    code, _, err = silent(["evaluate", str(run_copy)])
    assert code == 3 and "recipe.json" in err and words in err


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A run with valid checkpoints of steps 4 and 12, so that there is one to fall back to."""
    run = tmp_path / "run"
    assert silent(command(run, "--validate-every", "0", "--quiet"))[0] == 0
    root = run / "checkpoints"
    older = load(step_path(root, 12))
    checkpoint.save(step_path(root, 4), older.tensors, {"step": 4, "validation": None})
    return run


def weights(run: Path) -> Path:
    return step_path(run / "checkpoints", 12) / "model-ema.safetensors"


def flipped_byte(run: Path) -> str:
    data = bytearray(weights(run).read_bytes())
    data[-100] ^= 1
    weights(run).write_bytes(data)
    return "tensor '"


def truncated(run: Path) -> str:
    weights(run).write_bytes(weights(run).read_bytes()[:-100])
    return "truncated or damaged"


def edited(run: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(weights(run))
    edit(tensors)
    save_file(tensors, weights(run))


def missing_tensor(run: Path) -> str:
    edited(run, lambda t: t.pop(_name(t)))
    return "is missing"


def extra_tensor(run: Path) -> str:
    edited(run, lambda t: t.update(intruder=torch.zeros(2)))
    return "tensor 'intruder' is unexpected"


def misshaped_tensor(run: Path) -> str:
    edited(run, lambda t: t.update({_name(t): t[_name(t)][:1]}))
    return "has shape"


def _name(tensors: dict[str, torch.Tensor]) -> str:
    return next(n for n in sorted(tensors) if n.endswith("conv_in.weight"))


def missing_file(run: Path) -> str:
    weights(run).unlink()
    return "model-ema.safetensors: missing"


def no_manifest(run: Path) -> str:
    (weights(run).parent / "manifest.json").unlink()
    return "manifest.json"


def of_another_model(run: Path) -> str:
    """Whole, and of the wrong shape: only the model can tell."""
    path = weights(run).parent
    tensors = load(path).tensors
    name = _name(tensors["model-ema"])
    tensors["model-ema"][name] = tensors["model-ema"][name][:1].clone()
    shutil.rmtree(path)
    checkpoint.save(path, tensors, {"step": 12, "validation": None})
    return f"tensor '{name}' has shape"


def without_optimizer(run: Path) -> str:
    path = weights(run).parent
    tensors = load(path).tensors
    del tensors["model-optimizer"]
    shutil.rmtree(path)
    checkpoint.save(path, tensors, {"step": 12, "validation": None})
    return "model-optimizer"


DAMAGES = [
    flipped_byte,
    truncated,
    missing_tensor,
    extra_tensor,
    misshaped_tensor,
    missing_file,
    no_manifest,
    of_another_model,
    without_optimizer,
]


def test_every_damage(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by evaluate --checkpoint; resume falls back, says so, and trains to the end."""
    monkeypatch.setattr("nelbo.walks.train.finish", lambda *_: None)  # measured elsewhere
    for damage in DAMAGES:
        run = tmp_path / damage.__name__
        shutil.copytree(two, run)
        words = damage(run)
        if damage is not without_optimizer:  # which only training needs
            code, out, err = silent(["evaluate", str(run), "--checkpoint", "12", "--quiet"])
            assert code == 3 and out == "" and "step-00000012" in err and words in err, err
        code, _, err = silent(command(run, "--resume", "--quiet"))
        assert code == 0, err
        assert "skipped: " in err and "step-00000012" in err and words in err, damage
        assert "after step 4" in err and words in (run / "log.txt").read_text()
        names = sorted(p.name for p in (run / "checkpoints").iterdir())
        assert "step-00000012.refused-0" in names, "the damaged one is kept as evidence"
        assert load(step_path(run / "checkpoints", 12)).info["step"] == 12


def test_evaluate_says_that_it_fell_back(two: Path) -> None:
    words = flipped_byte(two)
    code, out, err = silent(["evaluate", str(two), "--calls", "4", "--json", "--quiet"])
    assert code == 0 and json.loads(out)["model"]["step"] == 4
    assert "skipped: " in err and words in err


def test_no_valid_checkpoint(run_copy: Path) -> None:
    for _, path in steps(run_copy / "checkpoints"):
        (path / "manifest.json").write_text("{}")
    before = sorted(p.name for p in (run_copy / "checkpoints").iterdir())
    for arguments in (command(run_copy, "--resume"), ["evaluate", str(run_copy)]):
        code, _, err = silent(arguments)
        assert code == 3 and "holds no valid checkpoint" in err and "step-00000012" in err
    assert sorted(p.name for p in (run_copy / "checkpoints").iterdir()) == before


# --- a full disk ---------------------------------------------------------------------------------


def finishes(run: Path, *more: str) -> None:
    code, _, err = silent(command(run, *more, "--resume", "--quiet"))
    assert code == 0, err
    assert [s for s, _ in steps(run / "checkpoints")][-1] == 12
    rows = [json.loads(r) for r in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 13))


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_a_disk_that_fills_while_saving(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, count = checkpoint.write_file, 0

    def full(path: Path, data: bytes) -> None:
        nonlocal count
        count += path.name == name
        if count >= 3 and path.name == name:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        right(path, data)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_file", full)
        code, out, err = silent(command(run))
    assert code == 5 and out == "" and "No space left" in err and "--resume" in err
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert load(step_path(run / "checkpoints", 4)).info["step"] == 4
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    finishes(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB: the first checkpoint fits, a second one does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    run = small_disk / "run"
    code, out, err = silent(command(run))
    assert code == 5 and out == "" and "No space left" in err and "bytes needed" in err, err
    assert [s for s, _ in steps(run / "checkpoints")] == [0]
    assert load(step_path(run / "checkpoints", 0)).info["step"] == 0
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    finishes(run)


def test_a_disk_that_is_full_from_the_start(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(1_300_000))
    code, out, err = silent(command(small_disk / "run"))
    assert code == 5 and out == "" and "bytes needed" in err
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    finishes(small_disk / "run")
