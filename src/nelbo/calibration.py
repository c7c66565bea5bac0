r"""Choosing a classifier, and how far to believe it, on pairs that certify nothing.

A classifier that is too sure of itself loses more on the pairs that it gets wrong than it wins on
the others. On the calibration pairs its logit s becomes t s + b, clipped to [-B, B]; candidate,
t, b and B are those that maximise the bound that n pairs like these would give,

    mean Z - sqrt(2 var Z log(1/alpha)/n) - B log(1/alpha)/n.

Few calibration pairs tell few settings apart, so the grid grows with their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from nelbo.errors import InputRefused
from nelbo.fitting import score
from nelbo.jsd import LOG2, checked, promise
from nelbo.judges import NONE, Judge, fingerprint
from nelbo.randomness import generator, key

FEW, MANY = 100, 400
TEMPERATURES = {
    0: (0.5, 1.0),
    FEW: (0.35, 0.6, 0.8, 1.0),
    MANY: (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.5),
}
OFFSETS = {0: (0.0,), FEW: (0.0,), MANY: (-0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4)}
CLIPS = {
    0: (0.5, 1.0, 2.0, 4.0),
    FEW: (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    MANY: (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0),
}
ALIKE = 1e-3
PIECE = 7


@dataclass(frozen=True)
class Setting:
    """s -> t s + b, clipped to [-clip, clip], the bound in nats that it promises, and the mean
    payoff on CAL, nats."""

    temperature: float
    offset: float
    clip: float
    predicted: float
    gain: float

    def apply(self, logits: Tensor) -> Tensor:
        """t s + b."""
        return self.temperature * logits + self.offset


@dataclass(frozen=True)
class Chosen:
    """A classifier, ready for the certificate set.

    Arguments:
        network: (B, *shape) -> (B,). setting: what is done to its logits. name, hash: its own.
        predicted: the promised bound of every candidate, in nats. threshold: on t s + b, for the
            two-cell bound.
    """

    network: nn.Module
    setting: Setting
    name: str
    hash: str
    predicted: dict[str, float]
    threshold: float

    def logits(self, rows: Tensor) -> Tensor:
        """t s + b of rows, (n,) float64."""
        return self.setting.apply(score(self.network, rows))


def choose(
    judges: Sequence[Judge],
    fit: tuple[Tensor, Tensor],
    calibration: tuple[Tensor, Tensor],
    *,
    n: int,
    alpha: float,
    seed: int,
    clips: Sequence[float] | None = None,
) -> Chosen:
    """Fit every judge on FIT and keep the one that promises most on CAL.

    Arguments:
        fit, calibration: (real, fake) rows as the classifiers see them.
        n: pairs of the certificate. clips: to try; None for the usual ones.

    Raises:
        InputRefused: logits that are not finite, or that depend on the batch.
    """
    found: list[Chosen] = []
    for place, judge in enumerate(judges):
        network = judge.fit(*fit, key(seed, "judge", place) % 2**31)
        real, fake = (_logits(network, rows, judge.name) for rows in calibration)
        refuse_batch_dependence(network, torch.cat(calibration), judge.name, seed)
        setting = settle(real, fake, n, alpha, clips)
        mark = fingerprint(network, torch.cat([real, fake]))
        cell = _threshold(setting.apply(real), setting.apply(fake))
        found.append(Chosen(network, setting, judge.name, mark, {}, cell))
    names = [
        f"{one.name} ({i})" if _twice(one, found) else one.name for i, one in enumerate(found)
    ]
    best = max(found, key=lambda one: one.setting.predicted)
    predicted = {name: one.setting.predicted for name, one in zip(names, found, strict=True)}
    if best.setting.gain <= 0:
        return _nothing(best.setting, predicted)
    return Chosen(best.network, best.setting, best.name, best.hash, predicted, best.threshold)


class _Silent(nn.Module):
    """Logit 0 of every row: D = 1/2."""

    def forward(self, rows: Tensor) -> Tensor:
        return torch.zeros(len(rows), dtype=torch.float64)


def _nothing(setting: Setting, predicted: dict[str, float]) -> Chosen:
    """Where every classifier did worse than none: it certifies 0 and loses nothing."""
    network = _Silent()
    mark = fingerprint(network, torch.zeros(1))
    return Chosen(network, Setting(1.0, 0.0, setting.clip, 0.0, 0.0), NONE, mark, predicted, 0.0)


def settle(
    real: Tensor, fake: Tensor, n: int, alpha: float, clips: Sequence[float] | None = None
) -> Setting:
    """The temperature, offset and clip that promise the largest bound of n pairs.

    Arguments:
        real, fake: (m,) logits of the calibration part.
    """
    s, t = checked(real, fake)
    grid = _grid(len(s), clips)
    scale, shift, clip = torch.tensor(grid, dtype=torch.float64).T[:, :, None]
    a, b = (torch.maximum(torch.minimum(scale * x + shift, clip), -clip) for x in (s, t))
    z = LOG2 - (softplus(-a) + softplus(b)) / 2
    promised = promise(z, clip[:, 0], n, alpha)
    best = int(promised.argmax())
    gain = float(z.mean(1)[best])
    return Setting(*grid[best], predicted=float(promised[best]), gain=gain)


def _grid(pairs: int, clips: Sequence[float] | None) -> list[tuple[float, float, float]]:
    size = max(least for least in CLIPS if pairs >= least)
    return list(
        itertools.product(TEMPERATURES[size], OFFSETS[size], clips if clips else CLIPS[size])
    )


def refuse_batch_dependence(network: nn.Module, rows: Tensor, name: str, seed: int) -> None:
    """Refuse logits that change when a batch is permuted or divided otherwise (T16)."""
    order = torch.randperm(len(rows), generator=generator(seed, "permutation"))
    some = rows[order[: 20 * PIECE]]
    whole = _logits(network, some, name)
    turned = _logits(network, some.flip(0), name).flip(0)
    pieces = torch.cat([_logits(network, piece, name) for piece in some.split(PIECE)])
    apart = max(float(((x - whole).abs() / (1 + whole.abs())).max()) for x in (turned, pieces))
    if apart > ALIKE:
        raise InputRefused(
            f"classifier {name}: its logits depend on the batch (by {apart:.2g} when the same "
            "rows are permuted or divided otherwise), so pairs are not independent. Put it into "
            "evaluation mode, without batch statistics and dropout"
        )


def _logits(network: nn.Module, rows: Tensor, name: str) -> Tensor:
    logits = score(network, rows)
    if logits.shape != (len(rows),):
        raise InputRefused(
            f"classifier {name}: {logits.numel()} logits for {len(rows)} rows; give one per row"
        )
    bad = int((~torch.isfinite(logits)).sum())
    if bad:
        raise InputRefused(
            f"classifier {name}: {bad} of {len(rows)} logits are NaN or infinite; mend it, or "
            "leave it out"
        )
    return logits


def _twice(one: Chosen, found: Sequence[Chosen]) -> bool:
    return sum(other.name == one.name for other in found) > 1


def _threshold(real: Tensor, fake: Tensor) -> float:
    """Where P(s > threshold) differs most between the calibration parts."""
    places = torch.cat([real, fake]).sort().values
    above = [(x[None, :] > places[:, None]).double().mean(1) for x in (real, fake)]
    return float(places[int((above[0] - above[1]).argmax())])
