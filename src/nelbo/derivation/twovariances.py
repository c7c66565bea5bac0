r"""Two standard errors: of this very set of examples, and of the population that it is from.

N examples, R independent repeats of each; W the mean variance within an example, B the variance of
the N means:

    this set    √(W/(N R)),      the population    √(B/N),      σ_x² = B − W/R.

B contains W/R already. Where some examples are left out, the choice of examples is an error of
this set as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nelbo.accounting import account
from nelbo.derivation.identity import Erratum, Identity, Line, Side, mean_se
from nelbo.design import Design, design
from nelbo.estimate import Estimate
from nelbo.randomness import generator

OF, ACCOUNT = "nelbo.estimate.Estimate.of", "nelbo.accounting.account"
EXAMPLES, REPLICATES, AGAIN = 30, 3, 600
BETWEEN, WITHIN = 2.0, 0.5
"""Variances of the examples' means and of the noise."""
SQUARED = "nats²"
SET, CALLS, DESIGNS = 300, 0.5, 300


class TwoVariances(Identity):
    id = "I43"
    name = "two-variances"
    title = "Noise of the draws and spread of the examples, told apart by repeats"
    latex = (
        r"\mathrm{se}_{\mathrm{mc}}^2=\frac{W}{NR},\qquad\mathrm{se}^2=\frac BN,\qquad "
        r"\sigma_x^2=B-\frac WR,\qquad \mathrm{se}_{\mathrm{mc}}^2=(1-f)\frac Bn+f\frac W{nR}"
    )
    text = "se_mc² = W/(N R), se² = B/N, sigma_x² = B - W/R; with n of N_0 drawn, f = n/N_0"
    assumes = "examples and repeats independent; coupled designs are repeated as a whole"
    steps = (
        "A value is the example's own mean plus noise; the mean over R repeats has noise W/R.",
        "The mean over this set differs from the set's truth by noise alone: W/(N R).",
        "For the population the N examples are draws too: B/N, and E B = sigma_x² + W/R already "
        "holds the noise, so that the two errors are never added.",
        "n of N_0 examples without replacement: the mean of a sample has (1 - f) B_0/n, B_0 "
        "without noise, and all the noise W/(n R); with B = B_0 + W/R this is "
        "(1 - f) B/n + f W/(n R).",
    )
    functions = (OF, ACCOUNT, "nelbo.design.design")
    source = "Cochran 1977, ch. 2, 10, 12"

    def lines(self, seed: int) -> list[Line]:
        stream = generator(seed, "two variances")
        n, r = EXAMPLES, REPLICATES
        effect = BETWEEN**0.5 * torch.randn(AGAIN, n, generator=stream, dtype=torch.float64)
        noise = torch.randn(AGAIN, n, r, generator=stream, dtype=torch.float64)
        found = [Estimate.of(table) for table in effect[..., None] + WITHIN**0.5 * noise]
        mean, se, mc = torch.tensor([(e.mean, e.se, e.se_mc) for e in found]).double().T
        note = f"{AGAIN} sets of {n} examples, {r} repeats each"
        return [
            _line(
                ("mean of se_mc²", mc**2),
                ("mean of (estimate - the set's truth)²", (mean - effect.mean(1)) ** 2),
                ("W/(N R)", WITHIN / (n * r)),
                note,
            ),
            _line(
                ("mean of se²", se**2),
                ("mean of (estimate - the population's truth)²", mean**2),
                ("(sigma_x² + W/R)/N", (BETWEEN + WITHIN / r) / n),
                note,
            ),
            _some_left_out(seed),
        ]


def _line(
    own: tuple[str, Tensor], seen: tuple[str, Tensor], known: tuple[str, float], note: str
) -> Line:
    """Squared errors as they were claimed, as they were, and as they must be."""
    sides = (
        Side(own[0], *mean_se(own[1]), by=OF),
        Side(known[0], known[1], by="closed form"),
        Side(seen[0], *mean_se(seen[1]), by=OF),
    )
    return Line("Gaussian", sides, tolerance=0.0, note=note, unit=SQUARED)


def _some_left_out(seed: int) -> Line:
    """Fewer than one call per example: one fixed set, many designs."""
    stream = generator(seed, "left out")
    truth = BETWEEN**0.5 * torch.randn(SET, generator=stream, dtype=torch.float64)
    claimed, missed = [], []
    for number in range(DESIGNS):
        plan = design(SET, CALLS, 1, seed, number, latin=False)
        noise = WITHIN**0.5 * torch.randn(SET, 2, generator=stream, dtype=torch.float64)
        residuals = torch.where(plan.both.isfinite(), truth[:, None] + noise, torch.nan)
        found = account(torch.zeros_like(truth), residuals, plan, latin=False)
        claimed.append(found.se_mc**2)
        missed.append((found.mean - float(truth.mean())) ** 2)
    sides = (
        Side("mean of se_mc², examples left out", *mean_se(torch.tensor(claimed)), by=ACCOUNT),
        Side("as the two replicates have it", _known(plan, float(truth.var())), by="closed form"),
        Side("mean of (estimate - the set's truth)²", *mean_se(torch.tensor(missed)), by=ACCOUNT),
    )
    note = f"{DESIGNS} designs of {plan.calls} calls on {SET} examples; 2 % for a ratio's bias"
    return Line("Gaussian", sides, tolerance=0.02 * sides[1].value, note=note, unit=SQUARED)


def _known(plan: Design, spread: float) -> float:
    """Σ ω_r² [(1 − f_r) C + I]/n_r + 2 ω_1 ω_2 C (1 − f_1)/n_1: one call of noise I for each."""
    seen = [int(table.isfinite().sum()) for table in (plan.first, plan.second)]
    share = [m / sum(seen) for m in seen]
    cross = 2 * share[0] * share[1] * spread * (1 - seen[0] / SET) / seen[0]
    own = [w**2 * ((1 - m / SET) * spread + WITHIN) / m for w, m in zip(share, seen, strict=True)]
    return cross + sum(own)


IDENTITIES: tuple[Identity, ...] = (TwoVariances(),)
ERRATA: tuple[Erratum, ...] = ()
