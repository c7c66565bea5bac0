"""The configuration of a `UNet`: diffusers' keys and defaults, each checked when it is read.

The keys equal those of `UNet2DModel` in diffusers 0.42, so that a directory written there is read
here and the other way round. Three more (`OWN`) describe published networks that it cannot; they
are left out of the JSON where they are not in use. A value that nelbo does not compute is refused
by name; it is never ignored, since an ignored key is another model under the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nelbo.errors import InputRefused

ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")
DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
OWN = ("num_heads", "num_heads_up", "time_features")
"""Keys that diffusers' `UNet2DModel` does not have."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Keys of `UNet2DModel` with its defaults; see `UNet` for their meaning.

    Raises:
        InputRefused: a value is not supported, or two of them contradict each other.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + 3 * ("AttnDownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = 3 * ("AttnUpBlock2D",) + ("UpBlock2D",)
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None
    num_heads: int | None = None
    num_heads_up: int | None = None
    time_features: int | None = None

    def __post_init__(self) -> None:
        self._check_names()
        self._check_blocks()
        self._check_groups()
        self._check_widths()

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> UNetConfig:
        """Read a mapping as JSON holds it; keys that start with an underscore are notes.

        Raises:
            InputRefused: a key is unknown, or a value is refused.
        """
        stated: dict[str, Any] = {k: v for k, v in keys.items() if not k.startswith("_")}
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(stated) - known)
        if unknown:
            raise InputRefused(
                f"unknown UNet configuration keys: {', '.join(unknown)}; nelbo knows those of "
                "diffusers' UNet2DModel, and drops none that it does not understand"
            )
        frozen: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in stated.items()
        }
        return cls(**frozen)

    def json(self) -> dict[str, Any]:
        """Keys with JSON values in diffusers' order, those of `OWN` only where they are in use."""
        listed = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return {key: v for key, v in listed.items() if key not in OWN or key in self.own}

    @property
    def own(self) -> tuple[str, ...]:
        """Keys in use that diffusers' `UNet2DModel` does not have: it cannot hold this network."""
        return tuple(key for key in OWN if getattr(self, key) is not None)

    def head_dim(self, channels: int, up: bool = False) -> int:
        """Channels of an attention head in a layer of so many channels, `up` on the way up."""
        heads = self.num_heads_up if up and self.num_heads_up is not None else self.num_heads
        if heads is not None:
            return channels // heads
        return channels if self.attention_head_dim is None else self.attention_head_dim

    @property
    def time_width(self) -> int:
        """Features of the embedded time."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def waves(self) -> int:
        """Features of the sinusoid that is embedded."""
        return self.time_features or self.block_out_channels[0]

    @property
    def factor(self) -> int:
        """What height and width must be divisible by: every level but the last halves them."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def _check_names(self) -> None:
        _one_of("time_embedding_type", self.time_embedding_type, ("positional",))
        _one_of("mid_block_type", self.mid_block_type, ("UNetMidBlock2D", None))
        _one_of("downsample_padding", self.downsample_padding, (0, 1))
        _one_of("downsample_type", self.downsample_type, ("conv", "resnet"))
        _one_of("upsample_type", self.upsample_type, ("conv", "resnet"))
        _one_of("act_fn", self.act_fn, ACTIVATIONS)
        _one_of("class_embed_type", self.class_embed_type, (None, "timestep"))
        time = self.resnet_time_scale_shift
        _one_of("resnet_time_scale_shift", time, ("default", "scale_shift"))

    def _check_blocks(self) -> None:
        for name in self.down_block_types:
            _one_of("down_block_types", name, DOWN_BLOCKS)
        for name in self.up_block_types:
            _one_of("up_block_types", name, UP_BLOCKS)
        levels = len(self.block_out_channels)
        if levels == 0 or {len(self.down_block_types), len(self.up_block_types)} != {levels}:
            raise InputRefused(
                f"block_out_channels has {levels} levels, down_block_types "
                f"{len(self.down_block_types)}, up_block_types {len(self.up_block_types)}: "
                "give each the same number, at least one"
            )

    def _check_groups(self) -> None:
        last = self.block_out_channels[-1:]
        norms = [("norm_num_groups", self.norm_num_groups, self.block_out_channels)]
        if self.attn_norm_num_groups is not None:
            norms.append(("attn_norm_num_groups", self.attn_norm_num_groups, last))
        for key, groups, layers in norms:
            for channels in layers:
                if not groups or channels % groups:
                    raise InputRefused(
                        f"{key}={groups} does not divide block_out_channels "
                        f"{list(self.block_out_channels)}: choose a common divisor"
                    )

    def _check_widths(self) -> None:
        counts = ("in_channels", "out_channels", "layers_per_block")
        for key in counts:
            if getattr(self, key) < 1:
                raise InputRefused(f"{key}={getattr(self, key)}: choose at least 1")
        if self.waves // 2 <= self.freq_shift:
            key = "time_features" if self.time_features else "block_out_channels[0]"
            raise InputRefused(
                f"{key}={self.waves} leaves no frequency for the "
                f"time embedding with freq_shift={self.freq_shift}: choose more channels"
            )
        self._check_heads()

    def _check_heads(self) -> None:
        down = self._widths(self.down_block_types, self.block_out_channels, "AttnDownBlock2D")
        if self.mid_block_type is not None and self.add_attention:
            down += self.block_out_channels[-1:]
        up = self._widths(self.up_block_types, self.block_out_channels[::-1], "AttnUpBlock2D")
        every = down if self.num_heads_up is not None else down + up
        for key, widths in (("num_heads", every), ("num_heads_up", up)):
            heads = getattr(self, key)
            if heads is not None and (heads < 1 or any(width % heads for width in widths)):
                raise InputRefused(
                    f"{key}={heads} does not divide the channels {sorted(set(widths))} of the "
                    "layers with attention: choose a common divisor"
                )

    @staticmethod
    def _widths(kinds: Sequence[str], widths: Sequence[int], kind: str) -> tuple[int, ...]:
        return tuple(w for k, w in zip(kinds, widths, strict=True) if k == kind)


def _one_of(key: str, value: object, allowed: Iterable[object]) -> None:
    if value not in allowed:
        names = ", ".join(repr(name) for name in allowed)
        raise InputRefused(f"UNet configuration: {key}={value!r} is not supported, only {names}")
