"""The fused normalisation equals its eager twin, and is never chosen in silence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nelbo.errors import InputRefused, UsageError
from nelbo.networks.kernels import PLAIN, activated
from nelbo.networks.triton_norm import TRITON, fuse, norm_silu, obstacle
from nelbo.networks.unet import UNet
from nelbo.speed import prepared

gpu = pytest.mark.gpu
HERE = obstacle("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(HERE is not None, reason=f"the fused kernel: {HERE}")
SHAPES = ((2, 128, 32, 32, 32), (3, 384, 16, 16, 32), (2, 32, 8, 8, 8), (2, 24, 5, 7, 3),
          (2, 64, 1, 1, 32), (1, 512, 4, 4, 32))  # fmt: skip


def small() -> UNet:
    torch.manual_seed(0)
    return UNet(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
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


def gradients(y: Tensor, over: Tensor, wrt: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y.double() * over).sum(), wrt)


def far(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


@gpu
@needs_gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shifted", [True, False], ids=["shift", "no shift"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=str
)
def test_kernel_equals_its_twin(
    shape: tuple[int, ...], shifted: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Value and every gradient against float64, by ‖found − expected‖/‖expected‖."""
    batch, channels, height, width, groups = shape
    torch.manual_seed(1)
    x = (3 + torch.randn(batch, channels, height, width, device="cuda")).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    shift = torch.randn(batch, channels, device="cuda").requires_grad_() if shifted else None
    gain, bias = (torch.randn(channels, device="cuda").requires_grad_() for _ in range(2))
    wrt = [v for v in (x, shift, gain, bias) if v is not None]
    over = torch.randn(x.shape, device="cuda").to(dtype).double()
    y, _, _ = norm_silu(x, shift, gain, bias, groups, 1e-5)
    found = [y, *gradients(y, over, wrt)]
    exact = [v.detach().double().requires_grad_() for v in wrt]
    h = exact[0] + exact[1][:, :, None, None] if shifted else exact[0]
    expected = nn.functional.silu(nn.functional.group_norm(h, groups, exact[-2], exact[-1], 1e-5))
    # a group of two numbers that lie close together has a root of its own size
    wide = 50 if height * width == 1 else 1
    for ours, theirs in zip(found, [expected, *gradients(expected, over, exact)], strict=True):
        assert ours.isfinite().all()
        # a shift that the normalisation takes out again has no gradient but for rounding
        if float(theirs.norm()) > 1e-6:
            assert far(ours, theirs) < tolerance * wide


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
    assert said.startswith("kernels: triton in 1")
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
