"""Writes openai_unet.npz with the original code of improved-diffusion and guided-diffusion.

    git clone https://github.com/openai/improved-diffusion   (1bc7bbb was used)
    git clone https://github.com/openai/guided-diffusion     (22e0df8 was used)
    PYTHONPATH=improved-diffusion:guided-diffusion python tests/golden/openai_make.py

Weights, images and noise are formulas, so that only flags, names and shapes, and outputs are
stored. Both code bases compute parts in float32 (normalisation, softmax, tables of the schedule);
here those casts are removed, and only the sinusoid of the time stays in float32.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from unet_make import weights  # noqa: E402

SMALL: dict[str, Any] = {"num_channels": 32, "num_res_blocks": 1}
CASES: dict[str, dict[str, Any]] = {
    "improved": SMALL
    | {
        "image_size": 32,
        "learn_sigma": True,
        "noise_schedule": "cosine",
        "diffusion_steps": 50,
        "timestep_respacing": "7",
    },
    "improved_plain": SMALL
    | {
        "image_size": 32,
        "sigma_small": True,
        "class_cond": True,
        "use_scale_shift_norm": False,
        "num_heads": 2,
        "num_heads_upsample": 8,
        "diffusion_steps": 100,
        "timestep_respacing": "ddim10",
    },
    "guided": SMALL
    | {
        "image_size": 16,
        "channel_mult": "1,2,3",
        "attention_resolutions": "8,4",
        "num_head_channels": 16,
        "resblock_updown": True,
        "use_new_attention_order": True,
        "predict_xstart": True,
        "timestep_respacing": "6,4",
    },
    "guided_legacy": SMALL
    | {
        "image_size": 16,
        "num_res_blocks": 2,
        "channel_mult": "2,1,3",
        "attention_resolutions": "16,4",
        "num_heads": 2,
        "num_heads_upsample": 4,
        "learn_sigma": True,
        "rescale_timesteps": True,
        "diffusion_steps": 30,
    },
}
SIDES = (16, 8)
TIMES = np.array([0.0, 871.25])
LABEL = 7


def images() -> np.ndarray:
    """Two images of 256 levels."""
    return (37 * np.arange(2 * 3 * math.prod(SIDES)) % 256).reshape(2, 3, *SIDES)


def noise(step: int) -> np.ndarray:
    """The noise of the kept step with this number, for both images."""
    waves = 1.4 * np.sin(1.7 * np.arange(2 * 3 * math.prod(SIDES)) + step)
    return waves.reshape(2, 3, *SIDES)


def inputs() -> np.ndarray:
    """What the network alone is given."""
    return 1.5 * np.cos(1.3 * np.arange(2 * 3 * math.prod(SIDES))).reshape(2, 3, *SIDES)


@contextmanager
def double(package: str) -> Any:
    """The package with its casts to float32 removed."""
    names = ("unet", "nn", "gaussian_diffusion")
    unet, layers, _ = (importlib.import_module(f"{package}.{name}") for name in names)
    waves = layers.timestep_embedding

    def embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
        return waves(t, dim).double()

    def direct(function: Any, arguments: Any, parameters: Any, flag: bool) -> Any:
        return function(*arguments)

    with (
        mock.patch.object(layers.GroupNorm32, "forward", torch.nn.GroupNorm.forward),
        mock.patch.object(unet, "timestep_embedding", embedding),
        mock.patch.object(unet, "checkpoint", direct),
        mock.patch.object(torch.Tensor, "float", lambda self: self),
    ):
        yield


def build(flags: dict[str, Any], package: str) -> tuple[Any, Any]:
    scripts = importlib.import_module(f"{package}.script_util")
    known = scripts.model_and_diffusion_defaults() | flags
    known = {"sigma_small": False} | known
    takes = inspect.signature(scripts.create_model).parameters
    network = scripts.create_model(**{k: v for k, v in known.items() if k in takes})
    diffusion = scripts.create_gaussian_diffusion(
        steps=known["diffusion_steps"],
        **{
            key: known[key]
            for key in inspect.signature(scripts.create_gaussian_diffusion).parameters
            if key != "steps"
        },
    )
    network = network.double().eval()
    network.dtype = torch.float64
    return network, diffusion


def case(flags: dict[str, Any], package: str) -> dict[str, np.ndarray]:
    network, diffusion = build(flags, package)
    shapes = {key: tuple(value.shape) for key, value in sorted(network.state_dict().items())}
    network.load_state_dict(weights(shapes))
    label = {"y": torch.full((2,), LABEL)} if flags.get("class_cond") else {}
    x_0 = torch.from_numpy(images()).double() / 127.5 - 1
    draws = iter(torch.from_numpy(noise(k)) for k in reversed(range(diffusion.num_timesteps)))
    first = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad(), double(package):
        out = network(
            torch.from_numpy(inputs()), torch.from_numpy(TIMES).to(torch.float32), **label
        )
        with mock.patch.object(torch, "randn_like", lambda x: next(draws)):
            bound = diffusion.calc_bpd_loop(network, x_0, model_kwargs=label)
        x_1 = diffusion.q_sample(x_0, first, torch.from_numpy(noise(0)))
        decoder = diffusion.p_mean_variance(network, x_1, first, model_kwargs=label)
    return {
        "flags": np.array(json.dumps(flags)),
        "tensors": np.array(json.dumps({k: list(s) for k, s in shapes.items()})),
        "out": out.numpy(),
        "steps": np.array(diffusion.timestep_map),
        "betas": diffusion.betas,
        "prior": bound["prior_bpd"].numpy(),
        "pairs": bound["vb"].flip(1)[:, 1:].numpy(),
        "decoder_mean": decoder["mean"].numpy(),
        "decoder_logvar": decoder["log_variance"].numpy(),
    }


def main() -> None:
    arrays = {}
    for name, flags in CASES.items():
        package = f"{name.split('_')[0]}_diffusion"
        arrays |= {f"{name}_{key}": value for key, value in case(flags, package).items()}
    np.savez_compressed(HERE / "openai_unet.npz", **arrays)


if __name__ == "__main__":
    main()
