"""Kernels in C equal torch's functions in float64, and are never chosen in silence."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nelbo.errors import InputRefused
from nelbo.networks import c_library, native
from nelbo.networks.c_library import library
from nelbo.networks.kernels import PLAIN
from nelbo.networks.native import NATIVE, Attend, Norm, fuse, obstacle
from nelbo.networks.unet import UNet
from nelbo.recipes.families import DIFFUSION, kind_of, stored
from nelbo.speed import prepared
from nelbo.walks.train import started

HERE = obstacle("cpu")
needs_compiler = pytest.mark.skipif(HERE is not None, reason=f"kernels in C: {HERE}")
NORMS = ((2, 32, 8, 8, 32), (2, 96, 16, 16, 32), (3, 12, 5, 7, 4), (2, 24, 5, 7, 3),
         (2, 64, 1, 1, 8), (1, 17, 3, 43, 1))  # fmt: skip
"""Examples, channels, height, width, groups: whole and broken vectors, blocks and rows."""
HEADS = (
    (2, 1, 64, 8, 8),
    (1, 4, 16, 16, 16),
    (3, 2, 13, 7, 7),
    (2, 3, 8, 2, 3),
    (1, 1, 5, 13, 10),
)
"""Examples, heads, width of a head, height, width."""
EXACT = 1e-6


def small(**keys: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        **keys,
    )


def far(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖/‖expected‖."""
    found, expected = found.detach(), expected.detach()
    assert found.isfinite().all() and found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


def results(y: Tensor, over: Tensor, wrt: list[Tensor]) -> list[Tensor]:
    """y, and the gradient of Σ y over."""
    return [y, *torch.autograd.grad((y.double() * over).sum(), wrt)]


def distances(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [far(f, e) for f, e in zip(found, expected, strict=True)]


def exact(values: list[Tensor]) -> list[Tensor]:
    return [v.detach().double().requires_grad_() for v in values]


@needs_compiler
@pytest.mark.parametrize("shape", NORMS, ids=str)
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
def test_norm_is_torch_in_float64(shape: tuple[int, ...], silu: bool) -> None:
    """Value and every gradient, of a mean that is far from zero; contiguous or not."""
    batch, channels, height, width, groups = shape
    torch.manual_seed(1)
    x = 20 + torch.randn(batch, channels, height, width)
    shift, gain, bias = torch.randn(batch, channels), torch.randn(channels), torch.randn(channels)
    wrt = [v.requires_grad_() for v in (x, shift, gain, bias)]
    over = torch.randn(x.shape).double()

    def formula(x: Tensor, shift: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        y = F.group_norm(x + shift[:, :, None, None], groups, gain, bias, 1e-5)
        return F.silu(y) if silu else y

    there = exact(wrt)
    expected = results(formula(*there), over, there)
    found = results(Norm.apply(*wrt, groups, 1e-5, silu), over, wrt)
    # what normalisation takes out again has no gradient but for rounding
    free = channels // groups == 1 or height * width == 1
    apart = distances(found[:2] + found[3:], expected[:2] + expected[3:])
    assert max(apart) < EXACT * (20 if height * width == 1 else 4)
    if not free:
        assert far(found[2], expected[2]) < 20 * EXACT
    # the mean counts: without the shift, all of this would be seen
    other = Norm.apply(x, torch.zeros_like(shift), gain, bias, groups, 1e-5, silu)
    assert channels == groups or far(other, expected[0]) > 1e-2


@needs_compiler
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_attention_is_torch_in_float64(shape: tuple[int, ...]) -> None:
    batch, heads, wide, height, width = shape
    torch.manual_seed(2)
    every = 2 * torch.randn(batch, 3 * heads * wide, height, width).requires_grad_()
    over = torch.randn(batch, heads * wide, height, width).double()
    there = exact([every])
    expected = results(PLAIN.attended(there[0], heads), over, there)
    found = results(Attend.apply(every, heads), over, [every])
    assert max(distances(found, expected)) < EXACT
    assert far(PLAIN.attended(every.roll(1, 1), heads), expected[0]) > 1e-2


@needs_compiler
@pytest.mark.parametrize("shape", [(2, 64, 48, 8, 8), (3, 7, 21, 5, 3), (1, 1, 1, 1, 1)], ids=str)
def test_a_map_of_positions_is_torch_in_float64(shape: tuple[int, ...]) -> None:
    batch, wide, out, height, width = shape
    torch.manual_seed(5)
    wrt = [torch.randn(batch, wide, height, width), torch.randn(out, wide), torch.randn(out)]
    wrt = [v.requires_grad_() for v in wrt]
    over = torch.randn(batch, out, height, width).double()
    there = exact(wrt)
    expected = results(PLAIN.mapped(*there), over, there)
    found = results(NATIVE.mapped(*wrt), over, wrt)
    assert max(distances(found, expected)) < EXACT


@needs_compiler
@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 1)], ids=str)
def test_doubling_is_the_convolution_of_repeated_pixels(size: tuple[int, int]) -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(6, 5, 3, padding=1)
    there = copy.deepcopy(conv).double()
    x = torch.randn(2, 6, *size)
    x, wrt = x.requires_grad_(), list(conv.parameters())
    over = torch.randn(2, 5, 2 * size[0], 2 * size[1]).double()
    (x_there,) = exact([x])
    expected = results(PLAIN.doubled(x_there, there), over, [x_there, *there.parameters()])
    found = results(NATIVE.doubled(x, conv), over, [x, *wrt])
    assert max(distances(found, expected)) < EXACT


@needs_compiler
@pytest.mark.parametrize("keys", [{}, {"resnet_time_scale_shift": "scale_shift"},
                                  {"act_fn": "mish"}], ids=str)  # fmt: skip
def test_network_with_the_kernels_is_the_network(keys: dict[str, Any]) -> None:
    network, there = small(**keys), small(**keys).double()
    names = list(network.state_dict())
    assert prepared(network, "cpu") == "kernels: native in 14 places"
    assert list(network.state_dict()) == names
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([3.0, 500.0, 999.0])
    expected = there(x.double(), t)
    expected.square().sum().backward()
    found = network(x, t)
    found.square().sum().backward()
    assert far(found, expected) < 2 * EXACT
    for ours, theirs in zip(network.parameters(), there.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        # keys may all be moved alike: their bias has no gradient but for rounding
        if float(theirs.grad.norm()) > EXACT:
            assert far(ours.grad, theirs.grad) < 20 * EXACT
        else:
            assert float(ours.grad.norm()) < 20 * EXACT


@needs_compiler
def test_threads_change_nothing() -> None:
    """Bit for bit: an example is computed by one of them, from beginning to end."""
    torch.manual_seed(4)
    x, every = torch.randn(5, 32, 4, 4), torch.randn(5, 24, 4, 4)
    wrt = [x.requires_grad_(), torch.ones(32, requires_grad=True), every.requires_grad_()]
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = Norm.apply(x, None, wrt[1], torch.zeros(32), 8, 1e-5, True)
        z = Attend.apply(every, 2)
        found.append([y, z, *torch.autograd.grad(y.square().sum() + z.square().sum(), wrt)])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_compiler
def test_extremes() -> None:
    """No overflow in the exponential, and what is not a number stays seen."""
    gain, bias = torch.full((1,), 300.0), torch.zeros(1)
    x = torch.randn(1, 1, 8, 8)
    y = Norm.apply(x, None, gain, bias, 1, 1e-5, True)
    torch.testing.assert_close(y, F.silu(F.group_norm(x, 1, gain, bias, 1e-5)))
    x[0, 0, 3, 3] = torch.nan
    assert Norm.apply(x, None, gain, bias, 1, 1e-5, True).isnan().all()
    every = 1e4 * torch.randn(1, 12, 3, 3)
    torch.testing.assert_close(Attend.apply(every, 1), PLAIN.attended(every, 1))
    every[0, 0, 0, 0] = torch.nan
    assert Attend.apply(every, 1)[0, :, 0, 0].isnan().all()


@needs_compiler
def test_bfloat16_is_float32_but_for_rounding() -> None:
    network, there = small(), small().double()
    fuse(network, "cpu")
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([3.0, 500.0, 999.0])
    expected = there(x.double(), t)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, t)
    assert found.dtype == torch.bfloat16
    assert 1e-4 < far(found, expected) < 2e-2
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@needs_compiler
def test_float64_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    network, plain = small(), small().double()
    fuse(network, "cpu")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0])

    def refused(*_: Any) -> None:
        raise AssertionError("a kernel in C was called")

    monkeypatch.setattr(native, "call", refused)
    with pytest.raises(AssertionError, match="was called"):
        network(x, t)
    assert torch.equal(network.double()(x.double(), t), plain(x.double(), t))


@needs_compiler
def test_other_numbers_are_not_read_as_float32() -> None:
    with pytest.raises(AssertionError, match="float32 in memory"):
        Attend.apply(torch.randn(1, 3, 2, 2).double(), 1)


@needs_compiler
def test_a_second_derivative_is_refused() -> None:
    network = small()
    fuse(network, "cpu")
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(network(x, 5.0).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.cache_clear()


def test_without_a_compiler_it_is_said(without_library: pytest.MonkeyPatch) -> None:
    without_library.setenv("CC", "no-such-compiler")
    said = prepared(small(), "cpu")
    reason = "it needs Linux and a C compiler; no-such-compiler is none, CC names another"
    assert said == f"kernels: plain (native: {reason})"
    with pytest.raises(InputRefused, match="needs Linux and a C compiler"):
        prepared(small(), "cpu", kernels="native")


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is compiled elsewhere")
def test_a_compiler_that_fails_is_quoted(
    without_library: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    failing = tmp_path / "cc"
    failing.write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    failing.chmod(0o755)
    without_library.setenv("CC", str(failing))
    without_library.setenv("NELBO_CACHE", str(tmp_path / "nelbo"))
    assert prepared(small(), "cpu").endswith(f"(native: {failing}: no such option)")
    assert not list((tmp_path / "nelbo").iterdir())


@pytest.mark.parametrize("content", [b"", b"cut short"])
@needs_compiler
def test_a_library_that_was_cut_short_is_made_again(
    without_library: pytest.MonkeyPatch, tmp_path: Any, content: bytes
) -> None:
    place = tmp_path / "native.so"
    place.write_bytes(content)
    without_library.setattr(c_library, "_place", lambda _: place)
    assert prepared(small(), "cpu").startswith("kernels: native in")


@needs_compiler
def test_a_library_of_another_kind_is_no_crash(
    without_library: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    stray = tmp_path / "stray.so"
    source = tmp_path / "stray.c"
    source.write_text("int other(void) { return 1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(stray)], check=True)
    without_library.setattr(c_library, "_place", lambda _: stray)
    said = prepared(small(), "cpu")
    assert "norm_forward: delete that file" in said and str(stray) in said


@needs_compiler
def test_a_folder_that_cannot_be_written_is_named(
    without_library: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "file").write_text("")
    without_library.setenv("NELBO_CACHE", str(tmp_path / "file"))
    said = prepared(small(), "cpu")
    assert "NELBO_CACHE names another folder" in said and str(tmp_path) in said


def test_a_network_without_such_parts(without_library: pytest.MonkeyPatch) -> None:
    assert prepared(nn.Linear(2, 2), "cpu") == "kernels: plain"
    with pytest.raises(InputRefused, match="parts of a U-Net, and this network has none"):
        prepared(nn.Linear(2, 2), "cpu", kernels="native")


def test_without_a_home_it_is_said(without_library: pytest.MonkeyPatch) -> None:
    def homeless() -> None:
        raise RuntimeError("Could not determine home directory.")

    without_library.delenv("XDG_CACHE_HOME", raising=False)
    without_library.delenv("NELBO_CACHE", raising=False)
    without_library.setattr("pathlib.Path.home", homeless)
    without_library.setattr("shutil.which", lambda _: "/usr/bin/cc")
    assert "home directory" in prepared(small(), "cpu")


def test_devices_and_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
    with pytest.raises(InputRefused, match="on processors, not on cuda"):
        prepared(small(), "cuda", kernels="native")
    said = prepared(small(), "cpu", compiled=True)
    assert said == "kernels: plain (native: the network is compiled), compiled"


def test_kernels_belong_to_a_start_and_not_to_a_run() -> None:
    kind = kind_of("images", DIFFUSION)
    typed = kind(path=Path("pictures"), kernels="plain", graphs="none")
    assert not {"kernels", "graphs"} & set(stored(typed))
    own = kind(path=Path("pictures"), rate=3e-4)
    now = started(own, typed)
    assert (now.kernels, now.graphs, now.rate) == ("plain", "none", 3e-4)
