"""The stored reference numbers of tests/golden, and the checks that read them.

tests/golden/README.md defines every array. The checks are plain functions, so that the planted
bugs of test_planted.py run the very checks that guard the library.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nelbo.bound import decoder_term, prior_term, term_of
from nelbo.decoders import Constant, Discretized, Edge, Following, Lose
from nelbo.distributions import DiagonalNormal, DiscretizedNormal, kl_divergence, level_values
from nelbo.parameterizations import X0, Epsilon, Velocity
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Prediction, Reverse
from nelbo.samplers import DDIM
from nelbo.schedules import Cosine, Harmonic, Linear, Stepped, Tabulated
from nelbo.variances import Between, Posterior, Transition, Variance

FOLDER = Path(__file__).parent / "golden"
DIMS = 48
BITS = 1 / (DIMS * math.log(2))


@cache
def load(name: str) -> dict[str, Any]:
    """All arrays of tests/golden/NAME.npz."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def assert_near(
    actual: Tensor | float, expected: Any, relative: float, absolute: float, what: str = ""
) -> None:
    """|actual − expected| ≤ absolute + relative·|expected| everywhere; NaN and inf must agree."""
    actual = torch.as_tensor(actual, dtype=torch.float64).detach()
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        actual,
        expected.expand_as(actual),
        rtol=relative,
        atol=absolute,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


# --- schedules -----------------------------------------------------------------------------------


@cache
def schedule(name: str, steps: int) -> Stepped:
    """The golden schedule of this name."""
    if name == "linear_scaled":
        return Tabulated(torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps))
    return {"linear": Linear, "cosine": Cosine, "harmonic": Harmonic}[name](steps)


def schedule_tables(q: Stepped) -> dict[str, Tensor]:
    """The fields of schedules.npz as the library computes them."""
    times = q.grid()
    pair = Gaussian(q).pair(times[:-1], times[1:])
    first = q.lose(times[:1])
    zero, one = torch.zeros_like(first), torch.ones_like(first)
    variance = pair.log_posterior.exp()
    return {
        "betas": torch.cat([first, pair.log_beta.exp()]),
        "alphas_cumprod": q.keep(times),
        "one_minus_alphas_cumprod": q.lose(times),
        "log_snr": q.logsnr(times),
        "posterior_variance": torch.cat([zero, variance]),
        "posterior_log_variance_copy": torch.cat([pair.log_posterior[:1], pair.log_posterior]),
        "posterior_mean_coef_x0": torch.cat([one, pair.from_data]),
        "posterior_mean_coef_xt": torch.cat([zero, pair.from_latent]),
    }


def check_schedules() -> None:
    """Every number of schedules.npz, to 1e-10 relative."""
    golden = load("schedules")
    for key, expected in golden.items():
        if key.endswith("_index"):
            continue
        name, rest = key.removeprefix("selected_").split("_T")
        steps, field = rest.split("_", 1)
        actual = schedule_tables(schedule(name, int(steps)))[field]
        if key.startswith("selected_"):
            actual = actual[torch.from_numpy(golden[f"selected_{name}_T{steps}_index"])]
        assert_near(actual, expected, 1e-10, 1e-13, key)


# --- networks and models -------------------------------------------------------------------------

NETWORKS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "epsilon": (
        lambda x, i: 0.85 * x + 0.1 * torch.sin(3 * x) + 0.05 * torch.cos(i / 7),
        lambda x, i: torch.tanh(0.5 * x + 0.1),
    ),
    "x0": (
        lambda x, i: 1.01 * x / (1 + i / 250) + 0.04 * torch.sin(9 * x),
        lambda x, i: 1.2 * torch.cos(x) - 0.1,
    ),
    "v": (
        lambda x, i: (
            0.3 * x
            - 0.4 * torch.sin(2 * x)
            + 0.2 * x.mean((1, 2, 3), keepdim=True)
            + 0.1 * torch.sin(i / 5)
        ),
        lambda x, i: 0.6 * torch.sin(x + 0.05 * i),
    ),
}
PARAMETERIZATIONS = {"epsilon": Epsilon, "x0": X0, "v": Velocity}
VARIANCES: dict[str, Callable[[], Variance]] = {
    "fixed_small": Posterior,
    "fixed_large": Transition,
    "learned_range": Between,
}


class GoldenNetwork(nn.Module):
    """A closed-form network of (x, i), i = round(t·T) − 1 the 0-based step of the full chain."""

    def __init__(self, kind: str, steps: int, learned: bool) -> None:
        super().__init__()
        self.mean, self.extra = NETWORKS[kind]
        self.steps = steps
        self.learned = learned

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        i = ((t * self.steps).round() - 1).to(x.dtype).reshape(-1, 1, 1, 1)
        mean = self.mean(x, i)
        return torch.cat([mean, self.extra(x, i)], dim=1) if self.learned else mean


def edge_rule(rule: str, variance: str, times: Tensor) -> Edge:
    """The decoder variance that the golden README calls `copy`, `beta` or `clamp`."""
    if rule == "copy" and len(times) > 1:
        return Following(times[1])
    if rule == "clamp" and variance != "fixed_large":
        return Constant(math.log(1e-20))
    return Lose()


def build(
    q: Stepped, kind: str, variance: str, clip: bool, times: Tensor, rule: str = "copy"
) -> Reverse:
    """The reverse process of one golden combination."""
    rule_of_variance = VARIANCES[variance]()
    parameterization = PARAMETERIZATIONS[kind](rule_of_variance, clip=1.0 if clip else None)
    network = GoldenNetwork(kind, q.steps, rule_of_variance.learned)
    decoder = Discretized(256, edge_rule(rule, variance, times))
    return Reverse(Gaussian(q), network, parameterization, decoder)


class Chain(NamedTuple):
    """The images and latents of one chain: every (image, step), flattened image-major."""

    times: Tensor
    x_0: Tensor
    x_t: Tensor
    index: Tensor


def images(dtype: torch.dtype) -> Tensor:
    """(4, 3, 4, 4) on the model's scale."""
    return torch.from_numpy(load("inputs")["images"]).to(dtype) / 127.5 - 1


def chain(q: Stepped, steps: list[int], dtype: torch.dtype) -> Chain:
    """x_t = √k x_0 + √l ε with the stored noise of the original steps."""
    times = q.times(steps)
    noise = torch.from_numpy(load("inputs")["noise_q"][steps]).to(dtype) / 4096
    x_0 = images(dtype)
    count = len(x_0)
    index = torch.arange(len(steps)).repeat(count)
    x_0 = x_0.repeat_interleave(len(steps), 0)
    noise = noise.transpose(0, 1).flatten(0, 1)
    keep, lose = (v.to(dtype).view(-1, 1, 1, 1)[index] for v in (q.keep(times), q.lose(times)))
    return Chain(times, x_0, keep.sqrt() * x_0 + lose.sqrt() * noise, index)


def terms(model: Reverse, c: Chain) -> tuple[Tensor, Prediction]:
    """All N terms of the four images, bits per dimension (4, N), and the prediction."""
    at = model.at(c.x_t, c.times[c.index])
    values = term_of(at, c.x_0, c.times, c.index)
    return (values * BITS).view(4, -1), at


# --- the bound -----------------------------------------------------------------------------------


class Tolerance(NamedTuple):
    """What tests/golden/README.md section 4 allows."""

    pair: float
    decoder: float
    clamp: float
    total: float
    mean: float
    logvar: float
    absolute: float


TOLERANCES = {
    torch.float64: Tolerance(1e-9, 1e-8, 1e-6, 1e-9, 1e-10, 1e-11, 1e-13),
    torch.float32: Tolerance(1e-3, 5e-4, math.nan, 5e-4, 1e-4, 1e-5, 1e-7),
}


def combinations(golden: dict[str, Any]) -> Iterator[tuple[tuple[int, int, int, int], list[Any]]]:
    """(indices, [schedule, parametrisation, variance, clip]) over the axes S, P, V, X."""
    axes = [golden[key].tolist() for key in ("schedules", "params", "variances", "clips")]
    for where in itertools.product(*(range(len(axis)) for axis in axes)):
        yield where, [axis[i] for axis, i in zip(axes, where, strict=True)]


def check_bound(name: str, steps: int, dtype: torch.dtype) -> None:
    """vb, total, prior, decoder rules, kept means and mean squared errors of bound_TN.npz."""
    golden = load(name)
    for where, (schedule_name, kind, variance, clip) in combinations(golden):
        q = schedule(schedule_name, steps)
        c = chain(q, list(range(steps)), dtype)
        at = check_terms(golden, "", where, build(q, kind, variance, clip, c.times), c)
        check_decoders(golden, "", where, c, at)
        check_kept(golden, where, c, at)


def check_strided(dtype: torch.dtype) -> None:
    """The nine subsets of strided.npz, whose network sees the steps of the full chain."""
    golden = load("strided")
    for subset in sorted({key.split("/")[0] for key in golden if "/" in key}):
        for where, (schedule_name, kind, variance, clip) in combinations(golden):
            q = schedule(schedule_name, 1000)
            c = chain(q, golden[f"{subset}/steps"].tolist(), dtype)
            model = build(q, kind, variance, clip, c.times)
            at = check_terms(golden, f"{subset}/", where, model, c)
            check_decoders(golden, f"{subset}/", where, c, at)
            check_strided_tables(golden, subset, where[0], q, c.times)


def check_strided_tables(
    golden: dict[str, Any], subset: str, s: int, q: Stepped, times: Tensor
) -> None:
    pair = Gaussian(q).pair(times[:-1], times[1:])
    betas = torch.cat([q.lose(times[:1]), pair.log_beta.exp()])
    assert_near(betas, golden[f"{subset}/betas"][s], 1e-10, 1e-13, f"{subset} betas")
    variances = golden[f"{subset}/posterior_variance"][s][1:]
    assert_near(pair.log_posterior.exp(), variances, 1e-10, 1e-13, f"{subset} variance")


def check_terms(
    golden: dict[str, Any], prefix: str, where: tuple[int, ...], model: Reverse, c: Chain
) -> Prediction:
    """Terms, prior, total and mean squared errors of one combination."""
    allow = TOLERANCES[c.x_0.dtype]
    what = f"{prefix}{where}"
    values, at = terms(model, c)
    expected = golden[f"{prefix}vb"][where]
    assert_near(values[:, 0], expected[:, 0], allow.decoder, allow.absolute, f"decoder {what}")
    assert_near(values[:, 1:], expected[:, 1:], allow.pair, allow.absolute, f"pairs {what}")
    prior = prior_term(model, c.x_0[c.index == 0], c.times) * BITS
    assert_near(prior, golden[f"{prefix}prior"][where[0]], allow.total, allow.absolute, what)
    total = prior + values.sum(1)
    assert_near(total, golden[f"{prefix}total"][where], allow.total, allow.absolute, what)
    check_errors(golden, prefix, where, c, at)
    return at


def check_errors(
    golden: dict[str, Any], prefix: str, where: tuple[int, ...], c: Chain, at: Prediction
) -> None:
    """Mean squared errors of x̂_0 and ε̂ where the file has them (float64)."""
    if f"{prefix}xstart_mse" not in golden or c.x_0.dtype != torch.float64:
        return
    s, p, _, x = where
    q = at.model.process.schedule
    keep, lose = (v.view(-1, 1, 1, 1) for v in (q.keep(at.t), q.lose(at.t)))
    noise = (c.x_t - keep.sqrt() * c.x_0) / lose.sqrt()
    pairs = {"xstart_mse": at.x_0 - c.x_0, "eps_mse": at.noise() - noise}
    for key, error in pairs.items():
        value = (error**2).flatten(1).mean(1).view(4, -1)
        assert_near(value, golden[f"{prefix}{key}"][s, p, x], 1e-9, 1e-13, f"{key} {where}")


def check_decoders(
    golden: dict[str, Any], prefix: str, where: tuple[int, ...], c: Chain, at: Prediction
) -> None:
    """The decoder term under every rule for its variance."""
    allow = TOLERANCES[c.x_0.dtype]
    first = c.index == 0
    expected = golden[f"{prefix}decoder_by_convention"]
    variance = str(golden["variances"][where[2]])
    for r, rule in enumerate(golden["conventions"].tolist()):
        undefined = rule == "copy" and len(c.times) == 1
        if undefined or (rule == "clamp" and c.x_0.dtype == torch.float32):
            continue
        some = at[first]
        edge = edge_rule(rule, variance, c.times)
        model = at.model
        rebuilt = Reverse(
            model.process, model.network, model.parameterization, Discretized(256, edge)
        )
        value = decoder_term(Prediction(rebuilt, some.x_t, some.t, some.output), c.x_0[first])
        tolerance = allow.clamp if rule == "clamp" else allow.decoder
        reference = expected[(where[0], r, *where[1:])]
        assert_near(value * BITS, reference, tolerance, allow.absolute, f"{rule} {where}")


def check_kept(golden: dict[str, Any], where: tuple[int, ...], c: Chain, at: Prediction) -> None:
    """x_t, posterior mean, x̂_0, model mean and learned log variance at the kept steps."""
    s, p, v, x = where
    allow = TOLERANCES[c.x_0.dtype]
    for k, step in enumerate(golden["kept_steps"].tolist()):
        rows = (c.index == step).nonzero()[:2, 0]
        some, x_0 = at[rows], c.x_0[rows]
        far = golden["schedules"][s] == "cosine" and step == len(c.times) - 1 and p == 0
        loose = 5e-2 if far and c.x_0.dtype == torch.float32 else allow.mean
        assert_scaled(some.x_t, golden["kept_x_t"][s, k], allow.mean, "x_t")
        assert_scaled(some.x_0, golden["kept_x0_hat"][s, p, x, k], loose, f"x0 {where} {step}")
        q_mean, p_mean, logvar = _kernels(some, x_0, c.times, step)
        assert_scaled(q_mean, golden["kept_q_mean"][s, k], allow.mean, "q_mean")
        assert_scaled(p_mean, golden["kept_p_mean"][s, p, x, k], allow.mean, "p_mean")
        if golden["variances"][v] == "learned_range":
            expected = golden["kept_p_logvar_learned_range"][s, p, k]
            assert_near(logvar, expected, allow.logvar, allow.absolute, f"logvar {where} {step}")


def _kernels(
    at: Prediction, x_0: Tensor, times: Tensor, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior mean, model mean and model log variance; at step 0 those of the decoder."""
    if step == 0:
        decoder = at.decoder()
        assert isinstance(decoder, DiscretizedNormal)
        return x_0, decoder.mean, decoder.logvar
    s = times[step - 1]
    posterior, kernel = at.model.process.posterior(at.x_t, x_0, at.t, s), at.kernel(s)
    assert isinstance(kernel, DiagonalNormal)
    return posterior.mean, kernel.mean, kernel.logvar


def assert_scaled(actual: Tensor, expected: Any, tolerance: float, what: str) -> None:
    """|actual − expected| ≤ tolerance·max(1, |expected|)."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    error = (actual.double() - expected).abs() / expected.abs().clamp(min=1)
    assert float(error.max()) <= tolerance, f"{what}: {float(error.max()):.3g} > {tolerance:.3g}"


# --- distributions and single steps --------------------------------------------------------------


def check_decoder(dtype: torch.dtype) -> None:
    """log P of all 256 levels for ten normal distributions, and single hard cases."""
    golden = load("decoder")
    relative, absolute = (1e-11, 1e-13) if dtype == torch.float64 else (1e-3, 1e-7)
    mean, logvar = (torch.from_numpy(golden[k]).to(dtype)[:, None] for k in ("mean", "logvar"))
    everything = level_values(256, mean).expand(10, 256)
    normal = DiscretizedNormal(mean.expand(10, 256), logvar, 256)
    actual = normal.log_prob(everything)
    assert_near(actual, golden["logprob_nats"], relative, absolute, "decoder")
    if dtype == torch.float64:
        keys = ("extreme_level", "extreme_mean", "extreme_logvar", "extreme_logprob_nats")
        level, m, v, expected = (torch.from_numpy(golden[k]) for k in keys)
        extreme = DiscretizedNormal(m, v, 256).log_mass(level)
        assert_near(extreme, expected, relative, absolute, "extreme")


def check_kl() -> None:
    """KL of scalar normals with log variances that differ by 3 down to 1e-15 (float64)."""
    golden = {key: torch.from_numpy(value) for key, value in load("kl").items()}
    p = DiagonalNormal(golden["mean_q"], golden["logvar_q"])
    q = DiagonalNormal(golden["mean_p"], golden["logvar_p"])
    assert_near(kl_divergence(p, q), golden["kl_nats"], 1e-11, 0.0, "kl")


def step_models(dtype: torch.dtype) -> Iterator[tuple[tuple[int, ...], Prediction, Tensor]]:
    """((S, pair, P, X), prediction, s) of steps.npz with the learned variance, j ≥ 0."""
    golden = load("steps")
    axes = [golden[k].tolist() for k in ("schedules", "pairs", "params", "clips")]
    for where in itertools.product(*(range(len(axis)) for axis in axes)):
        name, (i, j), kind, clip = (axis[w] for axis, w in zip(axes, where, strict=True))
        q = schedule(name, 1000)
        model = build(q, kind, "learned_range", clip, q.grid(2))
        x_t = torch.from_numpy(golden["x_t"][where[:2]]).to(dtype)[None]
        t = q.times([i])[0]
        yield where, model.at(x_t, t), q.times([j])[0] if j >= 0 else torch.tensor(-1.0)


def check_steps(dtype: torch.dtype) -> None:
    """Ancestral means, variances and both DDIM forms of steps.npz."""
    golden = load("steps")
    allow = 1e-10 if dtype == torch.float64 else 1e-3
    logvar_allow = 1e-10 if dtype == torch.float64 else 1e-5
    for (s, pair, p, x), at, time in step_models(dtype):
        expected = golden["ancestral_mean"][s, pair, p, x]
        # the golden README allows the float32 x̂_0 of the cosine schedule's last step 5e-2
        loose = 5e-2 if allow > 1e-10 and (s, p) == (1, 0) else allow
        assert_scaled(at.x_0[0], golden["x0_hat"][s, pair, p, x], loose, f"x0 {s, pair, p, x}")
        if time < 0:  # a step to the data has no variance: its mean is x̂_0
            assert_scaled(at.x_0[0], expected, loose, "data")
            continue
        kernel = at.kernel(time)
        assert isinstance(kernel, DiagonalNormal)
        assert_scaled(kernel.mean[0], expected, allow, f"ancestral {s, pair, p, x}")
        logvar = golden["logvar_learned_range"][s, pair, p]
        assert_near(kernel.logvar[0], logvar, logvar_allow, 1e-7, "logvar")
        process = at.model.process
        assert isinstance(process, Gaussian)
        coefficients = process.pair(time, at.t)
        assert_near(coefficients.log_beta, golden["log_beta"][s, pair], 1e-10, 1e-13, "beta")
        small = golden["log_betatilde"][s, pair]
        assert_near(coefficients.log_posterior, small, 1e-10, 1e-13, "betatilde")
        check_ddim((s, pair, p, x), at, time, allow)


def check_ddim(where: tuple[int, ...], at: Prediction, time: Tensor, allow: float) -> None:
    """DDIM's mean and σ for every η with the noise from x̂_0 as clipped and from the raw output."""
    golden = load("steps")
    s, pair, p, x = where
    for e, eta in enumerate(golden["etas"].tolist()):
        mean, sigma = DDIM(eta).mean_and_sigma(at.model, at.x_t, at.t, time)
        assert_scaled(mean[0], golden["ddim_mean"][(*where, e)], allow, f"ddim {where} {eta}")
        assert_near(sigma, golden["ddim_std"][s, pair, e], 1e-10, 1e-13, "std")
        if at.model.parameterization.clip is not None:
            raw, _ = DDIM(eta, clipped_noise=False).mean_and_sigma(at.model, at.x_t, at.t, time)
            assert_scaled(
                raw[0], golden["ddim_mean_raw_eps"][s, pair, p, e], allow, f"raw {where}"
            )
