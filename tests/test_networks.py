"""Layers, MLP and ResNet, and the laws that every network obeys: shapes, gradients, companions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nelbo.errors import InputRefused
from nelbo.networks.layers import Fourier, Positions, Timed, TimeFeatures, sinusoid
from nelbo.networks.mlp import MLP
from nelbo.networks.resnet import ResNet
from nelbo.networks.unet import UNet

TINY: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


def built(network: nn.Module) -> nn.Module:
    """The network in float64 with every parameter drawn, so that no path is silent."""
    generator = torch.Generator().manual_seed(7)
    for parameter in network.double().parameters():
        scale = 0.5 / math.sqrt(max(parameter[0].numel(), 1)) if parameter.ndim > 1 else 0.3
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(scale * draw)
    return network.eval()


def draws(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


NETWORKS = {
    "unet": (lambda: UNet(**TINY), (3, 8, 12)),
    "unet scale_shift": (lambda: UNet(**TINY, resnet_time_scale_shift="scale_shift"), (3, 8, 8)),
    "timed unet": (lambda: Timed(UNet(**TINY), 1000, -1), (3, 8, 8)),
    "fourier unet": (lambda: Fourier(UNet(**TINY, in_channels=15), (0, 2.5)), (3, 8, 8)),
    "positioned unet": (lambda: Positions(UNet(**TINY, in_channels=5), (8, 4), 2), (3, 8, 4)),
    "mlp": (lambda: MLP(3, width=16), (3,)),
    "fourier mlp": (lambda: Fourier(MLP(9, width=16, out=3), (1,)), (3,)),
    "resnet": (lambda: ResNet(3, 3, channels=16, blocks=2), (3, 5, 7)),
    "resnet with all": (
        lambda: ResNet(3, 3, 16, 2, dropout=0.3, positions=(5, 7), attention=True),
        (3, 5, 7),
    ),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def test_other_networks_refuse_input() -> None:
    one = torch.tensor(0.5)
    with pytest.raises(InputRefused, match="built for a condition"):
        UNet(**TINY, num_class_embeds=3)(torch.zeros(1, 3, 8, 8), one)
    with pytest.raises(InputRefused, match=r"MLP reads \(B, 2\)"):
        MLP(2)(torch.zeros(4, 3), one)
    with pytest.raises(InputRefused, match="MLP takes no condition"):
        MLP(2)(torch.zeros(4, 2), one, one)
    with pytest.raises(InputRefused, match="groups=8 does not divide channels=12"):
        ResNet(1, 1, channels=12)
    with pytest.raises(InputRefused, match=r"ResNet reads \(B, 1, H, W\)"):
        ResNet(1, 1, channels=8)(torch.zeros(1, 2, 8, 8), one)
    with pytest.raises(InputRefused, match="5x7 images, this input is 7x5"):
        ResNet(1, 1, channels=8, positions=(5, 7))(torch.zeros(1, 1, 7, 5), one)
    with pytest.raises(InputRefused, match="8x8 images, this input is 8x4"):
        Positions(UNet(**TINY), (8, 8), 2)(torch.zeros(1, 1, 8, 4), one)


@every_network
def test_shape_and_gradient(name: str) -> None:
    make, shape = NETWORKS[name]
    network, x = built(make()).train(), draws(4, *shape).requires_grad_()
    out = network(x, torch.rand(4, dtype=torch.float64))
    assert out.shape == x.shape and out.dtype == torch.float64
    out.square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all() and parameter.grad.any(), key


@every_network
def test_example_does_not_see_its_companions(name: str) -> None:
    make, shape = NETWORKS[name]
    network, x, t = built(make()), draws(5, *shape), torch.linspace(0.1, 0.9, 5).double()
    with torch.no_grad():
        together = network(x, t)
        alone = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(5)])
    assert (together - alone).abs().max() < 1e-12


@every_network
def test_one_time_serves_the_batch(name: str) -> None:
    make, shape = NETWORKS[name]
    network, x, t = built(make()), draws(3, *shape), torch.tensor(0.3, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(network(x, t), network(x, t.expand(3)))
        assert (network(x, t) - network(x, t + 0.4)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [UNet, ResNet])
def test_dropout_acts_in_training_alone(kind: type[nn.Module]) -> None:
    network = built(UNet(**TINY, dropout=0.5) if kind is UNet else ResNet(3, 3, 16, dropout=0.5))
    x, t = draws(2, 3, 8, 8), torch.tensor(0.5)
    with torch.no_grad():
        assert torch.equal(network(x, t), network(x, t))
        network.train()
        assert not torch.equal(network(x, t), network(x, t))


def test_mlp_and_resnet_start_at_zero() -> None:
    assert torch.count_nonzero(MLP(2)(torch.randn(5, 2), torch.rand(5))) == 0
    network = ResNet(1, 2, channels=8, attention=True)
    assert torch.count_nonzero(network(torch.randn(2, 1, 8, 8), torch.rand(2))) == 0


def test_outputs_of_another_width() -> None:
    assert MLP(2, out=5)(torch.zeros(3, 2), 0.5).shape == (3, 5)
    assert ResNet(1, 17, channels=8)(torch.zeros(3, 1, 8, 8), 0.5).shape == (3, 17, 8, 8)


def test_resnet_mean_reaches_every_position() -> None:
    network, x = built(ResNet(1, 1, channels=8, blocks=1)), draws(1, 1, 32, 32)
    x.requires_grad_()
    network(x, 0.5)[0, 0, 0, 0].backward()
    assert x.grad is not None and bool((x.grad != 0).all())


def test_positions_tell_equal_pixels_apart() -> None:
    network = built(ResNet(1, 1, channels=8, blocks=1, positions=(16, 16)))
    with torch.no_grad():
        out = network(torch.zeros(1, 1, 16, 16, dtype=torch.float64), 0.5)[0, 0, 4:12, 4:12]
    assert out.std() > 1e-3


def test_sinusoid_is_its_formula() -> None:
    t = torch.tensor([0.0, 1.5, 999.0])
    waves = torch.tensor([10_000.0 ** (-k / 3) for k in range(4)], dtype=torch.float64)
    angles = t.double()[:, None] * waves
    truth = torch.cat((angles.sin(), angles.cos()), dim=1)
    ours = sinusoid(t, 8, cos_first=False, freq_shift=1)
    assert ours.dtype == torch.float32 and (ours - truth).abs().max() < 2e-4
    flipped = sinusoid(t, 9, cos_first=True, freq_shift=1)
    assert torch.equal(flipped, torch.cat((ours[:, 4:], ours[:, :4], torch.zeros(3, 1)), dim=1))


def test_time_features_tell_integers_as_floats() -> None:
    features = TimeFeatures(8)
    assert torch.equal(features(torch.tensor([0, 1])), features(torch.tensor([0.0, 1.0])))


class Recorder(nn.Module):
    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.seen = (x_t, t, cond)
        return x_t


def test_timed_gives_exact_integers() -> None:
    recorder, cond = Recorder(), torch.ones(1)
    steps = torch.arange(1, 1001, dtype=torch.float64)
    Timed(recorder, 1000, -1)(torch.zeros(1000, 1), steps / 1000, cond)
    _, t, passed = recorder.seen
    assert t.dtype == torch.float32 and torch.equal(t, (steps - 1).float()) and passed is cond


def test_fourier_channels() -> None:
    recorder, x = Recorder(), draws(2, 1, 3, 3)
    wrapped = Fourier(recorder, (1, 3))
    wrapped(x, torch.tensor(0.5))
    angles = [2 * math.pi * x, 8 * math.pi * x]
    waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
    assert torch.equal(recorder.seen[0], torch.cat([x, *waves], dim=1))
    assert recorder.seen[0].shape[1] == wrapped.multiplier
