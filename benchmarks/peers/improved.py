"""improved-diffusion, from a folder with its repository: its UNetModel and GaussianDiffusion.

Its training loop needs MPI, so its update is written out: `training_losses` at uniform times, the
gradient norm that it logs, AdamW, one average of the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peers.contest import (
    RATE,
    STEPS,
    Absent,
    Contestant,
    Setting,
    Tuning,
    each,
    images,
    scaled,
    tunings,
)

NAME = "improved-diffusion"


class Loop:
    """Its `TrainLoop`, one update at a time."""

    def __init__(self, setting: Setting, tuning: Tuning, device: str, data: Tensor) -> None:
        from improved_diffusion import script_util, unet

        torch.manual_seed(0)
        self.setting, self.tuning, self.device, self.data = setting, tuning, device, data
        self.network: nn.Module = unet.UNetModel(
            in_channels=3,
            model_channels=setting.channels,
            out_channels=3,
            num_res_blocks=setting.layers,
            attention_resolutions=(setting.size // setting.attention,),
            channel_mult=setting.multipliers,
            num_heads=1,
        ).to(device)
        tuning.prepare(self.network)
        make: Any = script_util.create_gaussian_diffusion
        self.diffusion = make(steps=STEPS, noise_schedule="linear")
        spacing = f"ddim{setting.calls}"
        self.bounded = make(
            steps=STEPS, noise_schedule="linear", timestep_respacing=str(setting.terms)
        )
        self.spaced = make(steps=STEPS, noise_schedule="linear", timestep_respacing=spacing)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=RATE)
        self.average = [p.detach().clone() for p in self.network.parameters()]
        self.step = 0

    def update(self) -> float:
        x = self.tuning.images(scaled(self.data[self.step % len(self.data)]))
        t = torch.randint(0, STEPS, (len(x),), device=self.device)
        self.optimizer.zero_grad()
        with self.tuning.context(self.device):
            loss = self.diffusion.training_losses(self.network, x, t)["loss"].mean()
        loss.backward()
        sum((p.grad**2).sum().item() for p in self.network.parameters() if p.grad is not None)
        self.optimizer.step()
        for average, p in zip(self.average, self.network.parameters(), strict=True):
            average.mul_(0.9999).add_(p.detach(), alpha=1e-4)
        self.step += 1
        return float(loss.detach())

    def through(self) -> Tensor:
        x = self.tuning.images(scaled(self.data[0]))
        t = torch.full((len(x),), 500, device=self.device)
        with self.tuning.context(self.device):
            out: Tensor = self.network(x, t)
        return out

    @torch.no_grad()
    def sample(self) -> Tensor:
        size = self.setting.size
        shape = (self.setting.draws, 3, size, size)
        with self.tuning.context(self.device):
            out: Tensor = self.spaced.ddim_sample_loop(self.network, shape)
        return out

    @torch.no_grad()
    def evaluate(self, calls: int | None) -> float:
        """The bound of one batch on `setting.terms` times, by respacing; it has no fewer calls."""
        assert calls is None
        x = scaled(self.data[0])
        with self.tuning.context(self.device):
            self.bounded.calc_bpd_loop(self.network, x, clip_denoised=True)
        return float(len(x) * self.setting.terms)


def contestants(
    setting: Setting, device: str, compiled: bool, path: Path | None
) -> list[Contestant]:
    """Every tuning.

    Raises:
        Absent: no path was given, or it does not hold the project.
    """
    if path is None:
        raise Absent("improved-diffusion takes part with --improved-diffusion PATH")
    sys.path.insert(0, str(path))

    def make(here: Setting, tuning: Tuning) -> Contestant:
        try:
            loop = Loop(here, tuning, device, images(here, device))
        except ImportError as error:
            raise Absent(f"{path} does not hold improved-diffusion: {error}") from error
        return Contestant(
            NAME, tuning, here, loop.network, loop.through, loop.update, loop.sample,
            loop.evaluate,
        )  # fmt: skip

    return each(NAME, setting, tunings(device, compiled), make)
