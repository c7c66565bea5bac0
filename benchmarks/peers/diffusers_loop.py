"""diffusers' UNet2DModel in its own unconditional training example, without its logging.

Per update: `DDPMScheduler.add_noise`, the mean squared error of the noise, AdamW, gradient norm 1,
and `EMAModel.step`, in the order of examples/unconditional_image_generation. Sampling is DDIM.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.contest import (
    RATE,
    STEPS,
    Absent,
    Contestant,
    Setting,
    Tuning,
    configuration,
    each,
    images,
    scaled,
    tunings,
)

try:
    import diffusers
    from diffusers.training_utils import EMAModel
except ImportError:
    diffusers = None


NAME = "diffusers"


class Loop:
    """The training loop of the example.

    Arguments:
        data: (batches, B, 3, H, W) uint8, on the device.
    """

    def __init__(self, setting: Setting, tuning: Tuning, device: str, data: Tensor) -> None:
        torch.manual_seed(0)
        self.setting, self.tuning, self.device, self.data = setting, tuning, device, data
        self.network: nn.Module = diffusers.UNet2DModel(**configuration(setting)).to(device)
        tuning.prepare(self.network)
        self.noising = diffusers.DDPMScheduler(num_train_timesteps=STEPS)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=RATE)
        self.average = EMAModel(self.network.parameters(), decay=0.9999, use_ema_warmup=True)
        self.average.to(device)
        self.step = 0

    def update(self) -> float:
        clean = self.tuning.images(scaled(self.data[self.step % len(self.data)]))
        noise = torch.randn_like(clean)
        t = torch.randint(0, STEPS, (len(clean),), device=self.device)
        noisy = self.noising.add_noise(clean, noise, t)
        with self.tuning.context(self.device):
            loss = F.mse_loss(self.network(noisy, t).sample.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.network.parameters())
        self.step += 1
        return float(loss.detach())

    def through(self) -> Tensor:
        x = self.tuning.images(scaled(self.data[0]))
        t = torch.full((len(x),), 500, device=self.device)
        with self.tuning.context(self.device):
            out: Tensor = self.network(x, t).sample
        return out

    @torch.no_grad()
    def sample(self) -> Tensor:
        size = self.setting.size
        x = torch.randn(self.setting.draws, 3, size, size, device=self.device)
        scheduler = diffusers.DDIMScheduler(num_train_timesteps=STEPS)
        scheduler.set_timesteps(self.setting.calls)
        for t in scheduler.timesteps:
            with self.tuning.context(self.device):
                noise = self.network(self.tuning.images(x), t).sample.float()
            x = scheduler.step(noise, t, x).prev_sample
        return x


def contestants(setting: Setting, device: str, compiled: bool) -> list[Contestant]:
    """Every tuning.

    Raises:
        Absent: diffusers is not installed.
    """
    if diffusers is None:
        raise Absent("diffusers is not installed")

    def make(here: Setting, tuning: Tuning) -> Contestant:
        loop = Loop(here, tuning, device, images(here, device))
        return Contestant(NAME, tuning, here, loop.network, loop.through, loop.update, loop.sample)

    return each(NAME, setting, tunings(device, compiled), make)
