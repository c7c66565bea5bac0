"""Checkpoints: what is saved comes back, and what is damaged is refused by name."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nelbo import checkpoint
from nelbo.checkpoint import (
    MANIFEST,
    check_tensors,
    load,
    newest_valid,
    save,
    step_path,
    steps,
)
from nelbo.errors import InputRefused

State = dict[str, dict[str, Tensor]]


def _state(step: int = 0, size: int = 50) -> State:
    weights = torch.arange(size, dtype=torch.float32) + step
    return {
        "model": {"net.weight": weights, "net.bias": torch.full((3, 2), float(step))},
        "optimizer": {"step": torch.tensor(step)},
    }


def _save(root: Path, step: int) -> Path:
    path = step_path(root, step)
    save(path, _state(step), {"step": step})
    return path


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64]
    dtypes += [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
    given_ = {str(dtype): torch.tensor([[0, 1, 1]]).to(dtype) for dtype in dtypes}
    given_ |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "nan": torch.tensor([0.0])}
    given_["nan"][0] = float("nan")
    save(tmp_path / "c", {"a": given_, "empty": {}}, {})
    found = load(tmp_path / "c").tensors
    assert found["empty"] == {} and found["a"].keys() == given_.keys()
    for name, tensor in given_.items():
        assert found["a"][name].dtype == tensor.dtype and found["a"][name].shape == tensor.shape
        as_bytes = [x.reshape(-1).view(torch.uint8) for x in (found["a"][name], tensor)]
        assert torch.equal(*as_bytes), name


def test_no_tensors_at_all(tmp_path: Path) -> None:
    save(tmp_path / "c", {}, {"step": 0})
    assert load(tmp_path / "c") == checkpoint.Loaded({"step": 0}, {})


def test_shared_transposed_and_expanded_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    views = {"a": base, "b": base, "t": base.T, "row": base[1], "e": base[0, 1].expand(5)}
    views["parameter"] = torch.nn.Parameter(base)
    save(tmp_path / "c", {"m": views}, {})
    found = load(tmp_path / "c").tensors["m"]
    assert all(torch.equal(found[name], view) for name, view in views.items())
    found["a"].zero_()
    assert found["b"].sum() == 66.0, "loaded tensors are writable and independent"


def test_info_comes_back_as_json(tmp_path: Path) -> None:
    info = {"seed": 2**62, "rate": 1e-4, "none": None, "name": "naïve \ud800", "by": {10: 1, 9: 2}}
    save(tmp_path / "c", {}, info)
    assert load(tmp_path / "c").info == {**info, "by": {"10": 1, "9": 2}}


def test_info_must_be_finite_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        save(tmp_path / "c", {}, {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_it(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    mask = os.umask(0)
    os.umask(mask)
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o666 & ~mask}


def test_an_existing_name_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    with pytest.raises(InputRefused, match="exists already"):
        save(path, {}, {})
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputRefused, match="exists already"):
        save(tmp_path / "link", {}, {})
    assert load(path).info == {"step": 1}


def test_bytes_needed() -> None:
    assert checkpoint.bytes_needed(_state()) == 4 * 50 + 4 * 6 + 8


def _rewrite(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path / "model.safetensors")


_MODEL = _state()["model"]
_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped payload": (
        lambda p: _flip(p / "model.safetensors", -1),
        r"model\.safetensors: tensor 'net\.weight' has crc32",
    ),
    "flipped header": (lambda p: _flip(p / "model.safetensors", 12), r"model\.safetensors: "),
    "truncated": (
        lambda p: os.truncate(p / "model.safetensors", 300),
        r"model\.safetensors: truncated or damaged, 300 of",
    ),
    "zero length": (
        lambda p: os.truncate(p / "model.safetensors", 0),
        r"model\.safetensors: truncated or damaged, 0 of",
    ),
    "swollen": (lambda p: os.truncate(p / "model.safetensors", 1 << 40), "1099511627776 bytes"),
    "missing file": (
        lambda p: (p / "model.safetensors").unlink(),
        r"model\.safetensors: missing",
    ),
    "extra file": (lambda p: (p / "x.bin").write_bytes(b""), r"x\.bin: not in the manifest"),
    "subdirectory": (lambda p: (p / "x").mkdir(), "x: not in the manifest"),
    "missing tensor": (
        _rewrite({"net.weight": _MODEL["net.weight"]}),
        r"model\.safetensors: tensor 'net\.bias' is missing",
    ),
    "extra tensor": (
        _rewrite({**_MODEL, "new": torch.zeros(1)}),
        r"model\.safetensors: tensor 'new' is unexpected",
    ),
    "wrong shape": (
        _rewrite({**_MODEL, "net.bias": torch.zeros(2, 3)}),
        r"tensor 'net\.bias' has shape \[2, 3\], expected \[3, 2\]",
    ),
    "wrong dtype": (
        _rewrite({**_MODEL, "net.bias": torch.zeros(3, 2, dtype=torch.float16)}),
        r"tensor 'net\.bias' has dtype float16, expected float32",
    ),
    "other bytes, same tensors": (
        lambda p: save_file(_MODEL, p / "model.safetensors", {"a": "b"}),
        r"model\.safetensors: SHA-256 does not match",
    ),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), r"manifest\.json: cannot be read"),
    "truncated manifest": (lambda p: os.truncate(p / MANIFEST, 90), "not a valid JSON file"),
    "list as manifest": (lambda p: (p / MANIFEST).write_text("[1]"), "checkpoint format None"),
}


@pytest.mark.parametrize("kind", _DAMAGE)
def test_damage_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = _save(tmp_path, 0)
    damage, message = _DAMAGE[kind]
    damage(path)
    with pytest.raises(InputRefused, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("nothing", "file"):
        with pytest.raises(InputRefused, match=f"{name}.*cannot be read"):
            load(tmp_path / name)


@pytest.mark.parametrize("name", [MANIFEST, "model.safetensors"])
def test_symbolic_links_are_refused(name: str, tmp_path: Path) -> None:
    path = _save(tmp_path, 0)
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputRefused, match=f"{name}: (is a symbolic link|not a plain file)"):
        load(path)


def test_every_byte_of_every_file_counts(tmp_path: Path) -> None:
    path = step_path(tmp_path, 0)
    save(path, {"m": {"w": torch.zeros(9)}, "o": {}}, {"step": 0})
    draw = random.Random(0)
    accepted = []
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for position in range(len(original)):
            damaged = bytearray(original)
            damaged[position] ^= 1 << draw.randrange(8)
            file.write_bytes(bytes(damaged))
            try:
                loaded = load(path)
            except InputRefused:
                continue
            assert loaded.info == {"step": 0}
            accepted.append((file.name, original[position : position + 1]))
        file.write_bytes(original)
    # Only blanks between JSON tokens may change into other blanks.
    assert all(name == MANIFEST and byte in b" \n" for name, byte in accepted)


def _forge(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and give it a digest that fits."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["digest"]
    change(manifest)
    manifest["digest"] = checkpoint._digest(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_forged_manifests(tmp_path: Path) -> None:
    path = _save(tmp_path, 0)
    row = {"bytes": 1, "sha256": "", "tensors": {}}
    for change, message in [
        (lambda m: m.update(schema=2), "checkpoint format 2"),
        (lambda m: m["files"].update({"../x.safetensors": row}), "damaged"),
        (lambda m: m["files"].update({"x.pkl": row}), "damaged"),
        (lambda m: m["files"].update({"x.safetensors": []}), "damaged"),
        (lambda m: m.update(files=[]), "damaged"),
        (lambda m: m.update(info=None), "damaged"),
    ]:
        shutil.copytree(path, tmp_path / "forged")
        _forge(tmp_path / "forged", change)
        with pytest.raises(InputRefused, match=message):
            load(tmp_path / "forged")
        shutil.rmtree(tmp_path / "forged")


def test_check_tensors_names_everything() -> None:
    want = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2), "d": torch.zeros(2)}
    have = {"b": torch.zeros(3), "c": torch.zeros(2, dtype=torch.float64), "d": torch.ones(2)}
    check_tensors(want, {k: v + 1 for k, v in want.items()}, "here")
    with pytest.raises(InputRefused) as caught:
        check_tensors({**have, "e": torch.zeros(1)}, want, "run/model.safetensors")
    message = str(caught.value)
    assert message.startswith("run/model.safetensors: tensor 'a' is missing")
    assert "'e' is unexpected" in message and "'d'" not in message
    assert "'b' has shape [3], expected [2]" in message
    assert "'c' has dtype float64, expected float32" in message


def test_long_lists_are_cut() -> None:
    with pytest.raises(InputRefused, match="and 92 more"):
        check_tensors({}, {str(i): torch.zeros(1) for i in range(100)}, "here")


def test_steps_are_sorted_by_number_and_others_ignored(tmp_path: Path) -> None:
    for name in ("step-00000020", "step-00000003", "step-100000000", "step-1", ".tmp-step-1-7"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000004").write_text("a file")
    (tmp_path / "step-00000005").symlink_to("step-00000003")
    assert [step for step, _ in steps(tmp_path)] == [3, 20, 10**8]
    assert steps(tmp_path / "nothing") == []
    assert step_path(tmp_path, 10**8).name == "step-100000000"


def test_newest_valid_falls_back_and_says_so(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path, step)
    _flip(step_path(tmp_path, 3) / "model.safetensors", -1)
    step, loaded, problems = newest_valid(tmp_path)
    assert step == 2 and torch.equal(loaded.tensors["optimizer"]["step"], torch.tensor(2))
    assert len(problems) == 1 and "step-00000003/model.safetensors" in problems[0]
    assert [s for s, _ in steps(tmp_path)] == [1, 2, 3], "nothing was cleaned"
    for step in (1, 2):
        (step_path(tmp_path, step) / MANIFEST).unlink()
    with pytest.raises(InputRefused, match="holds no valid checkpoint(\n.*step-0000000.*){3}"):
        newest_valid(tmp_path)
