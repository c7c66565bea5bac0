"""What every forward process must satisfy, whatever its family.

A new family gets the whole suite by one line in `FAMILIES`. The laws know distributions only:
expectations are sums where a distribution can be enumerated, and the trapezoidal rule on ±12
standard deviations otherwise (which is spectrally accurate for smooth densities).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from nelbo.distributions import kl_divergence
from nelbo.processes.base import Process
from nelbo.processes.bernoulli import Bernoulli
from nelbo.processes.gaussian import Gaussian
from nelbo.schedules import Cosine, Harmonic, Linear, LogSNRLinear, Schedule, Tabulated


@dataclass(frozen=True)
class Case:
    """A family under a schedule.

    Arguments:
        family: builds the process from a schedule.
        data: (B, *shape) float64 examples in the data's own space.
        steps: the size of the grid whose pairs are tried.
    """

    name: str
    family: Callable[[Schedule], Process]
    schedule: Schedule
    data: Tensor
    steps: int = 10

    @property
    def process(self) -> Process:
        return self.family(self.schedule)

    @property
    def times(self) -> Tensor:
        return self.schedule.grid(self.steps)

    def triples(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Increasing times (r, s, t): neighbours at both ends and in the middle, and far apart."""
        n = len(self.times)
        middle = n // 2
        kept = {(0, 1, 2), (middle - 1, middle, middle + 1), (n - 3, n - 2, n - 1)}
        kept |= {(0, middle, n - 1), (0, 1, n - 1), (0, n - 2, n - 1)}
        return [(self.times[i], self.times[j], self.times[k]) for i, j, k in sorted(kept)]


REAL = torch.tensor([[-1.0, -0.2, 0.0, 0.7], [1.0, 2.5, -0.6, 0.1]], dtype=torch.float64)

SCHEDULES: list[tuple[Schedule, int]] = [
    (LogSNRLinear(), 9),
    (LogSNRLinear(), 1000),
    (Linear(10), 10),
    (Linear(1000), 1000),
    (Cosine(10), 10),
    (Cosine(1000), 1000),
    (Harmonic(20), 20),
    (Tabulated([0.3, 0.01, 0.5, 0.5, 0.999]), 5),
]

BITS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
RATES = torch.tensor([0.5, 0.2, 0.03, 0.9], dtype=torch.float64)


def bernoulli(schedule: Schedule) -> Process:
    return Bernoulli(schedule, RATES)


FAMILIES: list[Case] = [
    *[Case("gaussian", Gaussian, schedule, REAL, steps) for schedule, steps in SCHEDULES],
    *[Case("bernoulli", bernoulli, schedule, BITS, steps) for schedule, steps in SCHEDULES],
]


def name_of(case: Case) -> str:
    return f"{case.name}-{type(case.schedule).__name__}-{case.steps}"


# --- sums over a distribution --------------------------------------------------------------------


def rule(law: Distribution, width: float = 12.0, nodes: int = 4801) -> tuple[Tensor, Tensor]:
    """Points (Q, *shape) and log weights of dx, so that Σ exp(log weight) f(x) = ∫ f dx."""
    if law.has_enumerate_support:
        support = law.enumerate_support()
        return support, torch.zeros_like(support)
    z = torch.linspace(-width, width, nodes, dtype=torch.float64)
    z = z.view(-1, *([1] * len(law.batch_shape)))
    std = law.variance.sqrt()
    log_step = (std * (2 * width / (nodes - 1))).log()
    return law.mean + std * z, log_step.expand(z.shape[0], *log_step.shape)


def integrate(law: Distribution, log_f: Callable[[Tensor], Tensor]) -> Tensor:
    """log E_law exp(log_f(x)), elementwise."""
    points, log_weight = rule(law)
    return (law.log_prob(points) + log_weight + log_f(points)).logsumexp(0)


def near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = float((actual - expected).abs().max())
    assert error <= tolerance, f"{what}: off by {error:.3g}"


# --- the laws ------------------------------------------------------------------------------------


def normalisation(case: Case) -> None:
    """Prior, marginal, transition and posterior sum to one."""
    process, x_0 = case.process, case.data
    torch.manual_seed(0)
    for s, t, _ in case.triples():
        x_s = process.marginal(x_0, s).sample()
        x_t = process.transition(x_s, s, t).sample()
        laws = {
            "prior": process.prior(x_0),
            "marginal": process.marginal(x_0, t),
            "transition": process.transition(x_s, s, t),
            "posterior": process.posterior(x_t, x_0, t, s),
        }
        for what, law in laws.items():
            mass = integrate(law, torch.zeros_like)
            near(mass, torch.zeros_like(mass), 1e-11, what)


def chapman_kolmogorov(case: Case) -> None:
    """∫ q(x_t|x_s) q(x_s|x_r) dx_s = q(x_t|x_r), pointwise."""
    torch.manual_seed(1)
    for r, s, t in case.triples():
        x_r = case.process.marginal(case.data, r).sample()
        first, direct = (case.process.transition(x_r, r, u) for u in (s, t))
        x_t = direct.sample()
        composed = integrate(first, then(case.process, x_t, s, t))
        near(composed, direct.log_prob(x_t), 1e-9, f"q(x_{float(t):.4g}|x_{float(r):.4g})")


def then(process: Process, x_t: Tensor, s: Tensor, t: Tensor) -> Callable[[Tensor], Tensor]:
    """x_s ↦ log q(x_t|x_s)."""
    return lambda x_s: process.transition(x_s, s, t).log_prob(x_t)


def before(
    process: Process, x_s: Tensor, x_0: Tensor, t: Tensor, s: Tensor
) -> Callable[[Tensor], Tensor]:
    """x_t ↦ log q(x_s|x_t, x_0)."""
    return lambda x_t: process.posterior(x_t, x_0, t, s).log_prob(x_s)


def any_subset(case: Case) -> None:
    """Along any subset of times, transitions lead from marginal to marginal, posteriors back."""
    process, x_0, times = case.process, case.data, case.times
    torch.manual_seed(2)
    for _ in range(4):
        kept = torch.randperm(len(times))[:3].sort().values
        for s, t in zip(times[kept[:-1]], times[kept[1:]], strict=True):
            here, there = process.marginal(x_0, s), process.marginal(x_0, t)
            x_s, x_t = here.sample(), there.sample()
            forward = integrate(here, then(process, x_t, s, t))
            near(forward, there.log_prob(x_t), 1e-9, "forward")
            back = integrate(there, before(process, x_s, x_0, t, s))
            near(back, here.log_prob(x_s), 1e-9, "backward")


def bayes(case: Case) -> None:
    """log q(x_t|x_s) = log q(x_s|x_t, x_0) + log q(x_t|x_0) − log q(x_s|x_0), pointwise."""
    process, x_0 = case.process, case.data
    torch.manual_seed(3)
    for r, s, t in case.triples():
        for early, late in ((r, s), (s, t), (r, t)):
            x_s = process.marginal(x_0, early).sample()
            x_t = process.transition(x_s, early, late).sample()
            posterior = process.posterior(x_t, x_0, late, early).log_prob(x_s)
            ratio = process.marginal(x_0, late).log_prob(x_t)
            ratio = ratio - process.marginal(x_0, early).log_prob(x_s)
            transition = process.transition(x_s, early, late).log_prob(x_t)
            near(posterior + ratio, transition, 1e-10, f"{float(early):.4g}, {float(late):.4g}")


def batch_of_times(case: Case) -> None:
    """A vector of times gives, row by row, what scalar times give."""
    process, x_0 = case.process, case.data
    torch.manual_seed(4)
    s, t = case.times[[0, 1]], case.times[[2, -1]]
    x_s, x_t = process.marginal(x_0, s).sample(), process.marginal(x_0, t).sample()
    for row in range(2):
        one = slice(row, row + 1)
        pairs = {
            "marginal": (process.marginal(x_0, t), process.marginal(x_0[one], t[row])),
            "transition": (
                process.transition(x_s, s, t),
                process.transition(x_s[one], s[row], t[row]),
            ),
            "posterior": (
                process.posterior(x_t, x_0, t, s),
                process.posterior(x_t[one], x_0[one], t[row], s[row]),
            ),
        }
        for what, (both, single) in pairs.items():
            near(both.log_prob(x_t)[one], single.log_prob(x_t[one]), 1e-12, what)


def posterior_limit(case: Case) -> None:
    """Towards data, q(x_s|x_t, x_0) closes on x_0, whatever x_t."""
    process = case.family(LogSNRLinear(60.0, -5.0))
    s, t = torch.tensor(0.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    x_t = process.prior(case.data).sample()
    posterior = process.posterior(x_t, case.data, t, s)
    near(posterior.mean, case.data, 1e-11, "mean")
    near(posterior.variance, torch.zeros_like(case.data), 1e-11, "variance")


def prior_limit(case: Case) -> None:
    """Towards noise, q(x_t|x_0) is the prior."""
    process = case.family(LogSNRLinear(5.0, -60.0))
    marginal = process.marginal(case.data, torch.tensor(1.0, dtype=torch.float64))
    divergence = kl_divergence(marginal, process.prior(case.data))
    near(divergence, torch.zeros_like(divergence), 1e-20, "KL to the prior")


def finite_gradients(case: Case) -> None:
    """Log-probabilities and divergences have finite gradients, in float32 and float64."""
    torch.manual_seed(5)
    for dtype in (torch.float32, torch.float64):
        for s, t, _ in case.triples():
            gradients_at(case, case.data.to(dtype), s, t)


def gradients_at(case: Case, x_0: Tensor, s: Tensor, t: Tensor) -> None:
    process = case.process
    other = process.marginal(x_0, t).sample().roll(1, 0)
    x_0 = x_0.clone().requires_grad_()
    x_t = process.marginal(x_0, t).sample().requires_grad_()
    x_s = process.marginal(x_0, s).sample()
    posterior = process.posterior(x_t, x_0, t, s)
    values = [
        process.marginal(x_0, t).log_prob(x_t),
        posterior.log_prob(x_s),
        kl_divergence(posterior, process.posterior(other, x_0.detach(), t, s)),
        kl_divergence(process.marginal(x_0, t), process.prior(x_0)),
    ]
    for value in values:
        gradients = torch.autograd.grad(
            value.sum(), [x_0, x_t], allow_unused=True, retain_graph=True
        )
        assert bool(value.isfinite().all()) and value.dtype == x_0.dtype
        assert all(g is None or bool(g.isfinite().all()) for g in gradients)


LAWS: list[Callable[[Case], None]] = [
    normalisation,
    chapman_kolmogorov,
    any_subset,
    bayes,
    batch_of_times,
    posterior_limit,
    prior_limit,
    finite_gradients,
]
