"""nelbo: its `Trainer` with its own objective, seeds, checks, optimiser and averaged weights.

As shipped is what `nelbo train` does without options; on a GPU `bf16` is its option --bf16, and
`tuned` is --bf16 --compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nelbo.averages import Warming
from nelbo.decoders import Discretized
from nelbo.deferred import Deferred, recorded
from nelbo.evaluation import evaluate
from nelbo.losses import ModelLoss
from nelbo.networks.layers import Timed
from nelbo.networks.unet import UNet
from nelbo.objectives import Simple
from nelbo.parameterizations import Epsilon
from nelbo.processes.gaussian import Gaussian
from nelbo.randomness import BLOCK
from nelbo.rates import Rate
from nelbo.reverse import Reverse
from nelbo.samplers import DDIM, sample
from nelbo.schedules import Linear
from nelbo.speed import prepared
from nelbo.stepping import Immediate, Player
from nelbo.trainer import Record, Trainer
from peers.contest import (
    RATE,
    STEPS,
    Contestant,
    Setting,
    Tuning,
    configuration,
    each,
    images,
    scaled,
    tunings,
)

NAME = "nelbo"


class Loop:
    """A `Trainer` on images that are on the device.

    Arguments:
        data: (batches, B, 3, H, W) uint8.
    """

    def __init__(self, setting: Setting, tuning: Tuning, device: str, data: Tensor) -> None:
        torch.manual_seed(0)
        self.setting, self.tuning, self.device, self.data = setting, tuning, device, data
        self.network = UNet(**configuration(setting))
        schedule = Linear(STEPS)
        self.times = schedule.grid()
        network = Timed(self.network, STEPS, -1)
        self.model = Reverse(Gaussian(schedule), network, Epsilon(), Discretized(256)).to(device)
        # as `nelbo train` has it: a compiled update is one CUDA graph
        way: Any = Deferred if device == "cuda" else Immediate
        if device == "cuda" and tuning.compiled and setting.batch <= BLOCK:
            way = recorded
        graphs = way is not recorded
        prepared(self.model.network, device, compiled=tuning.compiled, graphs=graphs)
        objective = Simple(self.times)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=True)
        model = self.model
        player = Player("model", model, optimizer, ModelLoss(objective, model))
        self.trainer = Trainer(
            [player],
            lambda step: scaled(data[step % len(data)]),
            Rate(RATE, 10**9, 0, "constant"),
            steps=10**9,
            seed=0,
            ema=Warming(0.9999),
            clip=3.0 * setting.size**2,
            autocast=(lambda: tuning.context(device)) if tuning.bf16 else None,
            stepping=way,
        )
        self.last: Record | None = None

    def update(self) -> float:
        """One update; the loss of the one before, for which nobody waits."""
        before, self.last = self.last, self.trainer.update()
        return (before or self.last).losses["model"]

    def through(self) -> Tensor:
        x = scaled(self.data[0])
        t = torch.full((len(x),), 500.0, device=self.device)
        with self.tuning.context(self.device):
            out: Tensor = self.network(x, t)
        return out

    def sample(self) -> Tensor:
        self.model.eval()
        places = torch.linspace(0, STEPS - 1, self.setting.calls).round().long()
        times = self.times[places]
        shape = (self.setting.draws, 3, self.setting.size, self.setting.size)
        with self.tuning.context(self.device):
            for _, found in sample(self.model, DDIM(), times, shape, self.device):
                x = found
        self.model.train()
        return x

    def evaluate(self, calls: int | None) -> float:
        """The bound of one batch on `setting.terms` times: every term, or some calls per image.

        Returns:
            network calls, those of the pilot included.
        """
        places = torch.linspace(0, STEPS - 1, self.setting.terms).round().long()
        times = self.times[places]
        rows = self.data[0].cpu()
        pilot = self.data[1].cpu()[:8] if len(self.data) > 1 else rows[:8]
        with self.tuning.context(self.device):
            found = evaluate(
                self.model, rows, times, encode=scaled, calls=calls, pilot=pilot,
                replicates=1, batch=max(len(rows), 64), device=self.device,
            )  # fmt: skip
        return found.calls * len(rows) + found.pilot_calls


def contestants(setting: Setting, device: str, compiled: bool) -> list[Contestant]:
    """Every tuning; it keeps its images channels-last by itself."""

    def make(here: Setting, tuning: Tuning) -> Contestant:
        loop = Loop(here, tuning, device, images(here, device))
        return Contestant(
            NAME, tuning, here, loop.network, loop.through, loop.update, loop.sample,
            loop.evaluate,
        )  # fmt: skip

    own = [t for t in tunings(device, compiled) if t.name != "channels-last"]
    return each(NAME, setting, own, make)
