"""The fused normalisation equals its eager twin, and is never chosen in silence."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import norm_cases
import pytest
import torch
from norm_cases import far
from norm_cases import network as small
from torch import nn

from nelbo.errors import InputRefused, UsageError
from nelbo.networks import norm_kernels
from nelbo.networks.kernels import PLAIN, activated
from nelbo.networks.triton_norm import TRITON, fuse, obstacle
from nelbo.speed import prepared

gpu = pytest.mark.gpu
HERE = obstacle("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(HERE is not None, reason=f"the fused kernel: {HERE}")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def test_twin_is_torch_in_float64() -> None:
    """The twin, and `Plain`, against the formula written out."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 12).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, shift = torch.randn(3, 12, 5, 7).double(), torch.randn(3, 12).double()
    h = x + shift[:, :, None, None]
    g = h.reshape(3, 4, -1)
    unit = (g - g.mean(2, keepdim=True)) / (g.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    z = unit.reshape(h.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]
    expected = z * torch.sigmoid(z)
    silu = nn.functional.silu
    torch.testing.assert_close(PLAIN.normalised(h, norm, silu), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        activated(x.float(), norm.float(), shift.float()), expected.float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA says")
def test_it_is_refused_by_name_where_it_cannot_run() -> None:
    network = small()
    with pytest.raises(InputRefused, match="CUDA devices, not on cpu"):
        fuse(network, "cpu")
    with pytest.raises(InputRefused, match="CUDA devices, not on cpu"):
        prepared(network, "cpu", kernels="triton")
    with pytest.raises(UsageError, match="kernels are one of auto, plain, triton, native"):
        prepared(network, "cpu", kernels="fast")


def test_auto_says_what_it_took() -> None:
    assert prepared(small(), "cpu", kernels="plain") == "kernels: plain"
    assert prepared(nn.Linear(2, 2), "cpu") == "kernels: plain"


def test_memory_format_changes_nothing() -> None:
    """Contiguous or channels-last images, weights in either format: the same function."""
    network = small().double()
    x, t = torch.randn(2, 3, 8, 8).double(), torch.tensor([3.0, 700.0])
    expected = network(x, t)
    assert expected.is_contiguous()
    last = torch.channels_last
    torch.testing.assert_close(network(x.contiguous(memory_format=last), t), expected)
    moved = network.to(memory_format=last)  # type: ignore[call-overload]
    torch.testing.assert_close(moved(x, t), expected, rtol=1e-12, atol=1e-12)


# --- the kernels on a CPU, computed by triton's interpreter --------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What `norm_cases` prints: a process of its own, since triton decides when it is imported."""
    program = Path(norm_cases.__file__)
    source = str(Path(norm_kernels.__file__).parents[2])
    found = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=240,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": source},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    document: dict[str, Any] = json.loads(found.stdout)
    assert document["interpreted"]
    return document


@needs_triton
def test_interpreted_kernels_are_right(interpreted: dict[str, Any]) -> None:
    """Value and every gradient, 36 cases, against float64 and the twin."""
    assert len(interpreted["rows"]) == 4 * len(norm_cases.SHAPES)
    for row in interpreted["rows"]:
        assert max(row["shares"].values()) < 1, row


@needs_triton
def test_the_bounds_find_a_kernel_that_is_wrong(interpreted: dict[str, Any]) -> None:
    """Ten times the ε moves the result by 4.5e-5 of its size."""
    assert interpreted["wrong"]["y"] > 3 and interpreted["wrong"]["dx"] > 3


@needs_triton
def test_what_is_not_a_number_stays_in_its_group(interpreted: dict[str, Any]) -> None:
    """Four channels of the first example, and nothing else."""
    assert interpreted["nan"] == [[c < 4 for c in range(32)], [False] * 32]


@needs_triton
def test_an_interpreted_network_is_the_network(interpreted: dict[str, Any]) -> None:
    found = interpreted["network"]
    assert found["places"] == 9, "two parts in each of four blocks of one layer, and the end"
    assert found["value"] < 1e-5 and found["gradient"] < 2e-3


@needs_triton
@pytest.mark.parametrize("shape", [(128, 32, 1024), (384, 32, 256), (512, 32, 16)], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_kernels_compile_and_read_sixteen_bytes(shape: tuple[int, ...], backward: bool) -> None:
    """For compute capability 9.0, in bfloat16; needs no GPU. Three of four groups are 24 bytes."""
    text = norm_cases.assembly(*shape, backward=backward)
    wide = "ld.global.v2.b32" if shape[0] == 384 else "ld.global.v4.b32"
    assert wide in text and "ld.global.b16" not in text


# --- on a GPU ------------------------------------------------------------------------------------


@gpu
@needs_gpu
@pytest.mark.parametrize("shape", norm_cases.SHAPES, ids=str)
@pytest.mark.parametrize("shifted", [True, False], ids=["shift", "no shift"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_is_right(shape: tuple[int, ...], shifted: bool, dtype: torch.dtype) -> None:
    """Value and every gradient against float64 and the twin; see `norm_cases`."""
    found = norm_cases.shares(norm_cases.case(shape, shifted, dtype, "cuda"))
    assert max(found.values()) < 1, found


@gpu
@needs_gpu
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_network_with_the_kernel_is_the_network(bf16: bool, compiled: bool) -> None:
    network = small().cuda()
    x, t = torch.randn(4, 3, 16, 16, device="cuda"), torch.tensor([3.0, 7, 500, 999.0]).cuda()
    exact = small().double().cuda()
    expected = exact(x.double(), t)
    expected.square().mean().backward()
    said = prepared(network, "cuda", compiled=compiled)
    assert said.startswith("kernels: triton in 9 places")
    # TensorFloat-32 is allowed to convolutions by default; the test speaks of float32
    with torch.backends.cudnn.flags(allow_tf32=False):
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            found = network(x, t)
        found.float().square().mean().backward()
    assert far(found, expected) < (3e-2 if bf16 else 1e-5)
    for ours, theirs in zip(network.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        if float(theirs.grad.norm()) > 1e-6:
            assert far(ours.grad, theirs.grad) < (2e-1 if bf16 else 2e-3)


@gpu
@needs_gpu
def test_float64_goes_to_torch() -> None:
    network = small().double().cuda()
    x, t = torch.randn(2, 3, 8, 8, device="cuda").double(), torch.tensor([3.0, 700.0]).cuda()
    expected = network(x, t)
    fuse(network, "cuda")
    assert network.kernels is TRITON
    torch.testing.assert_close(network(x, t), expected, rtol=1e-12, atol=1e-12)
