"""The U-Net: equality with diffusers (stored, and live where it is installed), refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nelbo.errors import InputRefused
from nelbo.networks.layers import Timed
from nelbo.networks.unet import UNet, zero_last

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from unet_make import SMALL, TINY, images, weights  # noqa: E402

CASES = json.loads((GOLDEN / "unet_cases.json").read_text())
CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
}
LIVE: dict[str, dict[str, Any]] = {
    "grey 8x8": TINY | {"sample_size": 8, "in_channels": 1, "out_channels": 1},
    "learned variance": TINY | {"out_channels": 6},
    "scale and shift": TINY | {"resnet_time_scale_shift": "scale_shift"},
    "own groups in the middle": TINY
    | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "narrow heads": TINY | {"attention_head_dim": 3},
    "one head": TINY | {"attention_head_dim": None},
    "flip": TINY | {"flip_sin_to_cos": False, "freq_shift": 1},
    "deep": TINY | {"layers_per_block": 3, "mid_block_scale_factor": 2.0},
    "no middle attention": TINY | {"add_attention": False},
    "no middle": TINY | {"mid_block_type": None},
    "padding 0": TINY | {"downsample_padding": 0},
    "resampling blocks": SMALL
    | {
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "dropout": 0.5,
    },
    "resampling blocks without attention": SMALL
    | {
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "UpBlock2D"],
        "resnet_time_scale_shift": "scale_shift",
    },
    "mish, centred": TINY | {"act_fn": "mish", "center_input_sample": True},
    "gelu": TINY | {"act_fn": "gelu", "time_embedding_dim": 12},
    "relu": TINY | {"act_fn": "relu", "block_out_channels": [12, 8]},
    "classes": TINY | {"num_class_embeds": 10},
    "embedded condition": TINY | {"class_embed_type": "timestep"},
    "cifar10, narrow": CIFAR10 | {"block_out_channels": [32, 64, 64, 64]},
}


def draws(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_unet_equals_stored_diffusers_output(name: str) -> None:
    case, stored = CASES[name], np.load(GOLDEN / "unet_cases.npz")
    network = UNet.from_config(case["config"])
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == case["tensors"]
    network.double().load_state_dict(weights(case["tensors"]))
    x, t = torch.from_numpy(stored[f"{name}_in"]), torch.from_numpy(stored["times"])
    np.testing.assert_array_equal(images(case["config"]), x)
    cond = torch.from_numpy(stored["labels"]) if "num_class_embeds" in case["config"] else None
    truth = torch.from_numpy(stored[f"{name}_out"])
    with torch.no_grad():
        exact, single = network(x, t, cond), network.float()(x.float(), t, cond)
    # The embedding of t = 0 is exact; others hold a float32 sine that may differ by machine.
    assert (exact - truth)[0].abs().max() < 1e-10
    assert (exact - truth).abs().max() < 1e-4 * truth.abs().max()
    assert (single - truth).abs().max() < 1e-4 * truth.abs().max()


@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_unet_equals_diffusers(name: str, dtype: torch.dtype, tolerance: float) -> None:
    peer = pytest.importorskip("diffusers").UNet2DModel(**LIVE[name])
    if name == "embedded condition" and dtype == torch.float64:
        pytest.skip("diffusers feeds a float32 embedding to float64 weights here")
    own = UNet.from_config(LIVE[name]).to(dtype).eval()
    shapes = {key: tuple(tensor.shape) for key, tensor in peer.state_dict().items()}
    own.load_state_dict(weights(shapes), strict=True)
    peer.to(dtype).eval().load_state_dict(own.state_dict(), strict=True)
    x, t = draws(3, own.settings.in_channels, 16, 8).to(dtype), torch.tensor([0.0, 7.0, 998.25])
    cond = torch.tensor([3, 0, 9]) if own.class_embedding is not None else None
    with torch.no_grad():
        ours, theirs = own(x, t, cond), peer(x, t, cond).sample
    assert (ours - theirs).abs().max() < tolerance * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("name", LIVE)
def test_configuration_is_that_of_diffusers(name: str) -> None:
    peer = pytest.importorskip("diffusers").UNet2DModel(**LIVE[name])
    theirs = json.loads(peer.to_json_string())
    assert UNet.from_config(theirs).config == {
        k: v for k, v in theirs.items() if not k.startswith("_")
    }


def test_defaults_and_size_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        pairs = [(UNet(**keys), diffusers.UNet2DModel(**keys)) for keys in ({}, CIFAR10)]
    for own, peer in pairs:
        shapes = {key: tensor.shape for key, tensor in own.state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in peer.state_dict().items()}


def test_ddpm_for_cifar10_has_its_published_size() -> None:
    with torch.device("meta"):
        network = UNet(**CIFAR10)
    assert sum(p.numel() for p in network.parameters()) == 35_746_307


def test_configuration_survives_json() -> None:
    network = UNet(**TINY, sample_size=(8, 12))
    notes = {"_class_name": "UNet2DModel", "_diffusers_version": "0.42.1"}
    again = UNet.from_config(json.loads(json.dumps(network.config | notes)))
    assert again.config == network.config
    assert again.config["sample_size"] == [8, 12]


def test_keys_of_our_own_are_named_and_written_only_when_used() -> None:
    plain = UNet(**TINY)
    assert plain.settings.own == () and not {"num_heads", "time_features"} & plain.config.keys()
    keys = TINY | {"num_heads": 2, "num_heads_up": 4, "time_features": 6}
    network = UNet(**keys)
    assert network.settings.own == ("num_heads", "num_heads_up", "time_features")
    assert UNet.from_config(network.config).settings == network.settings
    assert [a.heads for a in network.mid_block.attentions] == [2]
    assert [a.heads for a in network.up_blocks[0].attentions] == [4, 4]
    assert network.time_embedding.linear_1.in_features == 6


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"down_blocks": 3, "zebra": 1}, "down_blocks, zebra"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"time_embedding_type": "learned"}, "time_embedding_type='learned'"),
        ({"class_embed_type": "identity"}, "class_embed_type='identity'"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "UNetMidBlock2DCrossAttn"),
        ({"act_fn": "tanh"}, "act_fn='tanh'"),
        ({"downsample_padding": 2}, "downsample_padding=2"),
        ({"downsample_type": "fir"}, "downsample_type='fir'"),
        ({"upsample_type": "fir"}, "upsample_type='fir'"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial'"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "SkipDownBlock2D"),
        ({"up_block_types": ["UpBlock2D", "SkipUpBlock2D"]}, "SkipUpBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types 1"),
        ({"block_out_channels": [8, 18]}, "norm_num_groups=4"),
        ({"norm_num_groups": None}, "norm_num_groups=None"),
        ({"attn_norm_num_groups": 5}, "attn_norm_num_groups=5"),
        ({"attention_head_dim": 17}, "attention_head_dim=17"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"num_heads_up": 0}, "num_heads_up=0"),
        ({"time_features": 1}, "time_features=1"),
        ({"layers_per_block": 0}, "layers_per_block=0"),
        ({"norm_num_groups": 1, "block_out_channels": [2, 8], "freq_shift": 1}, "freq_shift=1"),
    ],
)
def test_unet_refuses_by_name(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputRefused, match=words.replace("[", r"\[")):
        UNet.from_config(TINY | keys)


@pytest.mark.parametrize(
    "shape, t, cond, words",
    [
        ((2, 3, 8, 9), torch.tensor(1.0), None, "divisible by 2; this input is 8x9"),
        ((2, 1, 8, 8), torch.tensor(1.0), None, r"\(B, 3, H, W\)"),
        ((3, 8, 8), torch.tensor(1.0), None, r"\(B, 3, H, W\)"),
        ((2, 3, 8, 8), torch.ones(2, 1), None, r"shape \(2,\)"),
        ((2, 3, 8, 8), torch.ones(3), None, r"shape \(2,\)"),
        ((2, 3, 8, 8), torch.tensor(1.0), torch.tensor([0, 1]), "built for no condition"),
    ],
)
def test_unet_refuses_input(
    shape: tuple[int, ...], t: Tensor, cond: Tensor | None, words: str
) -> None:
    with pytest.raises(InputRefused, match=words):
        UNet(**TINY)(torch.zeros(shape), t, cond)


def test_integer_times_equal_their_floats() -> None:
    network, x = UNet(**TINY).double(), draws(2, 3, 8, 8)
    with torch.no_grad():
        out = network(x, torch.tensor([4, 900]))
        assert torch.equal(out, network(x, torch.tensor([4.0, 900.0], dtype=torch.float64)))
        assert torch.equal(network(x, 4)[0], network(x, torch.tensor(4))[0])


def test_dropout_falls_where_that_of_diffusers_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    # A mask by position stands in for a drawn one, which depends on the layout in memory too.
    def masked(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        waves = torch.arange(x.numel()).reshape(x.shape).sin()
        return x * (waves > 2 * p - 1) / (1 - p) if training else x

    keys = TINY | {"dropout": 0.4}
    peer = pytest.importorskip("diffusers").UNet2DModel(**keys).train()
    own = UNet(**keys).train()
    own.load_state_dict(peer.state_dict())
    x, t = draws(2, 3, 8, 8).float(), torch.tensor(5)
    plain = own(x, t)
    monkeypatch.setattr(nn.functional, "dropout", masked)
    torch.testing.assert_close(own(x, t), peer(x, t).sample, rtol=1e-5, atol=1e-5)
    assert (own(x, t) - plain).abs().max() > 1e-3


def test_zero_last_silences_every_path() -> None:
    network = Timed(UNet(**TINY), 1000)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor(0.5)
    assert network(x, t).abs().max() > 1e-3
    assert zero_last(network) is network
    assert torch.count_nonzero(network(x, t)) == 0
    unet = network.network
    resnet, attention = unet.mid_block.resnets[0], unet.mid_block.attentions[0]
    h, embedded = torch.randn(2, 16, 4, 4), torch.randn(2, 32)
    assert torch.equal(resnet(h, embedded), h) and torch.equal(attention(h), h)
