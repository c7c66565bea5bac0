"""What an update costs that is not the network: one command, on a CPU or a GPU.

    python benchmarks/overheads.py --out overheads.json

The small network (1.11 M parameters, batch 16) on a CPU and the 35.7 M one (batch 256, bf16) on a
GPU, or as --small, --batch say. Two kinds of figures, in turns within one process:

- whole updates of nelbo's `Trainer`, made in each of the ways that the machine has, beside the
  network alone: forward, a mean square as loss, backward. `other share` is 1 - network/update.
- the pieces by themselves, on a clock that waits for the device after each: drawing and sending
  places, the objective without its network call, clipping, optimiser, average, seeds. Pieces that
  are asked of a GPU one by one cost more than in a row, so their sum is more than the difference.

Each figure is the median of the rounds, milliseconds; on a CPU of the processor.
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
from peers.contest import BIG, SMALL, Setting, Tuning, configuration, images, scaled
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
OBJECTIVES = {"simple": Simple, "vlb": Vlb}


class Bench:
    """A network with its objective on images that are on the device.

    Arguments:
        tuning: precision, and whether the network is compiled.
    """

    def __init__(
        self, setting: Setting, tuning: Tuning, device: str, objective: str, kernels: str
    ) -> None:
        torch.manual_seed(0)
        self.setting, self.tuning, self.device = setting, tuning, device
        self.data = images(setting, device)
        schedule = Linear(1000)
        network = Timed(UNet(**configuration(setting)), 1000, -1)
        self.model = Reverse(Gaussian(schedule), network, Epsilon(), Discretized(256)).to(device)
        self.objective = OBJECTIVES[objective](schedule.grid())
        self.said = prepared(
            self.model.network, device, kernels=kernels, compiled=tuning.compiled, graphs=False
        )
        self.loss = ModelLoss(self.objective, self.model)
        weights = self.model.parameters()
        self.optimizer = torch.optim.AdamW(weights, lr=2e-4, fused=True)
        self.average = EMA(self.model, Warming(0.9999))
        self.x_0 = scaled(self.data[0])
        self.times = torch.full((setting.batch,), 0.5, device=device)

    def trainer(self, way: Any) -> Trainer:
        """Updates of the same weights in one of the ways."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-4, fused=True)
        data = self.data
        return Trainer(
            [Player("model", self.model, optimizer, self.loss)],
            lambda move: scaled(data[move % len(data)]),
            Rate(2e-4, 10**9, 0, "constant"),
            steps=10**9,
            seed=0,
            ema=Warming(0.9999),
            clip=3.0 * self.setting.size**2,
            autocast=lambda: self.tuning.context(self.device),
            whole=self.setting.batch,
            stepping=way,
        )

    def network(self) -> None:
        """Forward, a mean square, backward."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.tuning.context(self.device):
            out: Tensor = self.model.network(self.x_0, self.times)
        out.float().square().mean().backward()

    def seeds(self) -> None:
        """The context in which an update draws."""
        rows = range(self.setting.batch)
        with rows_of(rows, self.setting.batch, 0, "train", "model", 1):
            pass

    def inputs(self) -> None:
        """Places, drawn and sent."""
        self.loss.inputs(self.x_0)

    def around(self) -> None:
        """Latents, prediction and loss with a network that is one product, and their gradient."""
        with self.tuning.context(self.device):
            loss = self._shell.given(*self._shell.inputs(self.x_0)).mean()
        loss.backward()

    def pieces(self) -> dict[str, Call]:
        """What an update does besides the network."""
        shell = Reverse(self.model.process, Scale(), Epsilon(), Discretized(256)).to(self.device)
        self._shell = ModelLoss(self.objective, shell)
        self.network()
        weights, steps = list(self.model.parameters()), iter(range(10**9))
        return {
            "seeds": self.seeds,
            "places": self.inputs,
            "objective": self.around,
            "clipping": lambda: nn.utils.clip_grad_norm_(weights, 1e9),
            "optimiser": self.optimizer.step,
            "average": lambda: self.average.update(self.model, next(steps)),
        }


class Scale(nn.Module):
    """The least that has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return self.factor * x_t


def milliseconds(call: Call, device: str, seconds: float) -> float:
    """Of one call, of as many as fit into some seconds; the device is waited for at the end."""
    count = 0
    # of a processor that is shared its own time is counted, which neighbours do not lengthen
    clock = time.perf_counter if device == "cuda" else time.process_time
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = clock()
    while clock() - start < seconds or count < 2:
        call()
        count += 1
        if count % 4 == 0:
            wait()
    wait()
    return (clock() - start) / count * 1e3


def measured(calls: dict[str, Call], device: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Median milliseconds of each, in turns; what cannot run is said."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    for name, call in calls.items():
        try:
            for _ in range(6):  # the first calls compile, choose and record
                call()
        except Exception as error:  # one way that fails must not hide the others
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"{name} fails: {failed[name]}", file=sys.stderr)
    for number in range(rounds):
        for name, call in calls.items():
            if name not in failed:
                found[name].append(milliseconds(call, device, seconds))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return {n: {"median": statistics.median(v), "rounds": v} for n, v in found.items() if v} | {
        n: {"failed": why} for n, why in failed.items()
    }


def text(rows: dict[str, Any], pieces: dict[str, Any]) -> str:
    """The table."""
    network = rows["network alone"]["median"]
    lines = ["| | ms | other share |", "|---|---|---|"]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | fails: {row['failed']} | |")
            continue
        share = "" if name == "network alone" else f"{1 - network / row['median']:.1%}"
        lines.append(f"| {name} | {row['median']:.2f} | {share} |")
    for name, row in pieces.items():
        value = row["median"] if "median" in row else float("nan")
        lines.append(f"| - {name} | {value:.3f} | {value / network:.2%} of the network |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the small network on a GPU as well")
    parser.add_argument("--objective", choices=tuple(OBJECTIVES), default="vlb")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--kernels", choices=("auto", "plain", "triton", "native"), default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    big = device == "cuda" and not options.small
    setting = (BIG if big else SMALL).with_batch(options.batch)
    tuning = Tuning("this", bf16=device == "cuda", compiled=options.compile)
    bench = Bench(setting, tuning, device, options.objective, options.kernels)
    ways: dict[str, Any] = {"at once": Immediate, "asked for ahead": Deferred}
    if device == "cuda":
        ways["one graph"] = recorded
    trainers = {name: bench.trainer(way) for name, way in ways.items()}
    calls: dict[str, Call] = {"network alone": bench.network}
    calls |= {f"update, {name}": one.update for name, one in trainers.items()}
    rows = measured(calls, device, options.rounds, options.seconds)
    pieces = measured(bench.pieces(), device, options.rounds, options.seconds / 4)
    print(f"{bench.said}; {setting.name}, batch {setting.batch}, {options.objective}, {device}")
    print(text(rows, pieces))
    if options.out is not None:
        about = {"setting": setting.name, "batch": setting.batch, "device": device,
                 "torch": torch.__version__, "threads": torch.get_num_threads(),
                 "compiled": options.compile, "objective": options.objective,
                 "kernels": bench.said}  # fmt: skip
        document = {**about, "milliseconds": rows, "pieces": pieces}
        options.out.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
