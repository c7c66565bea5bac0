r"""Data with levels and a density: what stands between them.

Noise u that fills the bin of a level gives −log P(j) ≤ E_u[−log p(x_j + a u)] − log a
(Jensen), per dimension; a decoder p_θ(x_0|x_1) gives a bound with the entropy of q(x_1|x_0).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nelbo.decoders import LevelMass
from nelbo.derivation.carried import exact_flow
from nelbo.derivation.identity import Erratum, Identity, Line, Side, mean_se
from nelbo.derivation.pairs import mixture, normal
from nelbo.derivation.places import Said, equal
from nelbo.odelikelihood import Measure, ode_likelihood
from nelbo.parameterizations import Levels
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.schedules import LogSNRLinear

LIKELIHOOD = "nelbo.odelikelihood.ode_likelihood"
LOG_PROB = "nelbo.data.mixture.GaussianMixture.log_prob"
MASSES = torch.tensor([0.1, 0.35, 0.2, 0.05, 0.3], dtype=torch.float64)
LEVELS, GRID = len(MASSES), "levels"
ENDS = LogSNRLinear(5.0, -26.0)


class Same(nn.Module):
    """Logits that do not look: with `Levels` the exact model of one dimension."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.logits.expand(len(x_t), -1)


class Dequantised(Identity):
    id = "I52"
    name = "dequantisation"
    title = "A density bounds a mass, once the bins are filled or the decoder stands between"
    latex = (
        r"-\log P(j) \le \mathbb E_u[-\log p(x_j + a u)] - d\log a,\qquad "
        r"-\log P(x_0) \le \mathbb E_{q(x_1|x_0)}"
        r"[-\log p_\theta(x_0|x_1) + \log q(x_1|x_0) - \log p(x_1)]"
    )
    text = "-log P(j) <= E_u[-log p(x_j + a u)] - d log a, u uniform, a the width of the bin"
    assumes = "u uniform on the bin, whose width on the model's scale is a"
    steps = (
        "P(j) is the mass of its bin, a^d E_u p(x_j + a u); −log is convex (Jensen).",
        "The bin's width enters as −d log a: log2(255/2) = 6.9944 bits/dim for 256 levels on "
        "[−1, 1].",
        "Or take x_1 as the latent variable of a model p_θ(x_0|x_1) p(x_1): its bound has the "
        "entropy term log q(x_1|x_0), which may not be forgotten.",
        "With exact p_θ(x_0|x_1) and p(x_1) the second form is −log P(x_0) for every x_1.",
    )
    functions = (LIKELIHOOD, LOG_PROB)
    source = "Theis, van den Oord and Bethge 2016, section 3.1; Ho et al. 2019 (Flow++)"

    def lines(self, seed: int) -> list[Line]:
        x_0, nats = torch.linspace(-1, 1, LEVELS, dtype=torch.float64)[:, None], -MASSES.log()
        times, width = ENDS.grid(2), 2 / (LEVELS - 1)
        model = Reverse(Gaussian(ENDS), Same(MASSES.log()), Levels(LEVELS), LevelMass())
        decoded = Measure("variational", LEVELS, draws=2, tolerance=1e-6, seed=seed)
        filled = Measure("uniform", LEVELS, draws=30, tolerance=1e-4, batch=512, seed=seed)
        through, noisy = (
            ode_likelihood(model, x_0, times, measure).values[..., 0]
            for measure in (decoded, filled)
        )
        u, weight = (torch.from_numpy(v) / 2 for v in np.polynomial.legendre.leggauss(40))
        spread = [math.exp(-float(ENDS.logsnr_max) / 2)] * LEVELS
        density = mixture(x_0[:, 0].tolist(), spread, MASSES.tolist())
        log_p = density.log_prob((x_0 + width * u).reshape(-1, 1)).view(LEVELS, -1)
        bound = float((-log_p @ weight).mean()) - math.log(width)
        mean, se = mean_se(noisy.mean(0))
        flowed = Side("-log p at x_j + a u by the flow, - log a", mean, se, LIKELIHOOD)
        exact = Side("E_u[-log p(x_j + a u)] - log a, p a mixture", bound, 0.0, LOG_PROB)
        note = "mean over the levels, 30 draws of u at each"
        return [
            equal(
                GRID,
                Said("-log p(x_0|x_1) + log q(x_1|x_0) - log p(x_1), exact model", LIKELIHOOD),
                Said("-log P(x_0)"),
                through,
                nats[:, None],
                of="levels and draws of x_1",
                tolerance=1e-4,
            ),
            Line(GRID, (Side("-log P(j)", float(nats.mean())), flowed), "<=", note=note),
            Line(GRID, (flowed, exact), "=", 1e-3, note=note),
            self._constant(seed),
        ]

    @staticmethod
    def _constant(seed: int) -> Line:
        """What 256 levels cost: the flow of N(0, 1) data, whose E_u[−log p] is a closed form."""
        levels, data = 256, normal(0)
        model = exact_flow(data, 5.0, -26.0).model
        x = torch.tensor([[-0.2], [0.6]], dtype=torch.float64)
        x = ((x + 1) * (levels - 1) / 2).round() * 2 / (levels - 1) - 1
        times, width = torch.tensor([0.0, 1.0], dtype=torch.float64), 2 / (levels - 1)
        found = ode_likelihood(model, x, times, Measure("uniform", levels, 20, seed=seed)).values
        spread = 1 + math.exp(-5.0)
        closed = 0.5 * (math.log(2 * math.pi * spread) + (x.square() + width**2 / 12) / spread)
        mean, se = mean_se(((found[..., 0] - closed) / math.log(2)).mean(0))
        sides = (
            Side("what the bins add to -log p", mean, se, LIKELIHOOD),
            Side("log2(1/a), a = 2/255", math.log2((levels - 1) / 2)),
        )
        return Line(
            GRID, sides, "=", 1e-4, note="20 draws of u at two of 256 levels", unit="bits/dim"
        )


IDENTITIES: tuple[Identity, ...] = (Dequantised(),)
ERRATA: tuple[Erratum, ...] = ()
