r"""Do 95 % intervals of few-call evaluations hold the truth in 95 % of cases?

A set of examples of unequal size, a denoiser that is wrong by design and linear, so that the bound
of every example is known in closed form:

    E ‖x_0 − a x_t‖² = Σ_j [(1 − a_j √k)² x_j² + a_j² l].

Each simulated evaluation draws a new set, measures it with a few calls, and asks whether the bound
of this very set (se_mc), and the expected bound of the population (se), lie within 1.96 errors.

    python benchmarks/coverage.py --runs 2000 --out coverage.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nelbo.controls import Wiener
from nelbo.decoders import Density
from nelbo.evaluation import evaluate
from nelbo.fewcalls import Plan
from nelbo.parameterizations import X0
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.schedules import LogSNRLinear

DIMS, LATENTS, LARGEST = 8, 50, 1.5
SCHEDULE = LogSNRLinear(6.0, -4.0)
VARIANCES = torch.linspace(0.05, 2, DIMS, dtype=torch.float64)
SETTINGS = [(1000, 0.3), (1000, 1), (1000, 1.5), (300, 2), (300, 5), (100, 16)]
"""Examples of a set, and network calls per example."""


class Shrinks(nn.Module):
    """x̂_0 = a(t) x_t with the weights of other variances than the data's."""

    def weights(self, t: Tensor) -> Tensor:
        keep, lose = SCHEDULE.keep(t)[..., None], SCHEDULE.lose(t)[..., None]
        wrong = VARIANCES.flip(0)
        return keep.sqrt() * wrong / (keep * wrong + lose)

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.weights(t).to(x_t.dtype) * x_t


def data(n: int, draws: torch.Generator) -> Tensor:
    """Normal vectors, each with a size of its own."""
    x = torch.randn(n, DIMS, generator=draws, dtype=torch.float64) * VARIANCES.sqrt()
    return x * (1 + LARGEST * torch.rand(n, 1, generator=draws, dtype=torch.float64))


def bounds(squares: Tensor) -> Tensor:
    """(n,) the bound in nats, which is linear in the squares x_0² (n, D)."""
    times = SCHEDULE.grid(LATENTS)
    keep, lose = SCHEDULE.keep(times)[:, None], SCHEDULE.lose(times)[:, None]
    snr, a = SCHEDULE.logsnr(times).exp(), Shrinks().weights(times)
    error = ((1 - a * keep.sqrt()) ** 2 * squares[:, None] + a**2 * lose).sum(2)
    pairs = 0.5 * ((snr[:-1] - snr[1:]) * error[:, 1:]).sum(1)
    first = float(lose[0])
    decoder = 0.5 * (DIMS * math.log(2 * math.pi * first) + error[:, 0] / first)
    last = float(keep[-1])
    prior = 0.5 * (last * (squares - 1) - math.log(1 - last)).sum(1)
    return prior + pairs + decoder


def population() -> float:
    """The expected bound: E size² = 1 + L + L²/3 for sizes uniform on [1, 1 + L]."""
    size = 1 + LARGEST + LARGEST**2 / 3
    return float(bounds(VARIANCES[None] * size))


def simulate(n: int, calls: float, runs: int) -> dict[str, Any]:
    """`runs` evaluations of sets of n examples."""
    draws = torch.Generator().manual_seed(1)
    train = data(2000, draws)
    model = Reverse(Gaussian(SCHEDULE), Shrinks(), X0(), Density())
    wiener, truth = Wiener.of(Gaussian(SCHEDULE), train), population()
    rows = []
    for seed in range(runs):
        x = data(n, draws)
        plan = Plan(controls=(wiener,), features=(features(x), features(train[:400])))
        grid = SCHEDULE.grid(LATENTS)
        result = evaluate(model, x, grid, calls=calls, pilot=train[:400], plan=plan, seed=seed)
        total, here = result.estimates()["total"], float(bounds(x**2).mean())
        within = result.intervals()
        inside = [
            low < t < high for (low, high), t in zip(within.values(), (here, truth), strict=True)
        ]
        rows.append([*inside, total.mean - here, total.se_mc, total.se])
    return {"n": n, "calls": calls, "runs": runs, **summary(torch.tensor(rows).double())}


def features(x: Tensor) -> Tensor:
    """Two numbers that the bound goes with."""
    return torch.stack([x.square().sum(1).sqrt(), x[:, -1].abs()], 1)


def summary(rows: Tensor) -> dict[str, Any]:
    """Coverage, the mean error in its own errors, and what was claimed over what came out."""
    error, se_mc, se = rows[:, 2], rows[:, 3], rows[:, 4]
    return {
        "set": float(rows[:, 0].mean()),
        "population": float(rows[:, 1].mean()),
        "bias": float(error.mean() / error.std() * len(error) ** 0.5),
        "claimed": float((se_mc.square().mean() / error.square().mean()).sqrt()),
        "ratio": float((se_mc / se).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of settings, from 0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("     n  calls  this set  population   bias z  claimed/rms  se_mc/se  ms/run")
    chosen = range(len(SETTINGS)) if options.only is None else options.only
    for n, calls in (SETTINGS[k] for k in chosen):
        start = time.process_time()
        row = simulate(n, calls, options.runs)
        spent = 1000 * (time.process_time() - start) / options.runs
        rows.append(row)
        print(
            f"{n:6d}  {calls:5g}  {row['set']:8.4f}  {row['population']:10.4f}  "
            f"{row['bias']:7.2f}  {row['claimed']:11.3f}  {row['ratio']:8.2f}  {spent:6.0f}",
            flush=True,
        )
    document = {"schema": 1, "machine": platform.platform(), "torch": torch.__version__}
    if options.out is not None:
        options.out.write_text(json.dumps({**document, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
