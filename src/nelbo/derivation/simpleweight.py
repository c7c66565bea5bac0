r"""The weights of the noise errors in the bound, and what a network of noise learns.

    Σ_pairs E KL = Σ_pairs ½ (e^{λ_s−λ_t} − 1) E‖ε − ε̂‖²,      L_simple = mean over t of E‖ε − ε̂‖².

L_simple drops the weights, and with them the bound. Either way the best ε̂ is E[ε|x_t], and an
error is left that no network avoids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nelbo.bound import pair_term
from nelbo.derivation.denoisers import (
    Points,
    averaged,
    called,
    compared,
    in_three_ways,
    lattice,
    mixture_points,
    model_of,
    normal,
    two_modes,
)
from nelbo.derivation.identity import Erratum, Identity, Line
from nelbo.derivation.noise import BETAS, NOISE, PAIR, STEPS, chain
from nelbo.objectives import Simple, noise_error
from nelbo.reverse import Reverse
from nelbo.schedules import Linear


class SimpleWeight(Identity):
    id = "I24"
    name = "simple-weight"
    title = "The bound weighs the noise errors; L_simple does not"
    latex = (
        r"\sum_{\mathrm{pairs}}\mathbb E\,\mathrm{KL}=\sum_{\mathrm{pairs}}\tfrac12"
        r"\mathrm{expm1}(\lambda_s-\lambda_t)\,\mathbb E\|\varepsilon-\hat\varepsilon\|^2,\qquad "
        r"L_{\mathrm{simple}}=\tfrac1N\sum_t1\cdot\mathbb E\|\varepsilon-\hat\varepsilon\|^2"
    )
    text = "sum E KL = sum ½ expm1(lambda_s-lambda_t) E‖eps-eps_hat‖²; L_simple: weight 1"
    assumes = "Gaussian process, sigma² = beta~"
    steps = (
        "Sum the identity before over the pairs and take expectations.",
        "L_simple replaces every weight by 1, and the decoder term by one more squared error.",
        "The weights differ much: for the linear schedule of 1000 steps they are .600 at t_2, "
        ".0864 at t_10, .0103 at t_100 and .0102 at t_1000. L_simple turns the network's "
        "effort towards noisy times; its value is no bound.",
    )
    functions = (PAIR, NOISE, "nelbo.objectives.Simple", BETAS)
    source = "Ho, Jain, Abbeel 2020, section 3.4, eq. 14"

    def lines(self, seed: int) -> list[Line]:
        c = chain()
        at, x_0, index = c.at("noise")
        summed = averaged(pair_term(at, x_0, c.times[index - 1]), c.points).sum()
        simple = averaged(noise_error(at, x_0), c.points)
        weight = 0.5 * torch.expm1(-c.schedule.logsnr(c.times).diff())
        both = [("sum E KL", summed, PAIR), ("weighted noise errors", weight @ simple, NOISE)]
        return [compared("Gaussian", both[0], both[1]), *_weights()]


def simple_of(model: Reverse, points: Points, times: Tensor) -> Tensor:
    """E L_simple with i drawn uniformly, by the objective itself."""
    objective = Simple(times)
    at, x_0, index = called(model, points, times)
    loss = objective.loss(at, x_0, index, objective.probabilities[index])
    return averaged(loss, points) @ objective.probabilities


def _weights() -> list[Line]:
    """The weights at four times of DDPM's chain: KL per squared error, and from the betas."""
    schedule = Linear(1000)
    index = torch.tensor([1, 9, 99, 999])
    times = schedule.grid()
    flat = normal([0.0], [[1.0]])
    model = in_three_ways(flat, schedule, 0.0, 0.0)[0]
    x_0 = torch.full((4, 1), 0.5, dtype=torch.float64)
    at = model.at(torch.full_like(x_0, 0.3), times[index])
    error = noise_error(at, x_0)
    found = pair_term(at, x_0, times[index - 1]) / error
    beta = schedule.betas()[index]
    right = beta / (2 * (1 - beta) * schedule.lose(times[index - 1]))
    return [
        compared(
            "Gaussian",
            (f"KL per squared error at t_{int(i) + 1}", found[k], PAIR),
            ("beta_t/(2 alpha_t (1 - keep_{t-1}))", right[k], BETAS),
            note="linear schedule, 1000 steps",
        )
        for k, i in enumerate(index)
    ]


class ConditionalMean(Identity):
    id = "I25"
    name = "conditional-mean"
    title = "The network learns the mean noise given x_t, and an error is always left"
    latex = (
        r"\mathbb E\|\varepsilon-\hat\varepsilon\|^2=\mathbb E\|\varepsilon-\mathbb E[\varepsilon|"
        r"x_t]\|^2+\mathbb E\|\mathbb E[\varepsilon|x_t]-\hat\varepsilon\|^2"
    )
    text = "E‖eps-eps_hat‖² = E‖eps-E[eps|x_t]‖² + E‖E[eps|x_t]-eps_hat‖²"
    assumes = "eps_hat is a function of x_t and t only"
    steps = (
        "Write eps - eps_hat = (eps - E[eps|x_t]) + (E[eps|x_t] - eps_hat).",
        "The second part is a function of x_t; given x_t the first has mean 0, so that the "
        "product of both has mean 0.",
        "The first square does not depend on the network: it is a floor above zero, "
        "snr_t E Var(x_0|x_t). The second is 0 for eps_hat = E[eps|x_t].",
    )
    functions = (
        NOISE,
        "nelbo.data.mixture.GaussianMixture.spread",
        "nelbo.data.mixture.GaussianMixture.denoise",
    )
    source = "common lecture notes"

    def lines(self, seed: int) -> list[Line]:
        data, schedule = two_modes(), Linear(STEPS)
        times = schedule.grid()
        points = mixture_points(data)
        at, x_0, _ = called(model_of(data, schedule, scale=0.9, shift=0.1), points, times)
        left = averaged(noise_error(at, x_0), points)
        floor, excess = _parts(times)
        return [
            compared(
                "Gaussian",
                ("E‖eps-eps_hat‖²", left, NOISE),
                ("floor + excess", floor + excess, "nelbo.data.mixture.GaussianMixture.spread"),
                tolerance=1e-7,
                note="mixture of two normals",
                unit="squared error",
            )
        ]


def _parts(times: Tensor) -> tuple[Tensor, Tensor]:
    """The floor and the excess (N,), as sums over lattices of x_t."""
    data, schedule = two_modes(), Linear(STEPS)
    found = []
    for keep, lose in zip(schedule.keep(times), schedule.lose(times), strict=True):
        x_t, weight = lattice(data.diffused(keep, lose))
        best = data.denoise(x_t, keep, lose)[:, 0]
        square = torch.stack([data.spread(x_t, keep, lose), (best - (0.9 * best + 0.1)) ** 2])
        found.append(keep / lose * (square @ weight))
    floor, excess = torch.stack(found, 1)
    return floor, excess


IDENTITIES: tuple[Identity, ...] = (SimpleWeight(), ConditionalMean())
ERRATA: tuple[Erratum, ...] = ()
