"""The U-Net of denoising diffusion: diffusers' `UNet2DModel` in names, shapes and numbers.

An image goes down a ladder of resolutions and up again, every level seeing the states that the way
down left at it (Ronneberger et al., 2015), each residual block knowing the time (Ho et al., 2020).
Configuration keys and tensor names are diffusers', so that exporting a trained network, or reading
a published one, is a copy of tensors. Tests hold the outputs equal to those of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nelbo.errors import InputRefused
from nelbo.networks.attention import Attention
from nelbo.networks.kernels import PLAIN, Kernels
from nelbo.networks.layers import per_example, sinusoid
from nelbo.networks.unet_blocks import Down, Middle, Residual, Up, activation
from nelbo.networks.unet_config import UNetConfig


class UNet(nn.Module):
    """U-Net over images whose height and width are divisible by 2^(levels - 1).

    Arguments (keyword only; names and defaults are diffusers'):
        sample_size: side or [height, width] of the images; a note to samplers, not used here.
        in_channels: channels of the input.
        out_channels: channels of the output; twice the data's for a learned variance.
        center_input_sample: use 2x - 1 for x.
        time_embedding_type: "positional".
        time_embedding_dim: width of the embedded time; 4 block_out_channels[0] when None.
        freq_shift: see `sinusoid`; DDPM has 1.
        flip_sin_to_cos: cosines first; DDPM has False.
        down_block_types: "DownBlock2D", "AttnDownBlock2D" or "ResnetDownsampleBlock2D" for each
            level, finest first.
        mid_block_type: "UNetMidBlock2D" or None.
        up_block_types: "UpBlock2D", "AttnUpBlock2D" or "ResnetUpsampleBlock2D" for each level,
            coarsest first.
        block_out_channels: channels of each level, finest first.
        layers_per_block: residual blocks per level on the way down; one more on the way up.
        mid_block_scale_factor: divides the sums of the middle's residual paths.
        downsample_padding: 1, or 0 for one row and column at the lower right (DDPM).
        downsample_type: "conv" or "resnet", for levels with attention; others by their block type.
        upsample_type: likewise.
        dropout: probability, in the residual blocks.
        act_fn: "silu" ("swish"), "mish", "gelu" or "relu", in the residual blocks.
        attention_head_dim: channels of a head; None for a single head.
        norm_num_groups: groups of every normalisation.
        attn_norm_num_groups: groups of the one in the middle's attention, when it differs.
        norm_eps: of every normalisation; DDPM has 1e-6.
        resnet_time_scale_shift: "default" adds the time, "scale_shift" scales and shifts by it.
        add_attention: attention in the middle.
        class_embed_type: None or "timestep": the condition is embedded like a time.
        num_class_embeds: with class_embed_type None, the number of classes; None for no condition.
        num_train_timesteps: a note, not used here.
        num_heads: heads of every attention, whatever its width; attention_head_dim is not used
            then. This key and the next two are not diffusers'.
        num_heads_up: the same on the way up, when it differs.
        time_features: width of the sinusoid of the time; block_out_channels[0] when None.

    Raises:
        InputRefused: a key is unknown or its value not supported.

    References:
        Ho et al. (2020), appendix B; Dhariwal and Nichol (2021), section 3.
    """

    def __init__(self, **keys: Any) -> None:
        super().__init__()
        settings = UNetConfig.of(keys)
        self.settings = settings
        first, width = settings.block_out_channels[0], settings.time_width
        levels = range(len(settings.block_out_channels))
        self.conv_in = nn.Conv2d(settings.in_channels, first, 3, padding=1)
        self.time_embedding = _Embedding(settings.waves, width)
        self.class_embedding: nn.Module | None = None
        if settings.class_embed_type == "timestep":
            self.class_embedding = _Embedding(settings.waves, width)
        elif settings.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(settings.num_class_embeds, width)
        self.down_blocks = nn.ModuleList([Down(settings, level) for level in levels])
        self.mid_block = None if settings.mid_block_type is None else Middle(settings)
        self.up_blocks = nn.ModuleList([Up(settings, index) for index in levels])
        self.act = activation(settings)
        self.kernels: Kernels = PLAIN
        self.conv_norm_out = nn.GroupNorm(settings.norm_num_groups, first, eps=settings.norm_eps)
        self.conv_out = nn.Conv2d(first, settings.out_channels, 3, padding=1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UNet:
        """Build from the content of a config.json; keys with a leading underscore are notes.

        Raises:
            InputRefused: a key is unknown or its value not supported.
        """
        return cls(**config)

    @property
    def config(self) -> dict[str, Any]:
        """The keys with their values, ready for JSON: what `from_config` reads, and diffusers too
        unless `settings.own` names keys that it does not have.
        """
        return self.settings.json()

    @property
    def factor(self) -> int:
        """What the height and the width of the input must be divisible by."""
        return self.settings.factor

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Tensor | None = None) -> Tensor:
        """Apply the network.

        Arguments:
            x_t: (B, in_channels, H, W).
            t: () or (B,), diffusers' timestep: 0..T-1, fractions allowed.
            cond: None, or (B,) classes (or numbers, with class_embed_type "timestep").

        Returns:
            (B, out_channels, H, W).

        Raises:
            InputRefused: the shape of x_t or t is off, or cond is missing or not expected.
        """
        self._check(x_t)
        embedded = self.act(self._embed(x_t, t, cond))
        x = 2 * x_t - 1 if self.settings.center_input_sample else x_t
        # channels last: a convolution reads neighbours as one run and keeps the format, which one
        # channel alone does not have
        last = torch.channels_last
        x = self.conv_in(x.contiguous(memory_format=last)).contiguous(memory_format=last)
        states = [x]
        for down in self.down_blocks:
            states += down(states[-1], embedded)
        x = states[-1] if self.mid_block is None else self.mid_block(states[-1], embedded)
        for up in self.up_blocks:
            x = up(x, states, embedded)
        out: Tensor = self.conv_out(self.kernels.normalised(x, self.conv_norm_out, F.silu))
        return out.contiguous()

    def _embed(self, x_t: Tensor, t: Tensor | float, cond: Tensor | None) -> Tensor:
        embedded: Tensor = self.time_embedding(self._waves(per_example(t, x_t)))
        if (cond is None) != (self.class_embedding is None):
            remedy = "pass cond, (B,)" if cond is None else "pass cond=None"
            kind = "no condition" if self.class_embedding is None else "a condition"
            raise InputRefused(f"this UNet was built for {kind}: {remedy}")
        if cond is None or self.class_embedding is None:
            return embedded
        timelike = self.settings.class_embed_type == "timestep"
        labels = per_example(cond, x_t)
        out: Tensor = self.class_embedding(self._waves(labels) if timelike else labels)
        return embedded + out

    def _waves(self, t: Tensor) -> Tensor:
        flip, shift = self.settings.flip_sin_to_cos, self.settings.freq_shift
        waves = sinusoid(t, self.settings.waves, cos_first=flip, freq_shift=shift)
        return waves.to(self.time_embedding.linear_1.weight.dtype)

    def _check(self, x_t: Tensor) -> None:
        channels, factor = self.settings.in_channels, self.factor
        if x_t.ndim != 4 or x_t.shape[1] != channels:
            raise InputRefused(
                f"the UNet reads (B, {channels}, H, W), this input is {tuple(x_t.shape)}"
            )
        height, width = x_t.shape[2:]
        if height % factor or width % factor:
            raise InputRefused(
                f"the UNet halves the resolution {len(self.down_blocks) - 1} times, so height and "
                f"width must be divisible by {factor}; this input is {height}x{width}: "
                "crop or pad it, or give the network fewer levels"
            )


class _Embedding(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width_out)
        self.linear_2 = nn.Linear(width_out, width_out)

    def forward(self, waves: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(waves)))
        return out


def zero_last(module: nn.Module) -> nn.Module:
    """Zero the last layer of every residual path, and the output, of each `UNet` inside a module.

    Every residual block and attention then starts as its shortcut, and the network as the zero
    function, which trains faster and more stably from scratch. torch's default initialisation,
    which diffusers keeps, is untouched unless this is called.

    Arguments:
        module: a `UNet`, or any module that holds one; changed in place.

    Returns:
        The same module.

    References:
        Ho et al. (2020), released code; Goyal et al. (2017), section 5.1.
    """
    for part in module.modules():
        last = _last(part)
        if last is not None:
            nn.init.zeros_(last.weight)
            assert last.bias is not None
            nn.init.zeros_(last.bias)
    return module


def _last(part: nn.Module) -> nn.Conv2d | nn.Linear | None:
    if isinstance(part, UNet):
        return part.conv_out
    if isinstance(part, Residual):
        return part.conv2
    if isinstance(part, Attention):
        linear = part.to_out[0]
        assert isinstance(linear, nn.Linear)
        return linear
    return None
