r"""Betas of the schedules that other code bases name, computed in float64.

Libraries build them in float32, where 1 − ᾱ of the first step is off by 1.7e-4 (linear) to 5.3e-4
(cosine) of itself; a bound reads off exactly that. The formulas are theirs, digit for digit:

    linear               linspace(β_1, β_T)
    scaled_linear        linspace(√β_1, √β_T)²
    squaredcos_cap_v2    min(1 − f((i+1)/T)/f(i/T), .999),  f(t) = cos²((t + .008)/1.008 · π/2)
    sigmoid              σ(linspace(−6, 6)) (β_T − β_1) + β_1
    laplace              the same with f = √σ(λ), λ = −½ sgn(½ − t) log(1 − |1 − 2t| + 1e-6)

References:
    Ho, Jain, Abbeel 2020; Nichol, Dhariwal 2021, eq. 17; Lin, Liu, Li, Yang 2024, algorithm 1
    (`zero_terminal`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

CAP = 0.999
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


def betas(name: str, steps: int, start: float, end: float) -> Tensor:
    """(T,) float64.

    Arguments:
        name: one of `SCHEDULES`. steps: T. start, end: β_1 and β_T, where the name takes them.
    """
    if name == "squaredcos_cap_v2":
        return _ratios(_squared_cosine, steps)
    if name == "laplace":
        return _ratios(_laplace, steps)
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if name == "sigmoid":
        rise = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
        return rise * (end - start) + start
    assert name == "linear"
    return torch.linspace(start, end, steps, dtype=torch.float64)


def _ratios(kept: Callable[[float], float], steps: int) -> Tensor:
    grid = [kept(i / steps) for i in range(steps + 1)]
    pairs = zip(grid, grid[1:], strict=False)
    return torch.tensor([min(1 - b / a, CAP) for a, b in pairs], dtype=torch.float64)


def _squared_cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    half = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6)
    return math.sqrt(math.exp(half) / (1 + math.exp(half)))


def zero_terminal(betas: Tensor) -> Tensor:
    """Betas whose √ᾱ is shifted and stretched so that ᾱ_T = 0 and ᾱ_1 stays; the last is 1."""
    roots = torch.cumprod(1 - betas, 0).sqrt()
    moved = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    kept = moved**2
    return 1 - torch.cat((kept[:1], kept[1:] / kept[:-1]))
