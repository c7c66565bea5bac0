"""The stored Bernoulli chains of tests/golden/bernoulli.npz and heartbeat.npz, and their checks.

tests/golden/README.md defines every array. The chains are small enough for every latent to be
summed over, so that expectations are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from goldens import assert_near, load
from torch import Tensor, nn

from nelbo.binary import BernoulliDecoder, Flip, Logits
from nelbo.bits import Bits
from nelbo.bound import prior_term, term_of
from nelbo.decoders import EdgeFixed
from nelbo.distributions import per_example
from nelbo.entropy import entropy_form
from nelbo.processes.base import Process
from nelbo.processes.bernoulli import Bernoulli
from nelbo.recipes.patterns import PatternPosterior, expected_terms, patterns
from nelbo.reverse import Decoder, Reverse
from nelbo.schedules import Harmonic, Tabulated

BIT = 1 / math.log(2)
CASES = range(4)


def all_bits(n: int) -> Tensor:
    """(2ⁿ, n) float64: bit j of the row's number."""
    rows = torch.arange(2**n)[:, None] >> torch.arange(n)
    return (rows & 1).double()


def direct(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The logit of f, the stored model `direct`."""
    return 1.5 * (x - 0.5) + 0.4 * torch.sin(i) + 0.3 * x.mean(1, keepdim=True) - 0.2 * j


def denoising(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The logit of m, the stored model `x0`."""
    return 2.0 * x - 0.9 + 0.25 * torch.cos(i) - 0.5 * x.mean(1, keepdim=True) + 0.1 * j


class ClosedForm(nn.Module):
    """A network of (x, i), i = round(t T) − 1; of the flip where the kernel is what is stored."""

    def __init__(self, kind: str, steps: int) -> None:
        super().__init__()
        self.kind = kind
        self.steps = steps

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        i = ((t * self.steps).round() - 1).reshape(-1, 1)
        j = torch.arange(x.shape[1], dtype=x.dtype)
        if self.kind == "x0":
            return denoising(x, i, j)
        return direct(x, i, j) * (1 - 2 * x)


def case(number: int) -> tuple[dict[str, Any], Bernoulli, Tensor]:
    """Arrays, process and times of one case."""
    prefix = f"case{number}/"
    golden = {k.removeprefix(prefix): v for k, v in load("bernoulli").items() if prefix in k}
    betas = [float(b) if "/" not in str(b) else _ratio(str(b)) for b in golden["betas"]]
    schedule = Tabulated(betas)
    return golden, Bernoulli(schedule, float(golden["pi"])), schedule.grid()


def _ratio(text: str) -> float:
    above, below = text.split("/")
    return float(above) / float(below)


def model_of(
    kind: str, process: Bernoulli, times: Tensor, decoder: Decoder | None = None
) -> Reverse:
    """The stored reverse chain `direct` (as flips) or `x0` (as logits)."""
    parameterization = Flip(times) if kind == "direct" else Logits()
    decoder = BernoulliDecoder() if decoder is None else decoder
    return Reverse(process, ClosedForm(kind, len(times)), parameterization, decoder)


def expected(model: Reverse, x_0: Tensor, times: Tensor) -> Tensor:
    """(2ⁿ, N) expectation of every term over q(x_t|x_0), by the sum over all latents."""
    latents = all_bits(x_0.shape[1])
    rows = x_0.repeat_interleave(len(latents), 0)
    x_t = latents.repeat(len(x_0), 1)
    out = []
    for i, t in enumerate(times):
        weight = per_example(model.process.marginal(rows, t).log_prob(x_t)).exp()
        value = term_of(model.at(x_t, t), rows, times, torch.tensor(i))
        out.append((weight * value).view(len(x_0), -1).sum(1))
    return torch.stack(out, 1)


def log_likelihood(model: Reverse, x_0: Tensor, times: Tensor) -> Tensor:
    """(B,) log p_θ(x_0) by the matrix product over all latents, nats."""
    latents = all_bits(x_0.shape[1])
    mass = per_example(model.process.prior(latents).log_prob(latents)).exp()
    for i in range(len(times) - 1, 0, -1):
        kernel = model.kernel(latents, times[i], times[i - 1])
        mass = mass @ _matrix(kernel, latents)
    return (mass @ _matrix(model.decoder(latents, times[0]), x_0)).log()


def _matrix(law: Any, targets: Tensor) -> Tensor:
    """(rows of the law, targets) of probabilities."""
    columns = [per_example(law.log_prob(x.expand(law.mean.shape))) for x in targets]
    return torch.stack(columns, 1).exp()


# --- checks --------------------------------------------------------------------------------------


def check_conditionals(number: int) -> None:
    """kernel, marginal, posterior, keep and entropies to 1e-12."""
    golden, process, times = case(number)
    bits = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    near = (1e-12, 1e-14)
    start = torch.tensor(0.0, dtype=torch.float64)
    for i, t in enumerate(times):
        law = process.marginal(bits, t)
        assert_near(law.mean[0], golden["marginal"][i], *near, "marginal")
        step = law if i == 0 else process.transition(bits, times[i - 1], t)
        assert_near(step.mean[0], golden["kernel"][i], *near, "kernel")
        for c in (0.0, 1.0) if i > 0 else ():
            x_t = torch.full_like(bits, c)
            back = process.posterior(x_t, bits, t, times[i - 1])
            assert_near(back.mean[0], golden["posterior"][i, int(c)], *near, "posterior")
    assert_near(process.schedule.keep(times), golden["alphas_cumprod"], *near, "keep")
    x_0 = all_bits(3)
    for i, t in enumerate(times):
        entropy = per_example(process.marginal(x_0, t).entropy()) * BIT
        assert_near(entropy, golden["H_xt_given_x0_bits"][i], *near, "entropy")
    prior = per_example(process.prior(x_0).entropy())[0] * BIT
    assert_near(prior, golden["H_prior_bits"], *near, "prior entropy")
    assert float(start) == 0


def check_model(number: int, kind: str) -> None:
    """f, every term of every latent, expectations, prior, bound, both decoders, likelihood."""
    golden, process, times = case(number)
    model, x_0 = model_of(kind, process, times), all_bits(3)
    near = (1e-12, 1e-12)
    for i, t in enumerate(times):
        at = model.at(x_0, t)
        law = at.decoder() if i == 0 else at.kernel(times[i - 1])
        assert isinstance(law, Bits)
        assert_near(law.mean, golden[f"{kind}_f"][i], *near, f"f {i}")
        for j, x in enumerate(x_0):
            value = term_of(at, x.expand_as(x_0), times, torch.tensor(i)) * BIT
            assert_near(value, golden[f"{kind}_term_bits"][i, :, j], *near, f"term {i}")
    terms = expected(model, x_0, times) * BIT
    assert_near(terms, golden[f"{kind}_expected_term_bits"], *near, "expected terms")
    prior = prior_term(model, x_0, times) * BIT
    assert_near(prior, golden["prior_bits"], *near, "prior")
    assert_near(prior + terms.sum(1), golden[f"{kind}_nelbo_bits"], *near, "bound")
    likelihood = log_likelihood(model, x_0, times) * BIT
    assert_near(likelihood, golden[f"{kind}_log2_px0"], *near, "log p(x_0)")
    assert bool((prior + terms.sum(1) >= -likelihood - 1e-12).all())


def check_fixed_edge(number: int, kind: str) -> None:
    """The bound with the last step fixed: by `bound` and by its entropy form, to 1e-12."""
    golden, process, times = case(number)
    model, x_0 = model_of(kind, process, times, EdgeFixed()), all_bits(3)
    terms = expected(model, x_0, times)
    stored = -golden[f"{kind}_elbo_fixed_last_bits"]
    by_bound = (prior_term(model, x_0, times) + terms.sum(1)) * BIT
    assert_near(by_bound, stored, 1e-12, 1e-12, "fixed edge, bound")
    form = entropy_form(process, x_0, times, terms[:, 1:].sum(1))
    assert_near(form.bound * BIT, stored, 1e-12, 1e-12, "fixed edge, entropy form")


# --- heartbeat -----------------------------------------------------------------------------------


def heartbeats() -> Iterator[str]:
    """The stored cases."""
    yield from load("heartbeat")["cases"].tolist()


def heartbeat_model(name: str, decoder: Decoder) -> tuple[dict[str, Any], Reverse, Tensor]:
    """Arrays, the model of exact kernels, and its grid."""
    prefix = f"{name}/"
    golden = {k.removeprefix(prefix): v for k, v in load("heartbeat").items() if prefix in k}
    schedule = Harmonic(int(golden["T"]))
    process = Bernoulli(schedule, float(golden["pi"]))
    known = patterns(int(golden["length"]), int(golden["period"]))
    model = Reverse(process, PatternPosterior(known, process), Logits(), decoder)
    return golden, model, schedule.grid()


def check_heartbeat(name: str) -> None:
    """Every stored figure of one case, from the exact kernels of the library."""
    golden, model, times = heartbeat_model(name, BernoulliDecoder())
    length, period = int(golden["length"]), int(golden["period"])
    trained = expected_terms(model, length, period, times)
    assert_near(trained[1:] * BIT, golden["expected_term_bits"], 0, 1e-12, "terms")
    assert_near(-trained.sum() * BIT, golden["K_trained_last"], 0, 1e-11, "trained")
    _, edge, _ = heartbeat_model(name, EdgeFixed())
    first = expected_terms(edge, length, period, times[:1])[1]
    fixed = trained.sum() - trained[1] + first
    assert_near(-fixed * BIT, golden["K_fixed_last"], 0, 1e-11, "fixed")
    check_entropy_form(golden, model.process, times, trained[2:].sum())


def check_entropy_form(
    golden: dict[str, Any], process: Process, times: Tensor, divergences: Tensor
) -> None:
    """K of eq. 14, the fixed bound from it, and every entropy of the file."""
    x_0 = patterns(int(golden["length"]), int(golden["period"])).double()
    form = entropy_form(process, x_0, times, divergences.expand(len(x_0)))
    stored = {
        "K_fixed_last_eq14": form.k,
        "K_fixed_last": -form.bound,
        "H_x1_given_x0": form.first,
        "H_xT_given_x0": form.last,
        "H_prior": form.prior,
        "L_null": form.null,
    }
    for key, value in stored.items():
        assert_near(value.mean() * BIT, golden[key], 0, 1e-11, key)
