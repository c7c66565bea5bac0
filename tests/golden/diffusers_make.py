"""Writes diffusers_tiny/ and diffusers_tiny.npz with diffusers' own objects (0.42.1 was used).

    pip install diffusers==0.42.1 && python tests/golden/diffusers_make.py

A pipeline as `save_pretrained` leaves it, with a small random network; and for every timestep an
input, the network's output, the mean of the scheduler's step (its noise set to zero) and the
scheduler's variance. At timestep 0 the step gives the predicted data itself.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.schedulers import scheduling_ddpm

HERE = Path(__file__).parent
STEPS = 10


def main() -> None:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 4),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=2,
    ).eval()
    scheduler = DDPMScheduler(num_train_timesteps=STEPS, beta_start=1e-3, beta_end=0.5)
    DDPMPipeline(network, scheduler).save_pretrained(HERE / "diffusers_tiny")
    zero = lambda shape, **_: torch.zeros(shape)  # noqa: E731
    scheduling_ddpm.randn_tensor = zero
    rows: dict[str, list[np.ndarray]] = {"x": [], "output": [], "mean": [], "variance": []}
    for i in range(STEPS):
        x = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            output = network(x, i).sample
        mean = scheduler.step(output, i, x).prev_sample
        found = {"x": x, "output": output, "mean": mean, "variance": scheduler._get_variance(i)}
        for name, value in found.items():
            rows[name].append(value.numpy())
    np.savez_compressed(HERE / "diffusers_tiny.npz", **{k: np.stack(v) for k, v in rows.items()})


if __name__ == "__main__":
    main()
