"""Against the library itself (extra `diffusers`; skipped without it).

A checkpoint that diffusers trained on real images is measured, and every term equals a loop over
its scheduler that knows nothing of us: `add_noise`, `step` with its own noise at zero, and
`_get_variance`, on the same noise. The scheduler's tables are float32; once with them as they are,
once in float64, which shows where the difference comes from.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import silent
from torch import Tensor
from torch.nn import functional as F

from nelbo.bound import bound
from nelbo.data.embedded import digits
from nelbo.interop.configs import Fields, chain_of
from nelbo.interop.diffusers import read
from nelbo.interop.foreign import Assumptions, Foreign
from nelbo.samplers import Ancestral

diffusers = pytest.importorskip("diffusers")
scheduling_ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
scheduling_ddim = pytest.importorskip("diffusers.schedulers.scheduling_ddim")

STEPS, LEVELS = 20, 17
SHAPE: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def scaled(levels: Tensor) -> Tensor:
    return levels.float() / 8 - 1


def scheduler(**more: Any) -> Any:
    options = {"num_train_timesteps": STEPS, "beta_start": 1e-3, "beta_end": 0.4, **more}
    return diffusers.DDPMScheduler(**options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained as diffusers' example of unconditional images does: noise, prediction, mse."""
    torch.manual_seed(0)
    network, schedule = diffusers.UNet2DModel(**SHAPE), scheduler()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    images = scaled(digits().train)
    for _ in range(150):
        clean = images[torch.randint(len(images), (32,))]
        noise = torch.randn(clean.shape)
        timesteps = torch.randint(0, STEPS, (32,)).long()
        noisy = schedule.add_noise(clean, noise, timesteps)
        loss = F.mse_loss(network(noisy, timesteps).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained") / "ddpm"
    diffusers.DDPMPipeline(unet=network.eval(), scheduler=schedule).save_pretrained(folder)
    return folder


def in_float64(schedule: Any) -> Any:
    """The same scheduler, its tables in float64."""
    betas = chain_of(Fields(Path("config"), dict(schedule.config))).betas
    schedule.betas, schedule.alphas = betas, 1 - betas
    schedule.alphas_cumprod = torch.cumprod(schedule.alphas, 0)
    schedule.one = torch.ones((), dtype=torch.float64)
    return schedule


def normal_kl(m: Tensor, v: Tensor, other: Tensor, w: Tensor) -> Tensor:
    return 0.5 * ((w / v).log() + v / w - 1 + (m - other) ** 2 / w)


def level_nats(mean: Tensor, variance: Tensor, levels: Tensor) -> Tensor:
    """-log of the mass of N(mean, variance) in the bins of the levels, open at the ends."""

    infinity, half = torch.full_like(mean, math.inf), 1 / (LEVELS - 1)
    z = (levels.double() / 8 - 1 - mean) / variance.sqrt()
    high = torch.where(levels == LEVELS - 1, infinity, z + half / variance.sqrt())
    low = torch.where(levels == 0, -infinity, z - half / variance.sqrt())
    # on the tail that is smaller, where the two masses do not cancel
    tails = [0.5 * torch.erfc(edge * math.sqrt(0.5)) for edge in (low, high, -high, -low)]
    return -torch.where(z > 0, tails[0] - tails[1], tails[2] - tails[3]).log()


@torch.no_grad()
def loop(network: Any, schedule: Any, levels: Tensor) -> Tensor:
    """(B, T + 1) nats: decoder, T - 1 pairs, prior; by the scheduler's own methods."""
    x_0, kind = scaled(levels), schedule.config.variance_type
    keep = schedule.alphas_cumprod.double()
    # what `step` makes of the data itself is the mean of the posterior
    config = {k: v for k, v in schedule.config.items() if not k.startswith("_")}
    config |= {"prediction_type": "sample", "clip_sample": False, "variance_type": "fixed_small"}
    exact = in_float64(diffusers.DDPMScheduler(**config))
    terms = []
    for i in range(STEPS):
        x_t = schedule.add_noise(x_0, torch.randn(x_0.shape), torch.full((len(x_0),), i))
        output = network(x_t, i).sample
        mean = schedule.step(output, i, x_t).prev_sample.double()
        if i == 0:
            learned = output[:, 1:].double() if kind == "learned_range" else None
            copied, high = exact._get_variance(1), 1 - keep[0]
            share = 0 if learned is None else (learned + 1) / 2
            variance = (share * high.log() + (1 - share) * copied.log()).exp()
            terms.append(level_nats(mean, variance, levels))
            continue
        value = schedule._get_variance(i, predicted_variance=output[:, 1:])
        value = value.double().exp() if kind == "learned_range" else value.double()
        posterior = exact.step(x_0.double(), i, x_t.double()).prev_sample
        terms.append(normal_kl(posterior, exact._get_variance(i), mean, value))
    one = torch.ones((), dtype=torch.float64)
    last = keep[-1]
    terms.append(normal_kl(last.sqrt() * x_0.double(), 1 - last, 0 * x_0.double(), one))
    return torch.stack([term.flatten(1).sum(1) for term in terms], 1)


@pytest.fixture
def quiet_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """`step` adds no noise, and takes no random number."""
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: torch.zeros(shape))


@torch.no_grad()
def ours(found: Foreign, levels: Tensor) -> Tensor:
    """The same columns, each from its own draw in the same order."""
    value = bound(found.model, scaled(levels), found.times)
    return torch.cat((value.reconstruction[:, None], value.diffusion, value.prior[:, None]), 1)


@pytest.mark.parametrize(("double", "tolerance"), [(False, 1e-4), (True, 5e-5)])
def test_every_term_of_a_trained_checkpoint(
    trained: Path, quiet_steps: None, double: bool, tolerance: float
) -> None:
    pipeline = diffusers.DDPMPipeline.from_pretrained(trained)
    schedule = in_float64(pipeline.scheduler) if double else pipeline.scheduler
    levels = digits().test[:32]
    torch.manual_seed(1)
    want = loop(pipeline.unet, schedule, levels)
    torch.manual_seed(1)
    found = ours(read(trained, Assumptions(levels=LEVELS)), levels)
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)
    total = 5e-6 if double else tolerance
    torch.testing.assert_close(found.sum(1), want.sum(1), rtol=total, atol=0)


def test_the_command_agrees_with_the_loop(
    trained: Path, quiet_steps: None, tmp_path: Path
) -> None:
    """`nelbo evaluate DIR --data PATH` on 200 digits, every step, against five loops: within six
    errors of the Monte Carlo noise (false alarm 2e-9)."""
    np.save(tmp_path / "digits.npy", digits().train[:200].numpy())
    before = sorted(trained.rglob("*"))
    code, out, err = silent(
        ["evaluate", str(trained), "--data", str(tmp_path / "digits.npy")]
        + ["--levels", "17", "--json", "--quiet", "--device", "cpu"]
    )
    assert code == 0, err
    value = json.loads(out)
    pipeline = diffusers.DDPMPipeline.from_pretrained(trained)
    torch.manual_seed(2)
    rows = digits().train[:200]
    repeats = torch.stack(
        [loop(pipeline.unet, in_float64(pipeline.scheduler), rows).sum(1) for _ in range(5)]
    )
    means = repeats.mean(1) / (64 * math.log(2))
    total = value["terms"]["total"]
    error = math.hypot(float(means.std()) / math.sqrt(5), total["se_mc"])
    assert abs(total["mean"] - float(means.mean())) < 6 * error
    assert error < 0.15  # of about eleven bits per dimension
    assert value["data"]["split"] == "all" and value["data"]["n"] == 200
    assert value["assumed"]["levels"] == "17 (set by --levels)"
    assert sorted(trained.rglob("*")) == before


CHAINS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"variance_type": "fixed_large"}, {}),
    ({"prediction_type": "v_prediction", "clip_sample": False}, {}),
    ({"prediction_type": "sample", "clip_sample_range": 0.8, "beta_start": 0.03}, {}),
    ({"variance_type": "learned_range"}, {"out_channels": 2}),
    ({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}, {}),
    ({"trained_betas": [0.01 * (i + 1) for i in range(STEPS)]}, {"flip_sin_to_cos": False}),
]


@pytest.mark.parametrize(("options", "shape"), CHAINS, ids=str)
def test_every_term_of_other_chains(
    options: dict[str, Any], shape: dict[str, Any], quiet_steps: None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**{**SHAPE, **shape}).eval()
    diffusers.DDPMPipeline(network, scheduler(**options)).save_pretrained(tmp_path / "ddpm")
    levels = digits().test[:8]
    torch.manual_seed(1)
    want = loop(network, in_float64(scheduler(**options)), levels)
    torch.manual_seed(1)
    found = ours(read(tmp_path / "ddpm", Assumptions(levels=LEVELS)), levels)
    torch.testing.assert_close(found, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
)
@pytest.mark.parametrize("zero", [False, True])
def test_betas(name: str, zero: bool) -> None:
    more = {"rescale_betas_zero_snr": zero, "prediction_type": "v_prediction"}
    theirs = diffusers.DDPMScheduler(beta_schedule=name, **more)
    found = chain_of(Fields(Path("config"), dict(theirs.config))).betas
    # float32 tables: differences of numbers near one, and of roots near the last one
    torch.testing.assert_close(found.float(), theirs.betas, rtol=1e-4, atol=5e-7)


def test_ddim_with_its_full_noise_is_the_same_chain(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**SHAPE).eval()
    schedule = diffusers.DDIMScheduler(num_train_timesteps=STEPS, beta_start=1e-3, beta_end=0.4)
    diffusers.DDIMPipeline(network, schedule).save_pretrained(tmp_path / "ddim")
    found = read(tmp_path / "ddim")
    schedule.set_timesteps(STEPS)
    x, zero = torch.randn(3, 1, 8, 8), torch.zeros(3, 1, 8, 8)
    for i in (1, 7, STEPS - 1):
        with torch.no_grad():
            output = network(x, i).sample
        kernel = found.model.kernel(x, found.times[i], found.times[i - 1])
        step = schedule.step(
            output, i, x, eta=1.0, use_clipped_model_output=True, variance_noise=zero
        )
        torch.testing.assert_close(kernel.mean, step.prev_sample, rtol=2e-4, atol=2e-4)
        variance = schedule._get_variance(i, i - 1)
        torch.testing.assert_close(kernel.variance[0, 0, 0, 0], variance, rtol=1e-4, atol=0)


RUN = [
    *("train", "digits", "--steps", "12", "--batch", "16", "--channels", "16", "--multipliers"),
    *("1", "2", "--attention", "4", "--save-every", "12", "--validate-every", "0", "--samples"),
    *("4", "--calls", "4", "--threads", "1", "--decoder", "discretized", "--fourier"),
    *("--positions", "0", "--quiet", "--ema", "0.5", "--rate", "0.01"),
]
EXPORTS: dict[str, list[str]] = {
    "epsilon": ["--predict", "epsilon", "--schedule", "linear", "--clip-x0", "1"],
    "velocity": ["--predict", "velocity", "--schedule", "cosine", "--variance", "transition"],
    "learned": ["--predict", "x0", "--schedule", "cosine", "--variance", "between"],
    "betas": ["--predict", "epsilon", "--schedule", "linear", "--learn-betas"],
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_exported_samples_equal_ours(kind: str, tmp_path: Path, no_report: None) -> None:
    """`from_pretrained` loads the folder; the same noise gives the same pictures.

    Diffusers ends with the mean of the last step, so that is what ours is compared with.
    """
    run, folder = tmp_path / "run", tmp_path / "out"
    code, _, err = silent([*RUN, *EXPORTS[kind], "--latents", "20", "--out", str(run)])
    assert code == 0, err
    code, _, err = silent(["export", str(run), "--to", "diffusers", str(folder)])
    assert code == 0, err
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        batch_size=3,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=STEPS,
        output_type="np",
    ).images
    found = ancestral(read(folder), torch.Generator().manual_seed(5))
    shown = (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pictures, shown, rtol=0, atol=2e-4)
    assert pictures.std() > 0.02


@torch.no_grad()
def ancestral(found: Foreign, generator: torch.Generator) -> Tensor:
    """Our sampler's walk with noise from a generator, and the mean of the last step."""
    x = torch.randn((3, *found.shape), generator=generator)
    times, draws = found.times, Ancestral()
    for i in range(len(times) - 1, 0, -1):
        noise = torch.randn(x.shape, generator=generator)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nelbo.distributions.torch.randn", lambda *_, n=noise, **__: n)
            x, _ = draws.step(found.model, x, times[i], times[i - 1], None)
    return found.model.predict(x, times[0])
