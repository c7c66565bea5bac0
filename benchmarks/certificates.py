r"""Do certificates hold, and how much of the truth do they certify?

Seeded certificates, end to end, between laws whose JSD is known. A miss is a bound above the
truth: at most alpha = 5 % may be misses, 8.8 % with three standard errors of 300 runs. The rows:

- equal laws, where every positive bound is a miss;
- the best discriminator, known in closed form, so that L(D) = JSD and the bound is put to its
  hardest test;
- fitted classifiers on Gaussians and rings, split and prequential;
- hostile ones: random, overfitted, logits x 100, with the clip fixed at 5;
- and one broken on purpose, evaluated on the pairs that it was trained on.

Then the share of the truth that 5,000 reals (2,250 pairs) and 5,000 pairs certify.

    python benchmarks/certificates.py --runs 300 --out certificates.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nelbo.certificate import certify
from nelbo.data.mixture import GaussianMixture
from nelbo.data.toys import swissroll
from nelbo.jsd import limit_below, plug_in
from nelbo.judges import Judge, Regression
from nelbo.randomness import generator, seeded

ALPHA = 0.05
Law = Callable[[int], Tensor]


def normal(d: float, dims: int) -> Law:
    """Draws from N(d e_1, I)."""

    def draw(n: int) -> Tensor:
        x = torch.randn(n, dims, dtype=torch.float64)
        x[:, 0] += d
        return x

    return draw


def mixture(law: GaussianMixture) -> Law:
    """Draws from a mixture, by torch's global generator."""

    def draw(n: int) -> Tensor:
        return law.sample(n, torch.Generator().manual_seed(int(torch.randint(2**62, ()))))

    return draw


def isotropic(means: Tensor, std: float) -> GaussianMixture:
    """Equal weights, one width."""
    weights = torch.full((len(means),), 1 / len(means), dtype=torch.float64)
    eye = torch.eye(means.shape[1], dtype=torch.float64) * std**2
    return GaussianMixture(weights, means, eye.expand(len(means), *eye.shape))


def ring(modes: int) -> GaussianMixture:
    """The first modes of eight on the unit circle, standard deviation .15."""
    angle = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
    return isotropic(torch.stack([angle.cos(), angle.sin()], 1)[:modes], 0.15)


def known_jsd(p: GaussianMixture, g: GaussianMixture, n: int = 400_000) -> float:
    """By the exact log-ratio at many draws; the error is about .0005."""
    draws = generator(1, "known")
    logits = (p.log_prob(x) - g.log_prob(x) for x in (p.sample(n, draws), g.sample(n, draws)))
    return plug_in(*logits)[0]


class Best(nn.Module):
    """The best logit between N(0, I) and N(d e_1, I)."""

    def __init__(self, d: float) -> None:
        super().__init__()
        self.d = d

    def forward(self, x: Tensor) -> Tensor:
        return self.d**2 / 2 - self.d * x[:, 0]


class Memory(nn.Module):
    """Sure of what lies nearest."""

    def __init__(self, real: Tensor, fake: Tensor) -> None:
        super().__init__()
        self.real, self.fake = real, fake

    def forward(self, x: Tensor) -> Tensor:
        near = [torch.cdist(x, rows).amin(1) for rows in (self.fake, self.real)]
        return 2 * torch.sign(near[0] - near[1])


class Overfit(Judge):
    """Knows the rows of FIT by heart."""

    name = "memory"

    def fit(self, real: Tensor, fake: Tensor, seed: int) -> nn.Module:
        return Memory(real, fake)


class Loud(nn.Module):
    """Some network, times a factor."""

    def __init__(self, seed: int, factor: float) -> None:
        super().__init__()
        with seeded(seed, "network"):
            self.network = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.factor * self.network(x)
        return out


@dataclass(frozen=True)
class Setting:
    """One row of the table: laws, their JSD, reals, and options that may depend on the run."""

    name: str
    p: Law
    g: Law
    jsd: float
    reals: int
    options: Callable[[int], dict[str, Any]] = field(default=lambda run: {})
    broken: bool = False

    def certify(self, run: int) -> tuple[float, bool, float]:
        """(bound, whether the e-value rejects, CPU seconds)."""
        start = time.process_time()
        with seeded(run, self.name):
            x = self.p(self.reals)
            y: Any = self.g(self.reals) if self.broken else self.g
        options = self.options(run)
        if self.broken:
            options["judges"] = [Memory(x.float(), y.float())]
        found = certify(x, y, alpha=ALPHA, seed=run, **options)
        assert found.recomputed() == found.jsd_nats_lower
        return found.jsd_nats_lower, found.rejected, time.process_time() - start


def always(**options: Any) -> Callable[[int], dict[str, Any]]:
    return lambda run: dict(options)


def coverage_settings() -> list[Setting]:
    quick: Sequence[Judge] = (Regression(0), Regression(50))
    g1, far = 0.111421, 0.632720
    flat, shifted = normal(0, 2), normal(1, 2)
    rows = [
        Setting("equal, 2-d, usual candidates", flat, flat, 0.0, 300),
        Setting("equal, 2-d, regressions", flat, flat, 0.0, 600, always(judges=quick)),
        Setting(
            "equal, 2-d, prequential", flat, flat, 0.0, 200, always(judges=quick, mode=PREQUENTIAL)
        ),
        Setting("shift 1, 1-d, usual candidates", normal(0, 1), normal(1, 1), g1, 400),
        Setting("shift 1, 10-d", normal(0, 10), normal(1, 10), g1, 400, always(judges=quick)),
        Setting("shift 1, 2-d, prequential", flat, shifted, g1, 300, PREQUENTIALLY),
        Setting("ring, 6 of 8 modes", *rings(6), 0.093684909, 600, always(judges=quick)),
        Setting("ring, 6 of 8, prequential", *rings(6), 0.093684909, 300, PREQUENTIALLY),
    ]
    for d, jsd in ((0.5, 0.030311), (1.0, g1), (4.0, far)):
        for mode in ("split", PREQUENTIAL):
            best = always(judges=[Best(d)], mode=mode)
            name = f"best D, shift {d:g}, {mode}"
            rows.append(Setting(name, normal(0, 1), normal(d, 1), jsd, 600, best))
    hostile: dict[str, Callable[[int], Any]] = {
        "random D": lambda run: Loud(run, 1.0),
        "random D x 100": lambda run: Loud(run, 100.0),
        "overfitted D": lambda run: Overfit(),
    }
    for name, judge in hostile.items():
        for laws, g, jsd in (("equal", flat, 0.0), ("shift 1", shifted, g1)):
            rows.append(Setting(f"{name}, {laws}", flat, g, jsd, 300, hostile_options(judge)))
    return [*rows, Setting("BROKEN: D saw C, equal", flat, flat, 0.0, 300, broken=True)]


def hostile_options(judge: Callable[[int], Any]) -> Callable[[int], dict[str, Any]]:
    return lambda run: {"judges": [judge(run)], "clips": (5.0,)}


def rings(modes: int) -> tuple[Law, Law]:
    return mixture(ring(8)), mixture(ring(modes))


def tightness_settings(reals: int) -> list[Setting]:
    roll = swissroll(10, 10, 0).truth
    assert roll is not None and roll.components is not None
    p = roll.components
    moved, wide = isotropic(p.means + 0.05, 0.05), isotropic(p.means, 0.11)
    return [
        Setting("shift 1, 1-d", normal(0, 1), normal(1, 1), 0.111421, reals),
        Setting("shift 1, 10-d", normal(0, 10), normal(1, 10), 0.111421, reals),
        Setting("shift 2, 5-d", normal(0, 5), normal(2, 5), 0.336831, reals),
        Setting("ring, 5 of 8 modes", *rings(5), 0.149578578, reals),
        Setting("ring, 2 of 8 modes", *rings(2), 0.376046843, reals),
        Setting(
            "Swiss roll, moved by .05", mixture(p), mixture(moved), known_jsd(p, moved), reals
        ),
        Setting("Swiss roll, .11 for .05", mixture(p), mixture(wide), known_jsd(p, wide), reals),
    ]


def measure(setting: Setting, runs: int) -> dict[str, Any]:
    """Misses with their exact binomial interval, mean share of the truth, seconds."""
    found = [setting.certify(run) for run in range(runs)]
    bounds, rejected, seconds = zip(*found, strict=True)
    misses = sum(bound > setting.jsd for bound in bounds)
    row = {
        "name": setting.name,
        "jsd_nats": setting.jsd,
        "reals": setting.reals,
        "runs": runs,
        "misses": misses,
        "miss_low": limit_below(misses, runs, 0.025),
        "miss_high": 1 - limit_below(runs - misses, runs, 0.025),
        "mean_bound_nats": sum(bounds) / runs,
        "share": sum(bounds) / runs / setting.jsd if setting.jsd else None,
        "least_share": min(bounds) / setting.jsd if setting.jsd else None,
        "positive": sum(bound > 0 for bound in bounds) / runs,
        "rejected": sum(rejected) / runs,
        "seconds": sum(seconds) / runs,
    }
    print(line(row), flush=True)
    return row


HEADER = (
    "| laws and classifiers | JSD | reals | runs | misses | 95 % interval | bound | share "
    "| bound > 0 | e-test | s |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    share = "-" if row["share"] is None else f"{row['share']:.2f}"
    return (
        f"| {row['name']} | {row['jsd_nats']:.4f} | {row['reals']:,} | {row['runs']} "
        f"| {row['misses'] / row['runs']:.1%} | {row['miss_low']:.1%} to {row['miss_high']:.1%} "
        f"| {row['mean_bound_nats']:.4f} | {share} | {row['positive']:.0%} "
        f"| {row['rejected']:.0%} | {row['seconds']:.2f} |"
    )


PREQUENTIAL = "prequential"
PREQUENTIALLY = always(judges=(Regression(0), Regression(50)), mode=PREQUENTIAL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=300, help="of each coverage setting")
    parser.add_argument("--tight-runs", type=int, default=4, help="of each tightness setting")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    print(HEADER)
    coverage = [measure(setting, options.runs) for setting in coverage_settings()]
    tight = [
        measure(setting, options.tight_runs)
        for reals in (5000, 11_112)
        for setting in tightness_settings(reals)
    ]
    minutes = (time.process_time() - start) / 60
    print(f"\n{minutes:.1f} CPU minutes, torch {torch.__version__}, {platform.machine()}")
    if options.out:
        document = {"alpha": ALPHA, "coverage": coverage, "tightness": tight, "minutes": minutes}
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
