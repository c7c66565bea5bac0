"""Doctor: what this machine has, and whether the installation computes what it should."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nelbo import distributed
from nelbo.bound import bound
from nelbo.checkpoint import load, save
from nelbo.console import table
from nelbo.data.mixture import GaussianMixture
from nelbo.decoders import Density
from nelbo.errors import NumericalFailure
from nelbo.parameterizations import X0
from nelbo.processes.gaussian import Gaussian
from nelbo.recipes.models import ExactDenoiser
from nelbo.reverse import Reverse
from nelbo.rundir import environment
from nelbo.schedules import LogSNRLinear

VARIABLES = (
    "NELBO_OUT",
    "NO_COLOR",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "RANK",
    "WORLD_SIZE",
    "TMPDIR",
)
ROUNDS = 100
"""Sums of a few numbers over all ranks, to time one."""
EXTRAS = ("diffusers", "pyarrow", "constriction", "tensorboard", "wandb")


def run(as_json: bool) -> int:
    """`nelbo doctor`: print the findings; 0 if all checks passed, else 4."""
    found = findings()
    if not distributed.is_main():
        pass
    elif as_json:
        print(json.dumps(found, indent=1))
    else:
        print(table([[k, str(v)] for k, v in _flat(found)], ["item", "value"]))
    return 0 if all(c["passed"] for c in found["checks"].values()) else NumericalFailure.exit_code


def findings() -> dict[str, Any]:
    """Versions, devices, variables, and the outcome of each check."""
    here = shutil.disk_usage(Path.cwd())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "schema": 1,
        "environment": environment(device),
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "disk_free_gib": round(here.free / 2**30, 1),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "extras": {name: importlib.util.find_spec(name) is not None for name in EXTRAS},
        "checks": {
            "bound": _check_bound(device),
            "checkpoint": _check_checkpoint(),
            "ranks": _check_ranks(device),
        },
    }


def _check_ranks(device: str) -> dict[str, Any]:
    """How many, where each is, and whether they add up, in how much time."""
    world, mine = distributed.world_size(), f"{socket.gethostname()} {device}"
    own = torch.frombuffer(bytearray(mine.encode()), dtype=torch.uint8)
    places = [bytes(place.tolist()).decode() for place in distributed.gather(own)]
    start = time.monotonic()
    for _ in range(ROUNDS):
        counted = distributed.total(torch.ones(1 << 10, device=device))
    seconds = (time.monotonic() - start) / ROUNDS
    return {
        "world_size": world,
        "backend": distributed.backend(),
        "places": ", ".join(places),
        "microseconds_per_sum": round(1e6 * seconds, 1) if world > 1 else None,
        "passed": bool((counted == world).all()),
    }


def _check_bound(device: str) -> dict[str, Any]:
    """The bound of an exact model of N(.5, .49) must lie at its theory within 5 errors.

    On the log-SNR grid (4, 2, 0, −2, −6) with variance β̃ the expected bound is 3.186402 nats.
    """
    schedule = LogSNRLinear(4.0, -6.0)
    times = torch.tensor([0.0, 0.2, 0.4, 0.6, 1.0], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    mixture = GaussianMixture(one, 0.5 * one[None], 0.49 * one[None, None])
    model = Reverse(Gaussian(schedule), ExactDenoiser(mixture, schedule), X0(), Density())
    generator = torch.Generator().manual_seed(0)
    x_0 = (0.5 + 0.7 * torch.randn(20_000, 1, generator=generator)).to(device)
    total = bound(model.to(device), x_0, times).total
    mean, error = float(total.mean()), float(total.std() / len(total) ** 0.5)
    passed = abs(mean - 3.186402) < 5 * error
    return {"expected": 3.186402, "mean": mean, "se": error, "passed": passed}


def _check_checkpoint() -> dict[str, Any]:
    """A checkpoint written to the temporary directory reads back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step-00000000"
        tensor = torch.arange(6.0)
        save(path, {"state": {"tensor": tensor}}, {"step": 0})
        back = load(path).tensors["state"]["tensor"]
    return {"passed": bool(torch.equal(back, tensor))}


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, item in value.items():
        label = f"{prefix}{name}"
        rows += _flat(item, f"{label}.") if isinstance(item, dict) else [(label, item)]
    return rows
