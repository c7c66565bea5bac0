"""Tensors of OpenAI's `UNetModel` under the names of `UNet`.

Its blocks are numbered in the order in which they run: input_blocks.0 is the first convolution,
then one block per residual block and per halving, output_blocks likewise, and inside a block 0 is
the residual block, 1 the attention, and the last one what doubles the resolution. Queries, keys
and values are one 1x1 convolution whose 3C rows are sorted by head, each with its own q, k and v
(`QKVAttentionLegacy`), or by q, k and v, each with its heads (the "new attention order").

The network itself is the same function (`unet_config`); only names, and this layout, differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from nelbo.errors import InputRefused
from nelbo.interop.openai_flags import Flags
from nelbo.networks.attention import Attention
from nelbo.networks.unet import UNet
from nelbo.networks.unet_config import UNetConfig

_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESAMPLING = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
    "conv": "conv",
}


def configuration(flags: Flags, channels: int, classes: int | None) -> UNetConfig:
    """The configuration of `UNet` that computes what the flags build.

    Arguments:
        flags: of the checkpoint.
        channels: of the images.
        classes: rows of the class embedding; None for a network without classes.

    Raises:
        InputRefused: the flags contradict each other.
    """
    widths = tuple(int(m * flags.num_channels) for m in flags.multipliers)
    down, up = _RESAMPLING if flags.resblock_updown else ("DownBlock2D", "UpBlock2D")
    resampling = "resnet" if flags.resblock_updown else "conv"
    attended = flags.attended
    unlike = widths[:1] != (flags.num_channels,)
    config = UNetConfig(
        sample_size=flags.image_size,
        in_channels=channels,
        out_channels=channels * (2 if flags.learn_sigma else 1),
        time_embedding_dim=4 * flags.num_channels if unlike else None,
        time_features=flags.num_channels if unlike else None,
        down_block_types=tuple("AttnDownBlock2D" if a else down for a in attended),
        up_block_types=tuple("AttnUpBlock2D" if a else up for a in reversed(attended)),
        block_out_channels=widths,
        layers_per_block=flags.num_res_blocks,
        downsample_type=resampling,
        upsample_type=resampling,
        dropout=flags.dropout,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if flags.use_scale_shift_norm else "default",
        num_class_embeds=classes,
        **_heads(flags, widths),
    )
    _check(flags, config)
    return config


def _check(flags: Flags, config: UNetConfig) -> None:
    """What the original asserts while it is built or called, and `UNetConfig` does not know."""
    if flags.image_size % config.factor:
        raise InputRefused(
            f"image_size={flags.image_size} cannot be halved {len(flags.multipliers) - 1} times, "
            "as the levels of channel_mult ask"
        )
    head = flags.num_head_channels
    widths = (*_attending(flags, config.block_out_channels), config.block_out_channels[-1])
    wrong = [width for width in widths if width % head]
    if head != -1 and wrong:
        raise InputRefused(f"num_head_channels={head} does not divide {wrong[0]} channels")


def _attending(flags: Flags, widths: tuple[int, ...]) -> set[int]:
    """Channels of the layers with attention; the middle, which always has it, apart."""
    return {width for width, attend in zip(widths, flags.attended, strict=True) if attend}


def _heads(flags: Flags, widths: tuple[int, ...]) -> dict[str, Any]:
    """One width of head where all layers share it, since diffusers knows that; else a number."""
    up = _attending(flags, widths)
    down = up | {widths[-1]}
    if flags.num_head_channels != -1:
        return {"attention_head_dim": flags.num_head_channels}
    heads = flags.num_heads
    heads_up = heads if flags.num_heads_upsample == -1 else flags.num_heads_upsample
    shared = {width / heads for width in down} | {width / heads_up for width in up}
    if len(shared) == 1 and widths[-1] % heads == 0:
        return {"attention_head_dim": widths[-1] // heads}
    return {"num_heads": heads} | ({} if heads == heads_up else {"num_heads_up": heads_up})


def modules(config: UNetConfig) -> dict[str, str]:
    """The module of theirs for every module of ours that holds tensors."""
    names = dict(_ENDS)
    for own, theirs in (*_down(config), *_middle(), *_up(config)):
        names |= {f"{own}.{part}": f"{theirs}.{other}" for part, other in _PARTS.items()}
        if ".downsamplers." in own:
            names[f"{own}.conv"] = f"{theirs}.op"
    return names


def _down(config: UNetConfig) -> Iterator[tuple[str, str]]:
    block = 1
    for level in range(len(config.block_out_channels)):
        own = f"down_blocks.{level}"
        for layer in range(config.layers_per_block):
            yield f"{own}.resnets.{layer}", f"input_blocks.{block}.0"
            yield f"{own}.attentions.{layer}", f"input_blocks.{block}.1"
            block += 1
        yield f"{own}.downsamplers.0", f"input_blocks.{block}.0"
        block += 1


def _middle() -> Iterator[tuple[str, str]]:
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"


def _up(config: UNetConfig) -> Iterator[tuple[str, str]]:
    block = 0
    for index, kind in enumerate(config.up_block_types):
        own = f"up_blocks.{index}"
        for layer in range(config.layers_per_block + 1):
            yield f"{own}.resnets.{layer}", f"output_blocks.{block}.0"
            yield f"{own}.attentions.{layer}", f"output_blocks.{block}.1"
            block += 1
        last = 2 if kind == "AttnUpBlock2D" else 1
        yield f"{own}.upsamplers.0", f"output_blocks.{block - 1}.{last}"


def theirs(network: UNet) -> dict[str, str]:
    """The tensor of theirs for every tensor of ours; three of ours share one qkv."""
    names = modules(network.settings)
    pairs = (name.rpartition(".") for name in network.state_dict())
    return {f"{module}.{leaf}": f"{names[module]}.{leaf}" for module, _, leaf in pairs}


def shapes(network: UNet) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that their file must hold, no more and no fewer."""
    own, found = network.state_dict(), {}
    for name, other in theirs(network).items():
        shape = tuple(own[name].shape)
        kind = other.split(".")[-2]
        shape = (3 * shape[0], *shape[1:]) if kind == "qkv" else shape
        conv = kind in ("qkv", "proj_out") and other.endswith("weight")
        found[other] = (*shape, 1) if conv else shape
    return found


def convert(network: UNet, tensors: Mapping[str, Tensor], new_order: bool) -> dict[str, Tensor]:
    """Our state dict from theirs, whose names and shapes have been checked.

    Arguments:
        network: of `configuration`; may be on the meta device.
        tensors: theirs.
        new_order: the flag use_new_attention_order.
    """
    converted = {}
    for name, other in theirs(network).items():
        module, _, leaf = name.rpartition(".")
        parent, _, part = module.rpartition(".")
        value = tensors[other]
        if part in ("to_q", "to_k", "to_v"):
            heads = 0 if new_order else _attention(network, parent).heads
            value = _share(value, "qkv".index(part[-1]), heads)
        elif other.endswith("proj_out.weight"):
            value = value[..., 0]
        converted[name] = value.contiguous()
    return converted


def _attention(network: nn.Module, name: str) -> Attention:
    module = network.get_submodule(name)
    assert isinstance(module, Attention)
    return module


def _share(qkv: Tensor, which: int, heads: int) -> Tensor:
    """Rows of q, k or v (which 0, 1, 2), sorted by head; heads 0: they lie in one piece."""
    rows = qkv.flatten(1) if qkv.dim() > 1 else qkv
    width = len(rows) // 3
    if not heads:
        return rows[which * width : (which + 1) * width]
    by_head = rows.unflatten(0, (heads, 3, width // heads))
    share: Tensor = by_head[:, which].flatten(0, 1)
    return share
