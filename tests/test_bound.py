"""The bound: golden values, exact models against theory, identities, single terms."""

from __future__ import annotations

import math

import pytest
import torch
from goldens import (
    BITS,
    assert_near,
    build,
    chain,
    check_bound,
    check_strided,
    load,
    schedule,
    terms,
)
from oracles import (
    Exact,
    GaussianData,
    MixtureData,
    assert_mean,
    at_logsnr,
    bound_at,
    chains,
    check_entropy,
    check_gaussian3,
    exact_model,
    expected_bound,
    gaussian_points,
    mixture_points,
    model_law,
    noise_points,
    ring,
    variants,
    z_limit,
)
from torch import Tensor

from nelbo.bound import bound, term, term_of
from nelbo.decoders import Constant, Edge, Following, Lose
from nelbo.reverse import Reverse
from nelbo.schedules import Cosine, Harmonic, LogSNRLinear, Schedule
from nelbo.variances import Posterior, Transition

DTYPES = [torch.float64, torch.float32]


# --- golden values -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_golden_bound(steps: int, dtype: torch.dtype) -> None:
    check_bound(f"bound_T{steps}", steps, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_strided(dtype: torch.dtype) -> None:
    check_strided(dtype)


def test_golden_gaussian3() -> None:
    check_gaussian3()


def test_golden_gaussian3_points() -> None:
    """The bound of single points x_0, in expectation over noise only."""
    golden = load("gaussian3")
    data = GaussianData(golden["mean"], golden["cov"])
    for steps in (4, 20, 200):
        for name, q in chains(steps).items():
            times = q.grid(steps)
            models = variants(data, q, times)
            for v, variant in enumerate(golden["point_variants"].tolist()):
                expected = golden[f"{name}_N{steps}/point_nelbo_nats"][v]
                for x_0, value in zip(torch.from_numpy(golden["points"]), expected, strict=True):
                    actual = expected_bound(models[variant], noise_points(x_0), times).total
                    assert_near(actual[0], value, 1e-9, 1e-12, f"{name} {steps} {variant}")


def test_golden_gaussian3_model_law() -> None:
    """p_θ(x_0) of the chain in closed form: the golden mean, covariance, and NLL ≤ bound."""
    golden = load("gaussian3")
    data = GaussianData(golden["mean"], golden["cov"])
    for steps in (4, 20, 200):
        for name, q in chains(steps).items():
            times, key = q.grid(steps), f"{name}_N{steps}/"
            for variant, model in variants(data, q, times).items():
                v = golden["variants"].tolist().index(variant)
                mean, cov = model_law(model, times, 3)
                assert_near(mean, golden[f"{key}model_mean"][v], 1e-9, 1e-12, f"{key}{variant}")
                assert_near(cov, golden[f"{key}model_cov"][v], 1e-9, 1e-12, f"{key}{variant}")
                difference = data.mean - mean
                square = torch.trace(torch.linalg.solve(cov, data.cov))
                square = square + difference @ torch.linalg.solve(cov, difference)
                nll = 0.5 * float(square + torch.logdet(2 * math.pi * cov))
                assert_near(nll, golden[f"{key}model_nll_nats"][v], 1e-9, 1e-12, "nll")
                total = float(expected_bound(model, gaussian_points(data), times).total)
                assert data.entropy() <= nll + 1e-12 <= total + 2e-12


# --- exact models against theory -----------------------------------------------------------------


@pytest.mark.parametrize("steps", [4, 20, 200])
def test_exact_kernels_give_the_entropy(steps: int) -> None:
    check_entropy(steps)


@pytest.mark.parametrize("steps", [4, 20, 200])
def test_exact_kernels_give_the_density_of_every_point(steps: int) -> None:
    """I16 pointwise: L(x_0) = −log q(x_0) + E_{q(x_N|x_0)} log[q(x_N)/π(x_N)]."""
    m, v = 0.5, 0.49
    data = GaussianData([m], [[v]])
    for name, q in chains(steps).items():
        times = q.grid(steps)
        model = exact_model(data, q, Exact())
        keep, lose = float(q.keep(times[-1])), float(q.lose(times[-1]))
        for x in (-1.0, 0.0, 0.5, 3.0):
            x_0 = torch.tensor([x], dtype=torch.float64)
            total = float(expected_bound(model, noise_points(x_0), times).total)
            variance = keep * v + lose
            prior = keep * x**2 + lose
            excess = prior - (keep * (x - m) ** 2 + lose) / variance - math.log(variance)
            truth = -float(data.log_density(x_0[None])) + 0.5 * excess
            assert abs(total - truth) < 1e-9, (name, x, total, truth)


def test_every_subset_is_a_bound_of_its_own_chain() -> None:
    """I17: exact kernels give the entropy on random subsets too, with original times."""
    data = GaussianData([0.5], [[0.49]])
    generator = torch.Generator().manual_seed(0)
    for q in (Cosine(100), Harmonic(100)):
        for count in (1, 2, 5, 30):
            kept = torch.randperm(100, generator=generator)[:count].sort().values.tolist()
            times = q.times(kept)
            model = exact_model(data, q, Exact())
            total = float(expected_bound(model, gaussian_points(data), times).total)
            truth = data.entropy() + data.prior_kl(float(q.keep(times[-1])))
            assert abs(total - truth) < 1e-10, (kept, total, truth)


@pytest.mark.parametrize(
    ("variance", "truth"), [("exact", 1.062573), ("β", 1.098951), ("β̃", 3.186402)]
)
def test_reference_values_of_a_gaussian(variance: str, truth: float) -> None:
    """N(.5, .49) at log-SNRs 4, 2, 0, −2, −6 exact mean and decoder; entropy 1.062264."""
    data = GaussianData([0.5], [[0.49]])
    q = at_logsnr([4, 2, 0, -2, -6])
    times = q.grid()
    edge = Constant(math.log(float(data.mmse(q.logsnr(times[0])))))
    rules = {"exact": Exact(), "β": Transition(), "β̃": Posterior()}
    model = exact_model(data, q, rules[variance], edge)
    total = float(expected_bound(model, gaussian_points(data), times).total)
    assert abs(total - truth) < 6e-7


def test_inserting_a_time_halves_by_the_mmse_curve() -> None:
    """I37: with σ² = β̃, u between s and t changes the bound by ½(snr_s − snr_u)(M_u − M_t)."""
    data = GaussianData([0.5, -1.0], [[0.49, 0.2], [0.2, 0.3]])
    q = LogSNRLinear(6.0, -6.0)
    coarse, fine = (
        torch.tensor(t, dtype=torch.float64) for t in ([0.0, 0.3, 1.0], [0.0, 0.3, 0.55, 1.0])
    )
    model = exact_model(data, q, Posterior(), Lose())
    a, b = (float(expected_bound(model, gaussian_points(data), t).total) for t in (coarse, fine))
    snr, mmse = q.logsnr(fine).exp(), data.mmse(q.logsnr(fine))
    change = 0.5 * float((snr[1] - snr[2]) * (mmse[2] - mmse[3]))
    assert abs((b - a) - change) < 1e-12 and change < 0


def brute_mmse(data: MixtureData, logsnr: float) -> float:
    """E Var(x_0|x_t) in one dimension by summing Bayes' rule over fine grids of x_0 and of x_t."""
    keep, lose = 1 / (1 + math.exp(-logsnr)), 1 / (1 + math.exp(logsnr))
    x_0 = torch.linspace(-4, 4, 2001, dtype=torch.float64)
    x_t = torch.linspace(-7, 7, 3001, dtype=torch.float64)[:, None]
    prior = data.log_density(x_0[:, None]).exp()
    joint = prior * torch.exp(-((x_t - math.sqrt(keep) * x_0) ** 2) / (2 * lose))
    mass = joint.sum(1)
    mean = (joint @ x_0) / mass.clamp(min=1e-300)
    spread = (joint @ x_0**2) / mass.clamp(min=1e-300) - mean**2
    return float((mass * spread).sum() / mass.sum())


def test_mixture_bound_follows_from_its_mmse_curve() -> None:
    """I46: L = prior + decoder + ½ Σ (snr_s − snr_t) M_t, M_t by brute force, in one dimension."""
    data = MixtureData([[-1.0], [0.4], [1.2]], 0.3, [0.2, 0.5, 0.3])
    q = at_logsnr([3.0, 1.5, 0.0, -1.5, -4.0])
    times = q.grid()
    model = exact_model(data, q, Posterior(), Lose())
    value = expected_bound(model, mixture_points(data, 60), times)
    snr = q.logsnr(times).exp()
    mmse = torch.tensor([brute_mmse(data, float(v)) for v in q.logsnr(times)], dtype=torch.float64)
    assert_near(value.diffusion[0], 0.5 * (snr[:-1] - snr[1:]) * mmse[1:], 1e-9, 0, "pairs")
    log_lose = math.log(float(q.lose(times[0])))
    decoder = 0.5 * (math.log(2 * math.pi) + log_lose + float(mmse[0]) * math.exp(-log_lose))
    assert_near(value.reconstruction[0], decoder, 1e-9, 0, "decoder")
    keep, second = float(q.keep(times[-1])), 0.09 + 0.2 + 0.5 * 0.16 + 0.3 * 1.44
    prior = 0.5 * (keep * (second - 1) - math.log(1 - keep))
    assert_near(value.prior[0], prior, 1e-9, 0, "prior")


def test_mixture_bound_closes_on_the_entropy_like_1_over_n() -> None:
    """σ² = β̃ with the exact decoder variance: the gap to H(q) halves when the grid doubles."""
    data = MixtureData([[-0.8], [0.8]], 0.3)
    entropy = mixture_entropy(data)
    gaps = []
    for steps in (75, 150, 300):
        q = LogSNRLinear(8.0, -10.0)
        model = exact_model(data, q, Posterior(), Constant(-8.0))
        total = float(expected_bound(model, mixture_points(data, 32), q.grid(steps)).total)
        gaps.append(total - entropy)
    assert gaps[2] > 0
    assert 1.9 < gaps[0] / gaps[1] < 2.2 and 1.9 < gaps[1] / gaps[2] < 2.1, gaps


def mixture_entropy(data: MixtureData) -> float:
    x = torch.linspace(-4, 4, 8001, dtype=torch.float64)[:, None]
    log_density = data.log_density(x)
    return float(-(log_density.exp() * log_density).sum() * 8 / 8000)


# --- mixtures in two dimensions, by Monte Carlo --------------------------------------------------


def ring_schedule(name: str, steps: int) -> Schedule:
    return Cosine(steps) if name == "cosine" else LogSNRLinear(10.0, -8.0)


def ring_model(variant: str, q: Schedule, times: Tensor, scale: float = 1.0) -> Reverse:
    """The exact model of the golden ring; `scale` ≠ 1 breaks its denoiser."""
    edge: Edge = Lose() if variant == "small_beta" else Following(times[1])
    variance = Transition() if variant == "large_copy" else Posterior()
    model = exact_model(ring(8, 1.0, 0.15), q, variance, edge)
    if scale != 1:
        exact = model.network
        model.network = Scaled(exact, scale)
    return model


class Scaled(torch.nn.Module):
    """A denoiser whose output is off by a factor."""

    def __init__(self, network: torch.nn.Module, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        return self.network(x_t, t, cond) * self.scale


def test_golden_ring_denoiser() -> None:
    golden = {k: torch.from_numpy(v) for k, v in load("mixture2d").items() if "denoiser" in k}
    data, keep = ring(8, 1.0, 0.15), golden["denoiser_abar"][:, None]
    x_0, spread = data.posterior(golden["denoiser_xt"], keep, 1 - keep)
    log_density, _ = data.log_marginal(golden["denoiser_xt"], keep, 1 - keep)
    assert_near(x_0, golden["denoiser_x0_hat"], 1e-9, 1e-9, "x0")
    assert_near(spread.sum(1), golden["denoiser_trace_cov"], 1e-9, 1e-9, "trace")
    assert_near(log_density, golden["denoiser_log_pt"], 1e-9, 1e-9, "log p")


@pytest.mark.parametrize("name", ["cosine", "logsnr"])
@pytest.mark.parametrize("steps", [4, 20, 200])
def test_golden_ring_bound(name: str, steps: int) -> None:
    """E L by Monte Carlo against quadrature; six comparisons, false alarms ≤ 1e-6 together."""
    golden, data = load("mixture2d"), ring(8, 1.0, 0.15)
    q = ring_schedule(name, steps)
    times, n = q.grid(steps), {4: 40_000, 20: 20_000, 200: 2_000}[steps]
    torch.manual_seed(steps)
    for variant in ("small_copy", "large_copy", "small_beta"):
        v = golden["variants"].tolist().index(variant)
        truth = float(golden[f"bound_{name}_N{steps}/total_nats"][v])
        values = bound(ring_model(variant, q, times), data.draw(n), times)
        assert_mean(values.total, truth, 6, f"{name} {steps} {variant}")
        assert_mean(values.prior, float(golden[f"bound_{name}_N{steps}/prior_nats"]), 6, "prior")


def test_the_ring_comparison_detects_a_denoiser_off_by_ten_percent() -> None:
    """The power of the comparison above: 10 % on x̂_0 lies far outside its limit."""
    truth = float(load("mixture2d")["bound_cosine_N20/total_nats"][2])
    q = Cosine(20)
    torch.manual_seed(0)
    model = ring_model("small_beta", q, q.grid(), scale=0.9)
    values = bound(model, ring(8, 1.0, 0.15).draw(20_000), q.grid()).total
    z = (float(values.mean()) - truth) / float(values.std() / math.sqrt(len(values)))
    assert z > 2 * z_limit(6)


# --- single terms --------------------------------------------------------------------------------


def test_index_vector_and_scalar_index_agree() -> None:
    """`term_of` over a mixed batch equals one call per index."""
    q = schedule("cosine", 10)
    c = chain(q, list(range(10)), torch.float64)
    model = build(q, "v", "learned_range", False, c.times)
    values, at = terms(model, c)
    for i in range(10):
        rows = (c.index == i).nonzero()[:, 0]
        single = model.at(c.x_t[rows], c.times[i])
        alone = term_of(single, c.x_0[rows], c.times, torch.tensor(i)) * BITS
        torch.testing.assert_close(alone, values[:, i], rtol=1e-12, atol=0)
    assert at.x_t.shape[0] == 40


def test_term_draws_what_bound_draws() -> None:
    """E term over noise is E of the bound's column: both against closed form (4 comparisons)."""
    data = GaussianData([0.5], [[0.49]])
    q = at_logsnr([3.0, 0.0, -3.0])
    times = q.grid()
    model = exact_model(data, q, Transition(), Lose())
    x_0 = torch.tensor([[1.2]], dtype=torch.float64)
    truth = bound_at(model, noise_points(x_0[0]), times)
    expected = torch.cat([truth.reconstruction.mean()[None], truth.diffusion.mean(0)])
    torch.manual_seed(0)
    n = 60_000
    index = torch.arange(3).repeat(n // 3)
    mixed = term(model, x_0.expand(n, 1), times, index)
    for i in range(3):
        assert_mean(mixed[index == i], float(expected[i]), 4, f"term {i}")
    total = bound(model, x_0.expand(n // 3, 1), times).total
    assert_mean(total, float(truth.total.mean()), 4, "total")


def test_bound_shapes_and_units() -> None:
    """(B,), (B, N−1), (B,) in float64, summed over dimensions: D copies cost D times one."""
    q = Cosine(7)
    one, many = (
        GaussianData([0.5], [[0.49]]),
        GaussianData([0.5] * 5, 0.49 * torch.eye(5, dtype=torch.float64)),
    )
    values = []
    for data in (one, many):
        model = exact_model(data, q, Posterior(), Lose())
        values.append(expected_bound(model, gaussian_points(data), q.grid()).total)
    torch.testing.assert_close(5 * values[0], values[1], rtol=1e-11, atol=0)
    model = exact_model(many, q, Posterior(), Lose())
    b = bound(model, torch.zeros(3, 5), q.grid())
    assert b.prior.shape == b.reconstruction.shape == b.total.shape == (3,)
    assert b.diffusion.shape == (3, 6)
    assert b.total.dtype == b.diffusion.dtype == torch.float64
    torch.testing.assert_close(b.total, b.prior + b.diffusion.sum(1) + b.reconstruction)
