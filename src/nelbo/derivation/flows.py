r"""The probability flow: a likelihood without a bound, and its trace by probes.

The flow dx/dλ = ½(l x − √l ε̂) carries a density from the prior to the data,

    log p(x at λ_1) = log N(x at λ_N; 0, I) + ∫_{λ_1}^{λ_N} div dλ,   div = ½(l d − √l tr ∂ε̂/∂x),

of another model than the one that the bound scores. Hutchinson: tr J = E zᵀJz, z = ±1.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nelbo import dormand_prince
from nelbo.data.mixture import GaussianMixture
from nelbo.derivation.carried import STEPS, exact_flow
from nelbo.derivation.identity import Erratum, Identity, Line, Side, mean_se
from nelbo.derivation.models import GAUSSIAN
from nelbo.derivation.pairs import mixture
from nelbo.derivation.places import Said, equal
from nelbo.flow import exact_trace, probed_trace
from nelbo.randomness import generator

DENSITY = "nelbo.flow.Flow.log_density"
LOG_PROB = "nelbo.data.mixture.GaussianMixture.log_prob"
EXACT, PROBED = "nelbo.flow.exact_trace", "nelbo.flow.probed_trace"


def triangle() -> GaussianMixture:
    """Three modes in the plane, of different weights, widths and directions."""
    means = torch.tensor([[1.0, 0.1], [-0.6, 0.8], [-0.3, -0.9]], dtype=torch.float64)
    spread = torch.tensor([[0.06, 0.02], [0.02, 0.03]], dtype=torch.float64)
    spreads = torch.stack([spread, 2 * spread, 0.05 * torch.eye(2).double()])
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means, spreads)


LINE = torch.tensor([[-1.6], [-0.4], [0.5], [1.9]], dtype=torch.float64)
PLACES = torch.tensor([[0.9, 0.0], [-0.5, 0.5], [0.1, -0.4]], dtype=torch.float64)


class ProbabilityFlow(Identity):
    id = "I50"
    name = "probability-flow"
    title = "A flow without noise carries the density from the prior to the data"
    latex = (
        r"\frac{dx}{d\lambda} = \tfrac12(l\,x - \sqrt l\,\hat\varepsilon),\quad "
        r"\log p(x_{\lambda_1}) = \log N(x_{\lambda_N};0,I)"
        r" + \int_{\lambda_1}^{\lambda_N}\mathrm{div}\;d\lambda"
    )
    text = "dx/dlambda = (l x - √l eps)/2; log p(x_1) = log N(x_N; 0, I) + integral of div"
    assumes = "a model of its own, not the p whose bound is L; exact at both ends of the flow"
    steps = (
        "The Fokker-Planck equation of the forward process is that of a flow with half the score.",
        "With score = −ε/√l the flow is dx/dλ = ½(l x − √l ε̂), and in u = x/√k, τ = e^{−λ/2} it "
        "is du/dτ = ε̂.",
        "Along a flow d log p/dλ = −div; the sign of the integral is that of λ_N − λ_1 < 0.",
        "At λ_N the density is taken to be N(0, I): what is left of the data there is its error.",
    )
    functions = (
        DENSITY,
        "nelbo.data.mixture.GaussianMixture.log_prob",
        "nelbo.reverse.Prediction",
    )
    source = "Song et al. 2021, section 4.3 and appendix D; Chen et al. 2018, theorem 1"

    def lines(self, seed: int) -> list[Line]:
        data, high = mixture([-1.2, 0.3, 1.5], [0.4, 0.2, 0.3], [0.5, 0.3, 0.2]), 8.0
        value, _ = exact_flow(data, high, -26.0).log_density(LINE, torch.tensor(high), -26.0)
        keep, lose = (torch.sigmoid(torch.tensor(v).double()) for v in (high, -high))
        return [
            equal(
                GAUSSIAN,
                Said("log p(x) by the flow, exact denoiser of a mixture", DENSITY),
                Said("log q(x_1) of the mixture", LOG_PROB),
                value[:, 0],
                data.diffused(keep, lose).log_prob(LINE),
                of="places",
                tolerance=STEPS,
            ),
            *self._ends(data),
        ]

    @staticmethod
    def _ends(data: GaussianMixture) -> list[Line]:
        """The same flow in u and τ, driven by ε̂."""
        high, low = 4.0, -4.0
        flow = exact_flow(data, high, low)
        _, done = flow.log_density(LINE, torch.tensor(high), low)

        def field(rows: Tensor, tau: Tensor, u: Tensor) -> Tensor:
            logsnr = -2 * tau.log()
            x = torch.sigmoid(logsnr).sqrt()[:, None] * u
            return flow.at(x, (logsnr - high) / (low - high)).noise()

        start, end = (torch.tensor(v).double() for v in (high, low))
        scale = [torch.sigmoid(v).sqrt() for v in (start, end)]
        u = dormand_prince.integrate(
            field,
            LINE / scale[0],
            (-start / 2).exp(),
            (-end / 2).exp(),
            relative=STEPS / 20,
            absolute=STEPS / 20,
        )
        return [
            equal(
                GAUSSIAN,
                Said("x at the end of the flow", DENSITY),
                Said("√k u, du/dtau = eps", "nelbo.reverse.Prediction.noise"),
                done.y[:, :1],
                scale[1] * u.y,
                of="places",
                tolerance=STEPS,
                unit="",
            )
        ]


class Probes(Identity):
    id = "I51"
    name = "probes"
    title = "A random sign vector gives the trace of a Jacobian without the Jacobian"
    latex = (
        r"\mathrm{tr}\,J = \mathbb E\,z^{\mathsf T}Jz,\qquad \mathrm{Var} = "
        r"2\Big(\|S\|_F^2 - \sum_i S_{ii}^2\Big),\quad S = \tfrac12(J+J^{\mathsf T})"
    )
    text = "tr J = E z'Jz for signs z; variance 2 (|S|² - sum S_ii²); for normal z 2 |S|²"
    assumes = "E z_i z_j = 1 if i = j, else 0"
    steps = (
        "zᵀJz = Σ J_ij z_i z_j, and E z_i z_j picks the diagonal.",
        "For signs z_i² = 1: the diagonal is exact, only the pairs i ≠ j make noise, and each "
        "pair appears twice, as S_ij.",
        "For normal z the diagonal varies too, Var z_i² = 2.",
    )
    functions = (PROBED, EXACT, DENSITY)
    source = "Hutchinson 1990; Grathwohl et al. 2019, section 3.1"

    @torch.enable_grad()
    def lines(self, seed: int) -> list[Line]:
        dims, draws = 5, generator(0, "derivation", "jacobian")
        a, x = (torch.randn(n, dims, dtype=torch.float64, generator=draws) for n in (dims, 1))
        x.requires_grad_()
        y = torch.tanh(x @ a.T)
        jacobian = ((1 - y.square()).T * a).detach()
        symmetric = (jacobian + jacobian.T) / 2
        whole = symmetric.square().sum()
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=dims))).double()
        values = probed_trace(y, x, signs[None])[0]
        normal = torch.randn(1, 20_000, dims, generator=generator(seed, "probes")).double()
        square = (probed_trace(y, x, normal)[0] - jacobian.trace()).square()
        spread = Side("variance for normal z", *mean_se(square), PROBED)
        patterns = f"{2**dims} patterns of signs"
        return [
            equal(
                "Jacobian",
                Said(f"mean of z'Jz over all {patterns}", PROBED),
                Said("tr J", EXACT),
                values.mean(),
                exact_trace(y, x)[0, 0],
                unit="",
            ),
            equal(
                "Jacobian",
                Said(f"variance of z'Jz over all {patterns}", PROBED),
                Said("2 (|S|² - sum S_ii²) of the Jacobian in closed form"),
                values.var(correction=0),
                2 * (whole - symmetric.diagonal().square().sum()),
                unit="",
            ),
            Line(
                "Jacobian",
                (spread, Side("2 |S|²", float(2 * whole))),
                note="20000 normal probes",
                unit="",
            ),
            self._along_a_path(),
        ]

    @staticmethod
    def _along_a_path() -> Line:
        flow, start = exact_flow(triangle(), 3.0, -3.0), torch.tensor(3.0)
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        probed, _ = flow.log_density(PLACES, start, -3.0, signs.expand(len(PLACES), -1, -1))
        return equal(
            GAUSSIAN,
            Said("mean of log p over all sign patterns, each fixed along the path", PROBED),
            Said("log p with the exact trace", EXACT),
            probed.mean(1),
            flow.log_density(PLACES, start, -3.0)[0][:, 0],
            of="places in the plane",
            tolerance=STEPS,
        )


IDENTITIES: tuple[Identity, ...] = (ProbabilityFlow(), Probes())
ERRATA: tuple[Erratum, ...] = ()
