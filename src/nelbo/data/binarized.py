"""Grey images as bits, by a threshold or by a coin per pixel.

    threshold    bit = 1 where the level is above half of the highest
    stochastic   bit ~ Bernoulli(level/highest), drawn once with a fixed seed

Bounds under the two rules are not comparable with each other, nor either with a rule that draws
the coins anew at every update. The record states the rule and the seed.

References:
    Salakhutdinov, Murray 2008, On the quantitative analysis of deep belief networks (stochastic).
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Literal

import torch
from torch import Tensor

from nelbo.data.base import Dataset
from nelbo.data.part import CHUNK
from nelbo.errors import InputRefused
from nelbo.randomness import generator

Rule = Literal["threshold", "stochastic"]
PARTS = ("train", "validation", "test")


def binarized(dataset: Dataset, rule: Rule, seed: int = 0) -> Dataset:
    """The same examples with two levels, which the model sees as the bits 0 and 1.

    Arguments:
        dataset: with levels.
        rule: see the module.
        seed: of the coins; without meaning for a threshold.

    Raises:
        InputRefused: data without levels, or of which only one bit is left.
    """
    if dataset.levels is None:
        raise InputRefused(f"{dataset.name}: real vectors have no levels to be binarised")
    top = dataset.levels - 1
    parts = {part: _bits(getattr(dataset, part)[:], top, rule, seed, part) for part in PARTS}
    if len(parts["train"].unique()) < 2:
        raise InputRefused(
            f"{dataset.record.get('path') or dataset.name}: binarised by {rule}, all training "
            "bits are the same (constant data); there is nothing to learn from them"
        )
    record = {**dataset.record, "levels": 2, "split": dict(dataset.record["split"])}
    record["binarize"] = {"rule": _words(rule, top), "seed": seed if rule != "threshold" else None}
    # the notes speak of grey levels
    record["warnings"] = [note for note in record["warnings"] if "levels occur" not in note]
    for part, rows in parts.items():
        checksum = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
        record["split"][part] = {**record["split"][part], "sha256": checksum}
    return dataclasses.replace(
        dataset,
        name=f"{dataset.name}-{rule}",
        levels=2,
        binary=True,
        record=record,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
    )


def _words(rule: Rule, top: int) -> str:
    if rule == "threshold":
        return f"threshold: 1 where the level is above {top / 2:g}"
    return f"stochastic: one fixed draw of Bernoulli(level/{top}) per pixel"


def _bits(rows: Tensor, top: int, rule: Rule, seed: int, part: str) -> Tensor:
    """uint8 zeros and ones, as many as there are levels."""
    if rule == "threshold":
        return (rows.short() * 2 > top).to(torch.uint8)
    random = generator(seed, "binarize", part)
    out = torch.empty_like(rows)
    for some, levels in zip(out.split(CHUNK), rows.split(CHUNK), strict=True):
        # whole numbers, so that a level of 0 is never 1 and the highest always
        coin = torch.randint(top, levels.shape, generator=random, dtype=torch.int32)
        some.copy_(coin < levels.int())
    return out
