"""What an option's number may be, told before anything is read or written.

A training that ends in an impossible evaluation would be hours lost, so every number is checked at
the start. Options of the same name have the same limits in every command.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from nelbo.errors import UsageError

COUNT = (1, 2**62)
NUMBER = (0, 2**62)
POSITIVE = (5e-324, 1e300)
FRACTION = (0.0, 1.0)

LIMITS: dict[str, tuple[float, float]] = {
    "steps": NUMBER,
    "batch": COUNT,
    "rate": POSITIVE,
    "warmup": NUMBER,
    "weight_decay": (0.0, 1e300),
    "beta2": FRACTION,
    "ema": FRACTION,
    "clip": POSITIVE,
    "accumulation": COUNT,
    "validate_every": NUMBER,
    "validate_calls": COUNT,
    "save_every": COUNT,
    "keep": COUNT,
    "calls": POSITIVE,
    "until": POSITIVE,
    "alpha": (1e-9, 0.5),
    "ladder": (-30.0, 30.0),
    "seeds": (2, 1000),
    "importance": COUNT,
    "tolerance": (1e-12, 0.1),
    "probes": COUNT,
    "draws": COUNT,
    "samples": COUNT,
    "threads": (1, 1024),
    "ahead": (0, 1024),
    "dist_timeout": (1e-3, 1e7),
    "latents": COUNT,
    "logsnr_max": (-1e3, 1e3),
    "logsnr_min": (-1e3, 1e3),
    "clip_x0": POSITIVE,
    "channels": COUNT,
    "multipliers": COUNT,
    "layers": COUNT,
    "attention": COUNT,
    "head_dim": COUNT,
    "waves": COUNT,
    "augment": FRACTION,
    "dropout": FRACTION,
    "positions": NUMBER,
    "validation": NUMBER,
    "examples": COUNT,
    "width": COUNT,
    "members": COUNT,
    "depth": COUNT,
    "length": COUNT,
    "period": (2, 2**62),
    "stationary": (1e-9, 1 - 1e-9),
    "size": COUNT,
    "hole": COUNT,
    "radius_min": POSITIVE,
    "radius_max": POSITIVE,
    "limit": COUNT,
    "n": COUNT,
    "eta": FRACTION,
    "fit": (2, 2**62),
    "levels": (2, 256),
    "edge": POSITIVE,
    "label": NUMBER,
    "at": POSITIVE,
    "r1": (0.0, 1e300),
    "r2": (0.0, 1e300),
    "relax": FRACTION,
    "latent": COUNT,
    "critic_moves": COUNT,
    "half_life": (0.0, 1e300),
    "betas": (0.0, 1 - 1e-9),
    "directions": NUMBER,
    "finest": POSITIVE,
    "critic_depth": COUNT,
    "modes": COUNT,
    "side": COUNT,
    "radius": POSITIVE,
    "std": POSITIVE,
    "spacing": POSITIVE,
}


def check(options: Any) -> None:
    """Refuse numbers that no run can use.

    Arguments:
        options: a dataclass of options; None and words stand for no number.
    Raises:
        UsageError: names the option and what it may be.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            check(value)
        for number in value if isinstance(value, tuple) else (value,):
            if field.name in LIMITS and isinstance(number, int | float):
                _check(field.name, number)
    if getattr(options, "multipliers", None) == ():
        raise UsageError("--multipliers: give at least one")
    focus = getattr(options, "focus", None)
    if focus is not None and not (math.isfinite(focus[0]) and 0 < focus[1] < math.inf):
        raise UsageError(f"--focus {focus[0]:g} {focus[1]:g}: the width must be above 0")


def _check(name: str, number: float) -> None:
    low, high = LIMITS[name]
    if not low <= number <= high:
        # a limit that stands for "no limit" or "above 0" is not worth a number
        floor = "above 0" if low == POSITIVE[0] else f"at least {low:g}"
        end = f" and at most {high:g}" if high < 1e300 and high < 2**62 else ""
        what = "not a number" if math.isnan(number) else f"{number:g}"
        raise UsageError(f"--{name.replace('_', '-')} {what}: it must be {floor}{end}")
