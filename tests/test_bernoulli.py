"""Bernoulli diffusion: golden values, identities by enumeration, refusals, planted bugs."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from bernoulli_goldens import (
    CASES,
    all_bits,
    case,
    check_conditionals,
    check_fixed_edge,
    check_heartbeat,
    check_model,
    expected,
    heartbeat_model,
    heartbeats,
    log_likelihood,
    model_of,
)
from goldens import assert_near, load
from torch import Tensor, nn

from nelbo.binary import BernoulliDecoder, Context, Flip, Logits
from nelbo.bits import Bits
from nelbo.bound import bound, draw, prior_term
from nelbo.data.heartbeat import patterns
from nelbo.decoders import EdgeFixed
from nelbo.distributions import kl_divergence, per_example
from nelbo.objectives import Hybrid
from nelbo.processes.bernoulli import Bernoulli
from nelbo.processes.gaussian import Gaussian
from nelbo.recipes.patterns import PatternPosterior, expected_terms, number_of_states, states
from nelbo.reverse import Reverse
from nelbo.samplers import Ancestral, sample
from nelbo.schedules import Harmonic, Learned, Linear, LogSNRLinear, Schedule, Tabulated

KINDS = ("direct", "x0")


# --- golden values -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", CASES)
def test_golden_conditionals(number: int) -> None:
    check_conditionals(number)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", CASES)
def test_golden_model(number: int, kind: str) -> None:
    check_model(number, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", CASES)
def test_golden_fixed_edge(number: int, kind: str) -> None:
    check_fixed_edge(number, kind)


@pytest.mark.parametrize("name", list(heartbeats()))
def test_golden_heartbeat(name: str) -> None:
    check_heartbeat(name)


def test_golden_heartbeat_kernels() -> None:
    """The optimal reverse probabilities of all 64 latents of the small heartbeat."""
    golden, model, times = heartbeat_model("L6_p3_pi1over3_T5", BernoulliDecoder())
    x_t = torch.from_numpy(golden["patterns"]).double()
    for i, t in enumerate(times):
        law = model.decoder(x_t, t) if i == 0 else model.kernel(x_t, t, times[i - 1])
        assert_near(law.mean, golden["f_opt"][i], 1e-12, 1e-14, f"f {i}")


def test_states_stand_for_all_latents() -> None:
    """Their numbers add up to 2^length, also where the period does not divide the length."""
    for length, period in ((20, 5), (7, 3), (6, 6), (9, 2)):
        for here in states(length, period):
            assert float(here.log_count.exp().sum()) == pytest.approx(2**length, rel=1e-12)
        found = sum(len(here.latents) for here in states(length, period))
        assert found == number_of_states(length, period)


def test_expected_terms_are_sums_over_all_latents() -> None:
    """Period 3 in length 7: classes of two sizes, against the sum over all 128 latents."""
    process = Bernoulli(Tabulated([0.2, 0.3, 0.9]), 0.4)
    times, known = process.schedule.grid(3), patterns(7, 3)
    model = Reverse(process, PatternPosterior(known, process), Logits(), BernoulliDecoder())
    terms = expected(model, known.double(), times).mean(0)
    actual = expected_terms(model, 7, 3, times)
    torch.testing.assert_close(actual[1:], terms, rtol=1e-12, atol=1e-14)
    prior = prior_term(model, known.double(), times).mean()
    torch.testing.assert_close(actual[0], prior, rtol=1e-12, atol=1e-14)


# --- identities ----------------------------------------------------------------------------------


def test_detailed_balance() -> None:
    """π(x_0) q(x_1|x_0) = π(x_1) T(x_0|x_1): the fixed edge step is normalised and reversible."""
    x = all_bits(2)
    for rate in (0.5, 0.2, torch.tensor([0.1, 0.7], dtype=torch.float64)):
        process = Bernoulli(LogSNRLinear(4.0, -4.0), rate)
        model = Reverse(process, nn.Identity(), Logits(), EdgeFixed())
        model.network.forward = lambda x_t, t, cond: x_t  # type: ignore[method-assign,assignment]
        x_0, x_1 = x.repeat_interleave(4, 0), x.repeat(4, 1)
        for t in (0.0, 0.4, 1.0):
            time = torch.tensor(t, dtype=torch.float64)
            forth = process.marginal(x_0, time).log_prob(x_1)
            back = model.decoder(x_1, time).log_prob(x_0)
            prior = process.prior(x)
            left = prior.log_prob(x).repeat_interleave(4, 0) + forth
            right = prior.log_prob(x).repeat(4, 1) + back
            torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-14)


def single_bits(rates: Tensor, schedule: Schedule, stationary: float) -> Reverse:
    """The exact reverse model of independent bits of given rates: `Context` with their logit."""

    class Constant(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
            return (rates / (1 - rates)).log().expand_as(x_t)

    return Reverse(Bernoulli(schedule, stationary), Constant(), Context(), BernoulliDecoder())


RATES = torch.tensor([0.1, 0.5, 0.93], dtype=torch.float64)
GRIDS: list[tuple[Schedule, int]] = [
    (Tabulated([0.1, 0.2, 0.5]), 3),
    (Harmonic(5), 5),
    (LogSNRLinear(6.0, -6.0), 2),
    (Linear(40, 1e-3, 0.2), 40),
]


@pytest.mark.parametrize(("schedule", "steps"), GRIDS)
def test_exact_kernels_of_independent_bits(schedule: Schedule, steps: int) -> None:
    """I16: E L = H(q) + KL(q(x_N)‖π) on every grid, and on any subset of it (I17)."""
    x_0 = all_bits(3)
    weight = per_example(x_0 * RATES.log() + (1 - x_0) * (1 - RATES).log()).exp()
    entropy = float(per_example(Bits((RATES / (1 - RATES)).log()[None]).entropy()))
    model = single_bits(RATES, schedule, 0.3)
    grid = schedule.grid(steps)
    for times in (grid, grid[1:], grid[[0, -1]]):
        terms = expected(model, x_0, times)
        total = float((weight * (prior_term(model, x_0, times) + terms.sum(1))).sum())
        keep, lose = schedule.keep(times[-1]), schedule.lose(times[-1])
        last = keep * RATES + lose * 0.3
        law = Bits((last / (1 - last)).log()[None])
        excess = float(per_example(kl_divergence(law, model.process.prior(law.logits))))
        assert total == pytest.approx(entropy + excess, abs=1e-12)


def test_the_bound_of_a_subset_bounds_its_own_chain() -> None:
    """I17 with a network that is not exact: L ≥ −log p_θ for the model of the kept times."""
    golden, process, times = case(1)
    x_0 = all_bits(3)
    model = model_of("x0", process, times)
    for kept in ([0, 1, 2, 3], [0, 2, 3], [1, 3], [3]):
        some = times[kept]
        total = prior_term(model, x_0, some) + expected(model, x_0, some).sum(1)
        gap = total + log_likelihood(model, x_0, some)
        assert float(gap.min()) > -1e-12
        assert float(log_likelihood(model, x_0, some).exp().sum()) == pytest.approx(1, abs=1e-12)


def uniform_matrix(beta: float) -> Tensor:
    """Q = (1 − β) I + β 11ᵀ/2, uniform categorical diffusion with two classes."""
    eye = torch.eye(2, dtype=torch.float64)
    return (1 - beta) * eye + beta * torch.full((2, 2), 0.5, dtype=torch.float64)


def test_a_rate_of_one_half_is_uniform_categorical_diffusion() -> None:
    """Marginals and posteriors from matrix products and Bayes' rule, for every pair of times."""
    betas = [0.05, 0.2, 0.4, 0.7, 1.0]
    process = Bernoulli(Tabulated(betas), 0.5)
    times = process.schedule.grid(5)
    bits = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    steps = [uniform_matrix(b) for b in betas]
    products = [torch.eye(2, dtype=torch.float64)]
    for step in steps:
        products.append(products[-1] @ step)
    for j, t in enumerate(times):
        near(process.marginal(bits, t).mean[0], products[j + 1][:, 1])
        for i, s in enumerate(times[:j]):
            jump = torch.eye(2, dtype=torch.float64)
            for step in steps[i + 1 : j + 1]:
                jump = jump @ step
            near(process.transition(bits, s, t).mean[0], jump[:, 1])
            for c in (0, 1):
                joint = products[i + 1] * jump[:, c]  # rows x_0, columns x_s
                law = process.posterior(torch.full_like(bits, c), bits, t, s)
                near(law.mean[0], joint[:, 1] / joint.sum(1))


def near(actual: Tensor, expected_value: Tensor) -> None:
    torch.testing.assert_close(actual, expected_value, rtol=1e-13, atol=1e-15)


def test_rates_per_dimension_are_single_processes_side_by_side() -> None:
    schedule = Tabulated([0.2, 0.3, 0.4])
    rates = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    together = Bernoulli(schedule, rates)
    s, t = schedule.grid(3)[[0, 2]]
    x_0, x_t = all_bits(3), all_bits(3).flip(0)
    both = together.posterior(x_t, x_0, t, s).logits
    for j in range(3):
        single = Bernoulli(schedule, float(rates[j]))
        one = slice(j, j + 1)
        near(both[:, one], single.posterior(x_t[:, one], x_0[:, one], t, s).logits)


def test_posterior_keeps_its_digits_for_tiny_steps() -> None:
    """λ = 60 and 30: masses of 1e-26 next to the data, read off the logits."""
    process = Bernoulli(LogSNRLinear(60.0, 30.0), 0.2)
    s, t = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    bit = torch.ones(1, 1, dtype=torch.float64)
    law = process.posterior(bit, bit, t, s)
    lost = math.exp(-60) * 0.8 / (1 + math.exp(-60))
    # 1 − q(x_s=1|1, 1) = (1−u) ℓ_0/q(x_t|x_0), ℓ_0 = βπ
    beta = float(process.schedule.lose(t)) * -math.expm1(-30)
    assert float(torch.sigmoid(-law.logits)) == pytest.approx(lost * beta * 0.2, rel=1e-9, abs=0)


@pytest.mark.parametrize("stationary", [0.5, 0.2])
def test_the_limit_of_fine_grids_is_the_integral_of_continuous_time(stationary: float) -> None:
    """I38: pairs → ∫ −(log k)′ E π(x_i)[ρ log(ρ/ρ̂) − ρ + ρ̂] dt, for a ŵ that is not optimal."""
    schedule, x_0 = LogSNRLinear(3.0, -3.0), torch.ones(1, 1, dtype=torch.float64)
    process = Bernoulli(schedule, stationary)

    class Guess(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
            return 0.7 * x_t - 0.2 + 0.3 * t.reshape(-1, 1).to(x_t)

    model = Reverse(process, Guess(), Logits(), BernoulliDecoder())

    def pairs(count: int) -> float:
        times = schedule.grid(count + 1)
        s, t = times[:-1], times[1:]
        total = 0.0
        for c in (0.0, 1.0):
            x_t = torch.full((count, 1), c, dtype=torch.float64)
            at, clean = model.at(x_t, t), x_0.expand(count, 1)
            kl = kl_divergence(process.posterior(x_t, clean, t, s), at.kernel(s))
            weight = process.marginal(clean, t).log_prob(x_t).exp()
            total += float((weight * kl).sum())
        return total

    refined = 2 * pairs(4000) - pairs(2000)
    assert refined == pytest.approx(continuous(schedule, stationary), rel=3e-6)


def continuous(schedule: Schedule, stationary: float, nodes: int = 20001) -> float:
    """The integral for x_0 = 1 by Simpson's rule."""
    t = torch.linspace(0, 1, nodes, dtype=torch.float64)
    keep, lose = schedule.keep(t), schedule.lose(t)
    rate = lose * 6.0  # −d log k/dt = l·(−λ′), λ′ = −6
    total = torch.zeros_like(t)
    for c in (0.0, 1.0):
        w = torch.sigmoid(0.7 * torch.full_like(t, c) - 0.2 + 0.3 * t)
        one = keep + lose * stationary
        zero = lose * stationary
        here = (one, zero) if c == 1 else (1 - one, 1 - zero)
        rho = (1 - here[0]) / here[0], (1 - here[1]) / here[1]
        guess = w * rho[0] + (1 - w) * rho[1]
        of_value = stationary if c == 1 else 1 - stationary
        density = of_value * (rho[0] * (rho[0] / guess).log() - rho[0] + guess)
        total = total + rate * here[0] * density
    weight = torch.ones(nodes, dtype=torch.float64)
    weight[1:-1:2], weight[2:-1:2] = 4, 2
    return float((weight * total).sum() / (3 * (nodes - 1)))


# --- parameterisations ---------------------------------------------------------------------------


def test_flip_and_logits_of_the_same_kernels_agree() -> None:
    """x̂_0 of the flips that stand for a mixture is the mixture's own w, at every time."""
    _, process, times = case(1)
    logits, x_t = model_of("x0", process, times), all_bits(3)

    class Same(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: object = None) -> Tensor:
            i = int((t * 4).round()) - 1
            at = logits.at(x, t)
            law = at.decoder() if i == 0 else at.kernel(times[i - 1])
            return torch.where(x > 0.5, -law.logits, law.logits)

    flips = Reverse(process, Same(), Flip(times), BernoulliDecoder())
    for t in times:
        expected_value = logits.predict(x_t, t)
        torch.testing.assert_close(flips.predict(x_t, t), expected_value, rtol=1e-9, atol=0)


def test_flip_gives_the_probability_of_a_flip() -> None:
    _, process, times = case(0)
    model, x_t = model_of("direct", process, times), all_bits(3)
    at = model.at(x_t, times[2])
    flip = torch.sigmoid(at.output)
    expected_value = x_t * (1 - flip) + (1 - x_t) * flip
    torch.testing.assert_close(at.kernel(times[1]).mean, expected_value)


def test_context_is_logits_with_the_evidence_added() -> None:
    process = Bernoulli(LogSNRLinear(4.0, -4.0), 0.3)
    x_t, t = all_bits(2), torch.tensor(0.3, dtype=torch.float64)
    rates = torch.tensor([0.2, 0.6], dtype=torch.float64)
    w = single_bits(rates, LogSNRLinear(4.0, -4.0), 0.3).predict(x_t, t)
    ones, zeros = (process.marginal(torch.full_like(x_t, c), t) for c in (1, 0))
    joint = rates * ones.log_prob(x_t).exp(), (1 - rates) * zeros.log_prob(x_t).exp()
    torch.testing.assert_close(w, joint[0] / (joint[0] + joint[1]))


class Zeros(nn.Module):
    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return torch.zeros_like(x_t)


def refusals() -> dict[str, Callable[[], object]]:
    schedule = Tabulated([0.1, 0.2, 0.3])
    times, x = schedule.grid(3), all_bits(2)
    process = Bernoulli(schedule, 0.5)
    flips = Reverse(process, Zeros(), Flip(times), BernoulliDecoder())
    logits = Reverse(process, Zeros(), Logits(), BernoulliDecoder())
    gaussian = Reverse(Gaussian(schedule), Zeros(), Logits(), BernoulliDecoder())
    learned = Reverse(Bernoulli(Learned(schedule), 0.5), Zeros(), Logits(), BernoulliDecoder())
    return {
        "inside \\(0, 1\\)": lambda: Bernoulli(schedule, 1.0),
        "Logits, which serves": lambda: flips.kernel(x, times[2], times[0]),
        "first time": lambda: flips.decoder(x, times[1]),
        "Bernoulli process": lambda: gaussian.kernel(x, times[1], times[0]),
        "Vlb instead of Hybrid": lambda: Hybrid(times)(logits, x),
        "a fixed schedule": lambda: draw(learned, x, times[1]),
        "predicted noise": lambda: logits.at(x, times[1]).noise(),
    }


@pytest.mark.parametrize("message", list(refusals()))
def test_refusals_say_what_to_do(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refusals()[message]()


# --- the family-free parts -----------------------------------------------------------------------


def test_bound_draws_agree_with_enumeration() -> None:
    """4096 draws of every term: |z| < 5.5 for 16 means fails by chance at a rate of 1e-6."""
    golden, process, times = case(1)
    model = model_of("x0", process, times)
    torch.manual_seed(0)
    for pattern in (1, 6):
        x_0 = all_bits(3)[pattern].expand(4096, 3)
        found = bound(model, x_0, times)
        terms = torch.cat([found.reconstruction[:, None], found.diffusion], 1) / math.log(2)
        stored = torch.from_numpy(golden["x0_expected_term_bits"][pattern])
        error = terms.std(0) / 64
        assert bool(((terms.mean(0) - stored).abs() < 5.5 * error + 1e-12).all())


def test_ancestral_samples_follow_the_model() -> None:
    """Frequencies of the 8 patterns: |z| < 5.5 for 8 of them fails at a rate of 3e-7."""
    _, process, times = case(1)
    model = model_of("direct", process, times)
    torch.manual_seed(0)
    n = 40_000
    *_, (_, x_0) = sample(model.float(), Ancestral(), times, (n, 3))
    assert bool(((x_0 == 0) | (x_0 == 1)).all()) and x_0.dtype == torch.float32
    code = (x_0.long() * torch.tensor([1, 2, 4])).sum(1)
    p = torch.from_numpy(load("bernoulli")["case1/direct_log2_px0"]).mul(math.log(2)).exp()
    z = (torch.bincount(code, minlength=8) / n - p) / (p * (1 - p) / n).sqrt()
    assert float(z.abs().max()) < 5.5


# --- planted bugs --------------------------------------------------------------------------------


def rate_of_zero_forgotten(patch: pytest.MonkeyPatch) -> None:
    """1 − π is taken for π in the likelihood of a zero."""
    right = Bernoulli._rates
    patch.setattr(Bernoulli, "_rates", lambda p, x: (right(p, x)[0], right(p, x)[0]))


def plain_mixture_of_data(patch: pytest.MonkeyPatch) -> None:
    """The kernel is the posterior at the mean of x_0, not the mean of the posteriors."""

    def kernel(p: Logits, at: object, s: Tensor) -> Bits:
        process = at.model.process  # type: ignore[attr-defined]
        return process.posterior(at.x_t, p.x_0(at), at.t, s)  # type: ignore[attr-defined]

    patch.setattr(Logits, "kernel", kernel)


def flips_the_wrong_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Flip, "_logits", lambda p, at: torch.where(at.x_t > 0.5, at.output, -at.output))


def divergence_the_wrong_way(patch: pytest.MonkeyPatch) -> None:
    from torch.distributions import kl as registry

    right = registry._KL_REGISTRY[Bits, Bits]
    patch.setitem(registry._KL_REGISTRY, (Bits, Bits), lambda p, q: right(q, p))
    patch.setitem(registry._KL_MEMOIZE, (Bits, Bits), lambda p, q: right(q, p))


def edge_without_prior_ratio(patch: pytest.MonkeyPatch) -> None:
    """x_1 itself is the decoder's rate."""

    def distribution(d: EdgeFixed, at: object) -> Bits:
        law = at.model.process.marginal(at.x_t, at.t)  # type: ignore[attr-defined]
        return Bits(law.logits + 0.05)

    patch.setattr(EdgeFixed, "distribution", distribution)


def entropy_in_bits(patch: pytest.MonkeyPatch) -> None:
    right = Bits.entropy
    patch.setattr(Bits, "entropy", lambda law: right(law) / math.log(2))


def forgetful_posterior(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Bernoulli, "posterior", lambda p, x_t, x_0, t, s: p.marginal(x_0, s))


def model_1() -> None:
    check_model(1, "x0")


def flips_1() -> None:
    check_model(1, "direct")


def edge_1() -> None:
    check_fixed_edge(1, "x0")


def conditionals_1() -> None:
    check_conditionals(1)


def small_heartbeat() -> None:
    check_heartbeat("L6_p3_pi1over3_T5")


PLANTED: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = [
    (rate_of_zero_forgotten, conditionals_1),
    (rate_of_zero_forgotten, model_1),
    (plain_mixture_of_data, model_1),
    (plain_mixture_of_data, small_heartbeat),
    (flips_the_wrong_way, flips_1),
    (divergence_the_wrong_way, model_1),
    (divergence_the_wrong_way, flips_1),
    (edge_without_prior_ratio, edge_1),
    (edge_without_prior_ratio, small_heartbeat),
    (entropy_in_bits, conditionals_1),
    (entropy_in_bits, small_heartbeat),
    (forgetful_posterior, conditionals_1),
    (forgetful_posterior, model_1),
]


@pytest.mark.parametrize(("plant", "check"), PLANTED, ids=lambda f: f.__name__)
def test_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
