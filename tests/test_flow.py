"""The probability flow: densities against closed forms, row by row, exact and probed traces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from goldens import load
from oracles import ExactDenoiser, GaussianData, MixtureData, exact_model, ring, z_limit
from torch import Tensor, nn

from nelbo.decoders import Density
from nelbo.errors import InputRefused
from nelbo.flow import Flow, exact_trace, probed_trace
from nelbo.networks.mlp import MLP
from nelbo.parameterizations import X0, Epsilon, Mean, Velocity
from nelbo.processes.bernoulli import Bernoulli
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.schedules import Cosine, Harmonic, Linear, LogSNRLinear, Stepped
from nelbo.spacing import Interpolated
from nelbo.variances import Posterior

RING = ring(8, 1.0, 0.15)


def ring_flow(logsnr_min: float = -26.0, tolerance: float = 1e-7) -> Flow:
    q = LogSNRLinear(14.0, logsnr_min)
    return Flow.of(exact_model(RING, q, Posterior()), tolerance)


def random_flow(dims: int, tolerance: float = 1e-5) -> Flow:
    """A small network with random weights in float64: not a denoiser of anything."""
    torch.manual_seed(0)
    network = MLP(dims, width=16, depth=2).double().eval()
    nn.init.normal_(network.last.weight, std=0.3)
    process = Gaussian(LogSNRLinear(6.0, -4.0))
    return Flow.of(Reverse(process, network, Velocity(), Density()), tolerance)


# --- against the truth ---------------------------------------------------------------------------


def golden_error() -> float:
    """max |log p − golden| of twelve points of ring 1, each from a noise level of its own."""
    golden = {k: torch.from_numpy(v) for k, v in load("mixture2d").items() if "denoiser" in k}
    keep = golden["denoiser_abar"]
    start = (keep / (1 - keep)).log()
    value, _ = ring_flow().log_density(golden["denoiser_xt"], start, -26.0)
    return float((value[:, 0] - golden["denoiser_log_pt"]).abs().max())


def test_the_golden_density_of_a_mixture() -> None:
    """λ_N = −26 and tolerance 1e-7: below 3e-6 nats."""
    assert golden_error() < 3e-6


def test_the_mismatch_with_the_prior_is_seen() -> None:
    """A ring around (1, 0): λ_N = −12 costs 2e-3 nats, −26 4e-6: √k_N times mean and x."""
    centre = torch.tensor([1.0, 0.0], dtype=torch.float64)
    data = MixtureData(RING.means + centre, 0.15)
    x = torch.tensor([[1.9, 0.1], [1.3, -1.1], [1.0, 0.0]], dtype=torch.float64)
    keep = torch.sigmoid(torch.tensor(14.0, dtype=torch.float64))
    truth = data.log_marginal(keep.sqrt() * x, keep, 1 - keep)[0]
    errors = []
    for end in (-12.0, -26.0):
        flow = Flow.of(exact_model(data, LogSNRLinear(14.0, end), Posterior()), 1e-7)
        value, _ = flow.log_density(keep.sqrt() * x, torch.tensor(14.0), end)
        errors.append(float((value[:, 0] - truth).abs().max()))
    assert errors[1] < 1e-5 and 1e-3 < errors[0] < 1e-2, errors


@pytest.mark.parametrize("end", [-1.0, -8.0])
def test_a_gaussian_model_whose_likelihood_is_known(end: float) -> None:
    """The flow is affine along each axis, so log p is exact whatever the mismatch at λ_N."""
    mean, variance = torch.tensor([0.5, -1.0, 0.1]), torch.tensor([0.49, 2.0, 0.01])
    mean, variance = mean.double(), variance.double()
    q = LogSNRLinear(7.0, end)
    flow = Flow.of(exact_model(GaussianData(mean, torch.diag(variance)), q, Posterior()), 1e-9)
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, _ = flow.log_density(x, torch.tensor(7.0), end)
    (k_1, k_n), (l_1, l_n) = q.keep(q.grid(2)), q.lose(q.grid(2))
    scale = ((k_n * variance + l_n) / (k_1 * variance + l_1)).sqrt()
    last = k_n.sqrt() * mean + scale * (x - k_1.sqrt() * mean)
    truth = torch.distributions.Normal(0, 1).log_prob(last).sum(1) + scale.log().sum()
    torch.testing.assert_close(value[:, 0], truth, rtol=0, atol=1e-6)


def test_the_parameterisation_does_not_matter() -> None:
    """ε̂ and v̂ of the same denoiser: the same density."""
    q = LogSNRLinear(6.0, -10.0)

    class Converted(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind
            self.inner = ExactDenoiser(RING, q, None)

        def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
            keep, lose = q.keep(t)[:, None].sqrt(), q.lose(t)[:, None].sqrt()
            noise = (x_t - keep * self.inner(x_t, t)) / lose
            return noise if self.kind == "epsilon" else (keep * x_t - self.inner(x_t, t)) / lose

    x = torch.tensor([[0.9, 0.1], [0.3, -1.1]], dtype=torch.float64)
    models = [exact_model(RING, q, Posterior())]
    models.append(Reverse(Gaussian(q), Converted("epsilon"), Epsilon(), Density()))
    models.append(Reverse(Gaussian(q), Converted("velocity"), Velocity(), Density()))
    values = [Flow.of(m, 1e-8).log_density(x, torch.tensor(6.0), -10.0)[0] for m in models]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("chain", [Linear(200), Cosine(100)])
def test_a_chain_is_read_between_its_steps(chain: Stepped) -> None:
    """The exact denoiser at fractional times of a chain: its density at the first step."""
    bridge = Interpolated(chain)
    model = exact_model(RING, chain, Posterior())
    model.network = ExactDenoiser(RING, bridge, None)
    flow = Flow.of(model, 1e-8)
    x = torch.tensor([[0.9, 0.1], [0.3, -1.1]], dtype=torch.float64)
    ends = chain.logsnrs[[0, -1]]
    value, _ = flow.log_density(x, ends[0], ends[1])
    keep, lose = torch.sigmoid(ends[0]), torch.sigmoid(-ends[0])
    truth = RING.log_marginal(x, keep, lose)[0]
    # what the chain has left of the data at its end is the mismatch with the prior
    slack = 4 * math.sqrt(float(torch.sigmoid(ends[1]))) + 1e-5
    assert float((value[:, 0] - truth).abs().max()) < slack


# --- rows ----------------------------------------------------------------------------------------


def test_an_example_does_not_know_its_companions() -> None:
    """Alone and in a batch with a hard one: the same value (1e-12) and evaluations."""
    flow = random_flow(4)
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[3] *= 1e-3  # where the network normalises almost nothing, and is rough
    start = torch.tensor(6.0)
    together, done = flow.log_density(x, start, -4.0)
    for k in range(5):
        alone, single = flow.log_density(x[k : k + 1], start, -4.0)
        torch.testing.assert_close(alone[0], together[k], rtol=1e-12, atol=1e-12)
        assert int(single.evaluations[0]) == int(done.evaluations[k])
    assert int(done.evaluations[3]) > int(done.evaluations[0])


def test_the_network_is_asked_as_often_as_is_counted() -> None:
    flow, rows = random_flow(3), 0

    def count(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal rows
        assert arguments[1].shape == (len(arguments[0]),)
        rows += len(arguments[0])

    flow.model.network.register_forward_pre_hook(count)
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    _, done = flow.log_density(x, torch.tensor(6.0), -4.0)
    assert rows == int(done.evaluations.sum())


def test_a_float32_network_is_followed_in_float64() -> None:
    exact, rounded = random_flow(3), random_flow(3)
    rounded.model.network.float()
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    a, b = (f.log_density(x, torch.tensor(6.0), -4.0)[0] for f in (exact, rounded))
    assert b.dtype == torch.float64
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


# --- traces --------------------------------------------------------------------------------------


def jacobian_of(flow: Flow, x: Tensor, logsnr: Tensor) -> Tensor:
    """(B, d, d) of x̂_0."""
    t = (logsnr - 6.0) / -10.0
    found = torch.autograd.functional.jacobian(lambda z: flow.at(z, t).x_0, x)
    return torch.stack([found[b, :, b] for b in range(len(x))])


@pytest.mark.parametrize("dims", [1, 5, 37])
def test_the_exact_trace(dims: int) -> None:
    """Against the whole Jacobian; 37 dimensions take several chunks."""
    flow = random_flow(dims)
    x = torch.randn(3, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    logsnr = torch.tensor([5.0, 1.0, -2.0], dtype=torch.float64)
    truth = jacobian_of(flow, x, logsnr).diagonal(dim1=1, dim2=2).sum(1)
    x.requires_grad_()
    trace = exact_trace(flow.at(x, (logsnr - 6.0) / -10.0).x_0, x)
    torch.testing.assert_close(trace[:, 0], truth)


def test_the_variance_of_a_probe() -> None:
    """2(‖S‖² − ΣS_ii²) of zᵀJz over all 2^6 sign patterns, exactly; their mean is tr J."""
    flow, dims = random_flow(6), 6
    x = torch.randn(2, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    logsnr = torch.tensor([1.0, 4.0], dtype=torch.float64)
    full = jacobian_of(flow, x, logsnr)
    x.requires_grad_()
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=dims)), dtype=torch.float64)
    values = probed_trace(flow.at(x, (logsnr - 6.0) / -10.0).x_0, x, signs.expand(2, -1, -1))
    symmetric = 0.5 * (full + full.mT)
    off = symmetric - torch.diag_embed(symmetric.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(values.mean(1), full.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(values.var(1, correction=0), 2 * (off**2).sum((1, 2)))


def test_all_probes_together_are_the_exact_trace() -> None:
    """Along one path the average over all sign patterns is the exact divergence: no bias."""
    flow = random_flow(3, 1e-7)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    exact, _ = flow.log_density(x, torch.tensor(6.0), -4.0)
    probed, _ = flow.log_density(x, torch.tensor(6.0), -4.0, signs.expand(2, -1, -1))
    torch.testing.assert_close(probed.mean(1), exact[:, 0], rtol=0, atol=1e-5)
    assert float(probed.std(1).min()) > 1e-3


def test_random_probes_are_unbiased_along_the_path() -> None:
    """400 examples with two probes each against their exact values, |z| within 1e-6."""
    flow = random_flow(4, 1e-4)
    g = torch.Generator().manual_seed(7)
    x = torch.randn(400, 4, dtype=torch.float64, generator=g)
    probes = (2 * torch.randint(2, (400, 2, 4), generator=g) - 1).double()
    exact, _ = flow.log_density(x, torch.tensor(6.0), -4.0)
    probed, _ = flow.log_density(x, torch.tensor(6.0), -4.0, probes)
    error = (probed - exact).mean(1)
    assert abs(float(error.mean() / error.std() * 20)) < z_limit(1)
    inside = probed.var(1).mean()  # the variance within a pair is that of the error, twice
    assert float(inside / (2 * error.var())) == pytest.approx(1.0, abs=0.5)


# --- what has no flow ----------------------------------------------------------------------------


def test_models_without_a_flow_are_refused() -> None:
    q = Cosine(20)
    model = exact_model(RING, q, Posterior())
    bits = Reverse(Bernoulli(q), model.network, model.parameterization, model.decoder_rule)
    means = Reverse(Gaussian(q), model.network, Mean(q.grid()), Density())
    erased = Reverse(Gaussian(Harmonic(20)), model.network, X0(), Density())
    for refused, words in ((bits, "Bernoulli"), (means, "chain only"), (erased, "erases")):
        with pytest.raises(InputRefused, match=words):
            Flow.of(refused)


# --- planted errors ------------------------------------------------------------------------------

Slopes = Callable[[Flow, Tensor, Tensor, Tensor | None], Tensor]


@pytest.mark.parametrize("kind", ["sign", "half", "dims", "direction"])
def test_planted_errors_miss_the_golden_density(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Slopes = Flow._slopes
    factors = {
        "sign": (1.0, -1.0),
        "half": (1.0, 2.0),
        "dims": (1.0, 0.5),
        "direction": (-1.0, 1.0),
    }

    def wrong(self: Flow, x: Tensor, logsnr: Tensor, probes: Tensor | None) -> Tensor:
        slopes = right(self, x, logsnr, probes)
        moved, volume = factors[kind]
        return torch.cat([moved * slopes[:, :2], volume * slopes[:, 2:]], 1)

    monkeypatch.setattr(Flow, "_slopes", wrong)
    assert golden_error() > 1e-2
