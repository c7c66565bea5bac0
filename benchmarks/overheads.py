"""What an update costs that is not the network: one command, on a CPU or a GPU.

    python benchmarks/overheads.py --out overheads.json

The small network (1.11 M parameters, batch 16) on a CPU and the 35.7 M one (batch 256, bf16) on a
GPU, or as --small, --batch say. Two kinds of figures, in turns within one process:

- whole updates of nelbo's `Trainer`, made in each of the ways that the machine has, beside the
  network alone: forward, a mean square as loss, backward. `other share` is 1 - network/update.
- the pieces by themselves, on a clock that waits for the device after each: drawing and sending
  places, the objective without its network call, clipping, optimiser, average, seeds. Pieces that
  are asked of a GPU one by one cost more than in a row, so their sum is more than the difference.

Each figure is the median of the rounds, milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.contest import Setting, Tuning, images, scaled
from peers.diffusers_loop import configuration
from torch import Tensor, nn

from nelbo.averages import EMA, Warming
from nelbo.decoders import Discretized
from nelbo.deferred import Deferred, recorded
from nelbo.losses import ModelLoss
from nelbo.networks.layers import Timed
from nelbo.networks.unet import UNet
from nelbo.objectives import Simple, Vlb
from nelbo.parameterizations import Epsilon
from nelbo.processes.gaussian import Gaussian
from nelbo.randomness import rows_of
from nelbo.rates import Rate
from nelbo.reverse import Reverse
from nelbo.schedules import Linear
from nelbo.speed import prepared
from nelbo.stepping import Immediate, Player
from nelbo.trainer import Trainer

Call = Callable[[], object]
