"""Steps of diffusers' schedulers against ours, in float64, from the same network outputs.

Runs where diffusers is installed. Its tables are float32; they are replaced by the float64 ones of
the same betas, so that what is left is the arithmetic of the steps.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from goldens import GoldenNetwork
from torch import Tensor

from nelbo.decoders import Discretized, Following
from nelbo.distributions import DiagonalNormal
from nelbo.parameterizations import X0, Epsilon, GaussianParameterization, Velocity
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.samplers import DDIM
from nelbo.schedules import Cosine, Linear, Stepped
from nelbo.solvers import DPMSolverPP
from nelbo.variances import Posterior, Transition

diffusers = pytest.importorskip("diffusers")

KINDS = {"epsilon": ("epsilon", Epsilon), "x0": ("sample", X0), "v": ("v_prediction", Velocity)}
SCHEDULES = {"linear": Linear, "cosine": Cosine}
STEPS = [0, 1, 37, 250, 500, 750, 998]
"""Of T = 1000; the cosine's last one has keep = 2e-9, where float64 x̂_0 itself is uncertain."""


def model_of(q: Stepped, kind: str, large: bool, clip: bool) -> Reverse:
    variance = Transition() if large else Posterior()
    make: type[GaussianParameterization] = KINDS[kind][1]
    parameterization = make(variance, 1.0 if clip else None)
    decoder = Discretized(256, Following(q.grid()[1]))
    return Reverse(Gaussian(q), GoldenNetwork(kind, 1000, False), parameterization, decoder)


def scheduler(name: str, q: Stepped, kind: str, **keys: Any) -> Any:
    """A scheduler with our betas and float64 tables."""
    betas = q.betas()
    made = getattr(diffusers, name)(
        num_train_timesteps=1000,
        trained_betas=betas.numpy(),
        prediction_type=KINDS[kind][0],
        **keys,
    )
    made.betas, made.alphas = betas, 1 - betas
    made.alphas_cumprod = torch.cumprod(1 - betas, 0)
    made.one = made.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return made


class Double:
    """torch, but float32 is float64: DPM-Solver's step casts its sample."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def start(seed: int) -> Tensor:
    return torch.randn(
        2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def assert_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    scale = theirs.abs().max().clamp(min=1)
    assert float((ours - theirs).abs().max() / scale) < 1e-10, what


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm(name: str, kind: str, large: bool, clip: bool) -> None:
    """Mean plus noise of one step, given the same noise; strided chains of 25 too."""
    q = SCHEDULES[name](1000)
    variance = "fixed_large" if large else "fixed_small"
    theirs = scheduler("DDPMScheduler", q, kind, clip_sample=clip, variance_type=variance)
    model = model_of(q, kind, large, clip)
    for stride in (1, 40):
        theirs.set_timesteps(1000 // stride)
        for i in theirs.timesteps.tolist():
            if i == 0 or (stride == 1 and i not in STEPS):
                continue
            x, t, s = start(i), q.times([i])[0], q.times([i - stride])[0]
            kernel = model.kernel(x, t, s)
            assert isinstance(kernel, DiagonalNormal)
            output = model.network(x, t)
            noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7))
            ours = kernel.mean + (0.5 * kernel.logvar).exp() * noise
            got = theirs.step(output, i, x, generator=torch.Generator().manual_seed(7))
            assert_same(ours, got.prev_sample, f"{name} {kind} {i} stride {stride}")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("eta", "clipped"), [(0.0, False), (0.0, True), (0.7, True)])
@pytest.mark.parametrize("again", [True, False])
def test_ddim(name: str, kind: str, eta: float, clipped: bool, again: bool) -> None:
    """Both forms of the noise, deterministic and not, strided and to the data."""
    q = SCHEDULES[name](1000)
    theirs = scheduler("DDIMScheduler", q, kind, clip_sample=clipped)
    theirs.set_timesteps(25)
    model, ddim = model_of(q, kind, False, clipped), DDIM(eta, clipped_noise=again)
    for i in theirs.timesteps.tolist():
        x, t = start(i), q.times([i])[0]
        output = model.network(x, t)
        noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
        if i < 40:
            ours = ddim.finish(model, x, t, None)
            got = theirs.step(output, i, x, eta=0.0, use_clipped_model_output=again)
        else:
            mean, sigma = ddim.mean_and_sigma(model, x, t, q.times([i - 40])[0])
            ours = mean + sigma * noise
            generator = torch.Generator().manual_seed(3)
            got = theirs.step(
                output, i, x, eta=eta, use_clipped_model_output=again, generator=generator
            )
        assert_same(ours, got.prev_sample, f"{name} {kind} {i}")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["midpoint", "heun"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(("order", "count"), [(1, 10), (2, 10), (2, 25)])
def test_dpm_solver(
    name: str,
    kind: str,
    form: Any,
    final: Any,
    order: Any,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole multistep walks from the same noise, every state."""
    home = importlib.import_module(diffusers.DPMSolverMultistepScheduler.__module__)
    monkeypatch.setattr(home, "torch", Double())
    q = SCHEDULES[name](1000)
    theirs = scheduler(
        "DPMSolverMultistepScheduler",
        q,
        kind,
        solver_order=order,
        solver_type=form,
        final_sigmas_type=final,
        algorithm_type="dpmsolver++",
        thresholding=False,
    )
    theirs.set_timesteps(count)
    kept = theirs.timesteps.tolist()
    logsnr = q.logsnr(q.times(kept[::-1])).flip(0)
    end = torch.zeros(1, dtype=torch.float64)
    if final == "sigma_min":
        end = (-0.5 * q.logsnrs[:1]).exp()
    theirs.sigmas = torch.cat([(-0.5 * logsnr).exp(), end])
    model, ours = model_of(q, kind, False, False), DPMSolverPP(order, form, final)
    x = y = start(0)
    state = ours.init(model, x)
    for n, i in enumerate(kept):
        output = model.network(y, q.times([i])[0])
        y = theirs.step(output, i, y).prev_sample
        t = q.times([i])[0]
        if n == count - 1:
            x = ours.finish(model, x, t, state)
        else:
            x, state = ours.step(model, x, t, q.times([kept[n + 1]])[0], state)
        assert_same(x, y, f"{name} {kind} step {n}")
