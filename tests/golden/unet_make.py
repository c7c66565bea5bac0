"""Writes unet_cases.json and unet_cases.npz with diffusers' own UNet2DModel (0.42.1 was used).

    pip install diffusers==0.42.1 && python tests/golden/unet_make.py

Weights are a formula of the tensor's place in the state_dict, so that only names and shapes,
inputs and outputs are stored. All is float64 but the time embedding, which diffusers computes in
float32.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
SMALL: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
TINY: dict[str, Any] = SMALL | {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
CASES: dict[str, dict[str, Any]] = {
    "ddpm": TINY
    | {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
    },
    "learned_variance": SMALL
    | {
        "sample_size": [8, 12],
        "out_channels": 6,
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 4,
        "mid_block_scale_factor": math.sqrt(2),
    },
    "plain": SMALL
    | {
        "block_out_channels": [9, 6, 12],
        "norm_num_groups": 3,
        "down_block_types": 3 * ["DownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "upsample_type": "resnet",
        "attention_head_dim": 5,
        "add_attention": False,
        "center_input_sample": True,
        "act_fn": "gelu",
        "time_embedding_dim": 10,
        "num_class_embeds": 4,
    },
}
TIMES = np.array([0.0, 7.0, 998.25])
LABELS = np.array([3, 0, 1])


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """sin(1 + k + 0.7 i) / sqrt(fan-in) for entry i of tensor k; vectors are moved to (0, 1)."""
    made = {}
    for k, (name, shape) in enumerate(shapes.items()):
        waves = np.sin(1 + k + 0.7 * np.arange(math.prod(shape))).reshape(shape)
        fan = math.prod(shape[1:])
        values = waves / math.sqrt(fan) if len(shape) > 1 else (1 + waves) / 2
        made[name] = torch.from_numpy(values)
    return made


def images(config: dict[str, Any]) -> np.ndarray:
    """Three inputs of the case's channels, 8x12 unless it names its size."""
    size = config.get("sample_size", [8, 12])
    sides = (size, size) if isinstance(size, int) else tuple(size)
    shape = (3, config.get("in_channels", 3), *sides)
    return 1.5 * np.cos(1.3 * np.arange(math.prod(shape))).reshape(shape)


def main() -> None:
    from diffusers import UNet2DModel

    arrays, tensors = {"times": TIMES, "labels": LABELS}, {}
    for name, config in CASES.items():
        network = UNet2DModel(**config).double().eval()
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        network.load_state_dict(weights(shapes))
        x, t = torch.from_numpy(images(config)), torch.from_numpy(TIMES)
        labels = torch.from_numpy(LABELS) if "num_class_embeds" in config else None
        with torch.no_grad():
            arrays[f"{name}_out"] = network(x, t, labels).sample.numpy()
        arrays[f"{name}_in"] = x.numpy()
        tensors[name] = {"config": config, "tensors": {k: list(s) for k, s in shapes.items()}}
    np.savez_compressed(HERE / "unet_cases.npz", **arrays)
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in tensors.items())
    (HERE / "unet_cases.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
