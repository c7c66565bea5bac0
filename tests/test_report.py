"""The report says what the files of a run say, and nothing that they hold can act on its page."""

from __future__ import annotations

import json
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nelbo import figures, pictures, report
from nelbo.errors import InputRefused
from nelbo.runfiles import load

HASH = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"


def entry(mean: float, se: float, se_mc: float, n: int, dims: int) -> dict[str, Any]:
    bits = mean * dims
    return {"mean": mean, "se": se, "se_mc": se_mc, "n": n, "unit": "bits/dim",
            "mean_bits_per_example": bits}  # fmt: skip


def terms(total: float, n: int, dims: int) -> dict[str, Any]:
    return {
        "prior": entry(0.000412, 3.1e-6, 0.0, n, dims),
        "diffusion": entry(0.87 * total, 0.0113, 0.00047, n, dims),
        "reconstruction": entry(0.13 * total - 0.000412, 0.0031, 0.00021, n, dims),
        "total": entry(total, 0.01184, 0.00052, n, dims),
    }


def evaluation(kind: str, shape: tuple[int, ...], levels: int | None) -> dict[str, Any]:
    dims, n = math.prod(shape), 297
    document: dict[str, Any] = {
        "schema": 1,
        "data": {"name": kind, "split": "test", "n": n, "dims": dims, "levels": levels},
        "model": {
            "parameterization": "Epsilon",
            "variance": "Posterior",
            "decoder": f"Discretized({levels})" if levels else "Density",
            "grid": "1000 times, log-SNR linear from 8 to -6",
            "weights": "ema",
            "clip": False,
            "step": 3000,
        },
        "calls_per_example": 1000.0,
        "terms": terms(1.76412 if levels else 0.31, n, dims),
        "baselines": {},
    }
    if levels:
        uniform = {"mean": math.log2(levels), "unit": "bits/dim"}
        document["baselines"] = {"uniform": uniform, "histogram": entry(2.419, 0.012, 0, n, dims)}
    else:
        exact = terms(0.24, n, dims)
        document["truth"] = {"entropy": {"mean": 0.20117, "unit": "bits/dim"}, "exact_denoiser": exact}
    return document


def metrics(rng: np.random.Generator, final: float) -> str:
    lines = []
    for step in range(10, 3001, 10):
        loss = final + 3.2 * math.exp(-step / 80) + 12 / step**0.75 + 0.09 * rng.normal()
        lines.append({"step": step, "loss": loss, "grad_norm": 1.0, "lr": 0.001,
                      "examples_per_second": 900.0, "seconds": step / 30})  # fmt: skip
        if step % 500 == 0 or step == 50:
            mean = final + 3.2 * math.exp(-step / 80) + 12 / step**0.75 + 0.05
            seen = {"mean": mean, "se": 0.02, "se_mc": 0.002, "n": 150, "unit": "bits/dim"}
            lines.append({"step": step, "seconds": step / 30, "validation": seen})
    return "".join(json.dumps(line) + "\n" for line in lines)


def digits(rng: np.random.Generator, n: int, shape: tuple[int, ...], levels: int) -> np.ndarray:
    """Discs of random place and brightness, in place of handwriting."""
    axis = np.linspace(-1, 1, shape[1])
    centre, radius = rng.uniform(-0.4, 0.4, (n, shape[0], 2)), rng.uniform(0.2, 0.5, (n, shape[0]))
    rows = (axis[:, None] - centre[..., None, None, 0]) ** 2
    columns = (axis[None, :] - centre[..., None, None, 1]) ** 2
    bright = 1 / (1 + np.exp(14 * (np.sqrt(rows + columns) - radius[..., None, None])))
    return np.rint(bright * (levels - 1)).astype(np.uint8)


def roll(rng: np.random.Generator, n: int) -> np.ndarray:
    angle = 1.5 * np.pi * (1 + 2 * rng.uniform(size=n))
    points = np.stack([angle * np.cos(angle), angle * np.sin(angle)], 1) / 10
    return points + 0.05 * rng.normal(size=(n, 2))


def walk(rng: np.random.Generator, clean: np.ndarray, logsnr: np.ndarray) -> np.ndarray:
    keep = (1 / (1 + np.exp(-logsnr))).reshape(-1, *[1] * clean.ndim)
    noise = rng.normal(size=clean.shape)
    return (np.sqrt(keep) * clean + np.sqrt(1 - keep) * noise).astype(np.float32)


def make_run(
    path: Path, kind: str = "digits", shape: tuple[int, ...] = (1, 8, 8), levels: int | None = 17
) -> Path:
    """A finished run directory, of images for `levels`, of a two-dimensional toy for None."""
    rng = np.random.default_rng(7)
    document = evaluation(kind, shape, levels)
    for folder in ("evaluation", "samples"):
        (path / folder).mkdir(parents=True)
    record = {
        "name": kind,
        "path": None,
        "sha256": HASH,
        "examples": 1797,
        "shape": list(shape),
        "levels": levels,
        "split": {"rule": "by content", "train": {"n": 1350}, "validation": {"n": 150},
                  "test": {"n": 297, "sha256": HASH[::-1]}},
        "licence": "CC BY 4.0",
        "warnings": [],
    }  # fmt: skip
    options = {"steps": 3000, "seed": 0, "batch_size": 128, "rate": 0.002, "ema": 0.999,
               "compile": False, "objective": "vlb", "hidden": [48, 48]}  # fmt: skip
    model = {"parameters": 212353, "description": "UNet, 48 channels, 4 blocks"}
    files = {
        "recipe.json": {"schema": 1, "recipe": kind, "options": options, "data": record, "model": model},
        "status.json": {"schema": 1, "state": "finished", "step": 3000, "steps": 3000,
                        "exit_code": 0, "message": "", "seconds": 102.4},
        "environment.json": {"nelbo": "0.1.0", "python": "3.12.3", "torch": "2.13.0",
                             "platform": "Linux-6.1-x86_64", "threads": 2, "device": "cpu",
                             "commit": "4f2c9e1"},
        "evaluation/test.json": document,
    }  # fmt: skip
    for name, value in files.items():
        (path / name).write_text(json.dumps(value))
    (path / "metrics.jsonl").write_text(metrics(rng, document["terms"]["total"]["mean"]))
    make_arrays(path, rng, shape, levels, document)
    return path


def make_arrays(
    path: Path, rng: np.random.Generator, shape: tuple[int, ...], levels: int | None, document: Any
) -> None:
    logsnr = np.linspace(8, -6, 1000)
    scale = document["terms"]["diffusion"]["mean"] * document["data"]["dims"] * math.log(2)
    mean = scale * np.exp(-((logsnr - 1.5) ** 2) / 9) / math.sqrt(9 * math.pi)
    se = 0.03 * mean + 0.004 * scale / 14
    wobble = mean + 0.3 * se * rng.normal(size=1000)
    np.savez(path / "evaluation/test.npz", total=rng.normal(size=297), integrand_logsnr=logsnr,
             integrand_mean=wobble, integrand_se=se)  # fmt: skip
    ladder = np.linspace(8, -6, 12)
    if levels:
        real, fake = digits(rng, 64, shape, levels), digits(rng, 64, shape, levels)
        clean = 2 * real[0] / (levels - 1) - 1, 2 * fake[0] / (levels - 1) - 1
    else:
        real, fake = roll(rng, 2000), roll(rng, 2000) + 0.03 * rng.normal(size=(2000, 2))
        clean = real[:300], fake[:300]
    np.savez(path / "samples/samples.npz", samples=fake, real=real)
    np.savez(path / "samples/strip.npz", forward=walk(rng, clean[0], ladder),
             reverse=walk(rng, clean[1], ladder[::-1]), logsnr=ladder)  # fmt: skip
