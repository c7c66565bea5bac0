"""denoising-diffusion-pytorch: its Unet, its GaussianDiffusion, its update and its average.

The project imports torchvision for three names that are used to read folders and write pictures
(`transforms`, `utils`, and `datasets` in some versions), none of which is used here. torchvision
replaces a CPU build of torch, so a stand-in without content takes its place in `sys.modules` where
it is not installed; every attribute of it is a stand-in too. The project's evaluation of FID,
which needs more, is not imported.

Its Unet is another network than the others': two blocks on each side of a level, linear attention
where the others have none, a first convolution of 7x7, 28.5 M parameters where they have 35.7 M.
The update is that of its Trainer: Adam, gradient norm 1, `EMA.update` (every ten steps).
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from peers.contest import RATE, STEPS, Absent, Contestant, Setting, Tuning, each, images, tunings

NAME = "denoising-diffusion-pytorch"


def _imported() -> Any:
    for name in ("torchvision",):
        if importlib.util.find_spec(name) is None:
            stand_in = types.ModuleType(name)
            stand_in.__path__ = []  # type: ignore[attr-defined]
            for part in ("transforms", "utils", "datasets"):
                module = MagicMock(name=f"torchvision.{part}")
                setattr(stand_in, part, module)
                sys.modules[f"{name}.{part}"] = module
            stand_in.__spec__ = importlib.util.spec_from_loader(name, None)
            sys.modules[name] = stand_in
    try:
        from denoising_diffusion_pytorch import denoising_diffusion_pytorch as project
    except ImportError as error:
        raise Absent(f"denoising-diffusion-pytorch cannot be imported: {error}") from error
    return project


class Loop:
    """One update of its Trainer at a time, on images that are on the device."""

    def __init__(
        self, project: Any, setting: Setting, tuning: Tuning, device: str, data: Tensor
    ) -> None:
        torch.manual_seed(0)
        self.setting, self.tuning, self.device, self.data = setting, tuning, device, data
        self.network: nn.Module = project.Unet(
            dim=setting.channels,
            dim_mults=setting.multipliers,
            full_attn=setting.attends,
            flash_attn=tuning.name != "as shipped" and device != "cpu",
        ).to(device)
        self.diffusion = project.GaussianDiffusion(
            self.network,
            image_size=setting.size,
            timesteps=STEPS,
            sampling_timesteps=setting.calls,
            objective="pred_noise",
            beta_schedule="linear",
        ).to(device)
        parameters = self.diffusion.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.99))
        self.average = project.EMA(self.diffusion, beta=0.995, update_every=10)
        self.average.to(device)
        tuning.prepare(self.network)
        self.step = 0

    def update(self) -> float:
        # the project's data is in [0, 1], and it carries it to [-1, 1] itself
        x = self.tuning.images(self.data[self.step % len(self.data)].float() / 255)
        with self.tuning.context(self.device):
            loss = self.diffusion(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        self.step += 1
        return float(loss.detach())

    def through(self) -> Tensor:
        x = self.tuning.images(self.data[0].float() / 127.5 - 1)
        t = torch.full((len(x),), 500, device=self.device)
        with self.tuning.context(self.device):
            out: Tensor = self.network(x, t)
        return out

    @torch.no_grad()
    def sample(self) -> Tensor:
        size = self.setting.size
        with self.tuning.context(self.device):
            out: Tensor = self.diffusion.ddim_sample((self.setting.draws, 3, size, size))
        return out


def contestants(setting: Setting, device: str, compiled: bool) -> list[Contestant]:
    """Every tuning.

    Raises:
        Absent: the project, or something that it needs, is not installed.
    """
    project = _imported()
    project.tqdm = lambda iterable, **_: iterable

    def make(here: Setting, tuning: Tuning) -> Contestant:
        loop = Loop(project, here, tuning, device, images(here, device))
        return Contestant(NAME, tuning, here, loop.network, loop.through, loop.update, loop.sample)

    return each(NAME, setting, tunings(device, compiled), make)
