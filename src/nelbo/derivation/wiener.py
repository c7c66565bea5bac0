r"""A control variate that knows its own mean: the error of a linear denoiser.

For data N(m, C) the linear denoiser is exact, its error is the term of the bound itself, and its
mean over the noise is a closed form for every x_0:

    E_ε G_i = ½ (snr_s − snr_t) Σ_j [(1 − W_j)² ξ_j² + σ² W_j²],   W = Λ/(Λ + σ²),   σ² = 1/snr_t.

For other data it fluctuates like a term, and is subtracted with any factor without a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nelbo.bound import prior_term, term_of
from nelbo.controls import Wiener
from nelbo.derivation.denoisers import (
    Points,
    at_logsnr,
    called,
    compared,
    model_of,
    normal,
    sphere,
)
from nelbo.derivation.identity import Erratum, Identity, Line, Side
from nelbo.evaluation import evaluate
from nelbo.fewcalls import Plan
from nelbo.processes.gaussian import Gaussian
from nelbo.randomness import generator
from nelbo.reverse import Reverse

TERM, EXPECTED = "nelbo.bound.term_of", "nelbo.controls.Wiener.expected"
FLUCTUATION, EVALUATE = "nelbo.controls.Wiener.fluctuation", "nelbo.evaluation.evaluate"
PLANE = normal([0.5, -0.3], [[0.7, 0.2], [0.2, 0.4]])
LOGSNR, SET, PILOT = [4.0, 2.0, 1.0, 0.0, -2.0, -6.0], 64, 128


def given(x_0: Tensor) -> Points:
    """ε beside each of x_0 (n, 2), exact for terms that are quadratic in ε."""
    z, weight = sphere(PLANE.dims)
    rows = x_0.repeat_interleave(len(z), 0)
    return Points(rows, z.repeat(len(x_0), 1), weight.repeat(len(x_0)))


def terms(model: Reverse, x_0: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Terms at the points of `given` (n, 4, N), the decoder first, and their means (n, N)."""
    points = given(x_0)
    at, rows, index = called(model, points, times)
    table = term_of(at, rows, times, index).view(len(x_0), -1, len(times))
    return table, table.mean(1)


class WienerControl(Identity):
    id = "I41"
    name = "wiener-control"
    title = "A stand-in for a term whose mean over the noise needs no network"
    latex = (
        r"\mathbb E_\varepsilon\ell_G=\tfrac12\sum_j\frac{(1-W_j)^2\xi_j^2+\sigma^2W_j^2}"
        r"{\sigma^2},\quad W=\frac{\Lambda}{\Lambda+\sigma^2},\qquad \mathbb E\,\mathbb E_"
        r"\varepsilon\ell_G=\tfrac12\sum_jW_j\ \text{for Gaussian data}"
    )
    text = "E l_G = ½ sum [(1-W)² xi² + sigma² W²]/sigma²; on average ½ sum W"
    assumes = "Gaussian process, sigma² = beta~ for its use on terms; any data for its mean"
    steps = (
        "In the principal axes the best linear denoiser shrinks each coordinate by W.",
        "Its error is (1-W) xi - sigma W eps, coordinate by coordinate; the mean over eps of its "
        "square has no cross term.",
        "For Gaussian data E xi² = Lambda, and (1-W)² Lambda + sigma² W² = sigma² W.",
        "Subtracting b (l_G - E l_G) from a term changes its mean by nothing, and its variance "
        "by the factor 1 - R² at the best b, which is fitted on other examples.",
    )
    functions = (EXPECTED, FLUCTUATION, TERM, EVALUATE)
    source = "Wiener 1949; Hammersley, Handscomb 1964, ch. 5"

    def lines(self, seed: int) -> list[Line]:
        schedule = at_logsnr(LOGSNR)
        times, process = schedule.grid(), Gaussian(schedule)
        control = Wiener(process, PLANE.means[0], PLANE.covariances[0])
        x_0 = PLANE.sample(8, generator(0, "places"))
        table, means = terms(model_of(PLANE, schedule), x_0, times)
        points = given(x_0)
        at, rows, index = called(model_of(PLANE, schedule), points, times)
        pair = index > 0
        s, t = times[index[pair] - 1], times[index[pair]]
        moved = control.fluctuation(rows[pair], at.x_t[pair], s, t)
        left = (table - means[:, None])[:, :, 1:].flatten()
        snr = schedule.logsnr(times).exp()
        spectrum = torch.linalg.eigvalsh(PLANE.covariances[0])
        kept = (spectrum / (spectrum + 1 / snr[1:, None])).sum(1)
        overall = 0.5 * (snr[:-1] / snr[1:] - 1) * kept
        z, weight = sphere(PLANE.dims)
        spread = PLANE.means[0] + z @ torch.linalg.cholesky(PLANE.covariances[0]).T
        return [
            compared(
                "Gaussian",
                ("E_eps G_i, closed form", control.expected(x_0, times), EXPECTED),
                ("E_eps of the pair's term", means[:, 1:], TERM),
                tolerance=1e-9,
            ),
            compared(
                "Gaussian",
                ("G_i - E G_i", moved, FLUCTUATION),
                ("term - its mean", left, TERM),
                tolerance=1e-9,
            ),
            compared(
                "Gaussian",
                ("E of it over the data", weight @ control.expected(spread, times), EXPECTED),
                ("½ expm1(lambda_s-lambda_t) sum W", overall, "closed form"),
                tolerance=1e-9,
            ),
            _few_calls(seed),
        ]


def _few_calls(seed: int) -> Line:
    """A spoiled model by two calls per example, against all its terms in closed form."""
    schedule = at_logsnr(LOGSNR)
    times, model = schedule.grid(), model_of(PLANE, schedule, scale=0.9, shift=0.1)
    rows = PLANE.sample(SET, generator(seed, "set"))
    pilot = PLANE.sample(PILOT, generator(seed, "pilot"))
    plan = Plan(controls=(Wiener.of(Gaussian(schedule), pilot),))
    found = evaluate(model, rows, times, calls=2, pilot=pilot, plan=plan, seed=seed)
    total = found.estimates()["total"]
    exact = prior_term(model, rows, times) + terms(model, rows, times)[1].sum(1)
    return Line(
        "Gaussian",
        (
            Side("bound of the set by 2 calls per example", total.mean, total.se_mc, EVALUATE),
            Side("all its terms, exact over the noise", float(exact.mean()), by=TERM),
        ),
        note=f"{SET} examples, a model that is off",
    )


IDENTITIES: tuple[Identity, ...] = (WienerControl(),)
ERRATA: tuple[Erratum, ...] = ()
