"""Export to diffusers: a folder that `DDPMPipeline.from_pretrained` loads, exactly our model.

    model_index.json  unet/{config.json, diffusion_pytorch_model.safetensors}  README.md
    scheduler/scheduler_config.json (trained_betas)  nelbo/manifest.json

The tensors keep their names. Betas are written one by one, so that any chain is expressed; what
diffusers has no words for is refused by name. `nelbo/manifest.json` says what these files leave
open, so that reading the folder back assumes nothing. The folder appears completely or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import torch as safetensors
from torch import Tensor

from nelbo.decoders import Discretized, Following, Lose, Ratio
from nelbo.errors import UsageError
from nelbo.files import exhausted, hidden, sync_directory, write_file
from nelbo.interop.diffusers import MANIFEST, SCHEDULER, SCHEMA, STEM
from nelbo.networks.layers import Timed
from nelbo.networks.unet import UNet
from nelbo.parameterizations import X0, Epsilon, GaussianParameterization, Velocity
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Reverse
from nelbo.variances import Between, Posterior, Transition

PREDICTIONS: dict[type, str] = {Epsilon: "epsilon", X0: "sample", Velocity: "v_prediction"}
VARIANCES: dict[type, str] = {
    Posterior: "fixed_small",
    Transition: "fixed_large",
    Between: "learned_range",
}
EDGES: dict[type, str] = {Lose: "lose", Ratio: "ratio", Following: "following"}
_EXAMPLE = (
    "a run that can be exported: nelbo train images PATH --schedule linear --predict epsilon "
    "--fourier --augment 0"
)
_WRAPPED = {
    "Fourier": "Fourier features of the input (train with --fourier, without numbers)",
    "Positions": "learned positions (--positions 0)",
    "Marked": "moved examples, which are marked to the network (--augment 0)",
    "Ensemble": "several networks (--members 1)",
}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from, for the manifest and the model card."""

    name: str
    recipe: dict[str, Any]
    data: dict[str, Any]
    step: int
    version: str


def write(
    folder: Path,
    model: Reverse,
    times: Tensor,
    shape: tuple[int, ...],
    levels: int | None,
    origin: Origin,
) -> None:
    """Write the folder.

    Arguments:
        folder: must not exist. model: with the weights that are measured. times: (T,) its grid.
        shape: (C, H, W) and levels: of the data.
    Raises:
        UsageError: the folder exists, or diffusers cannot express the model; says which training
            options can be exported.
        ResourceExhausted: it could not be written; nothing is left of it.
    """
    if os.path.lexists(folder):
        raise UsageError(f"{folder} exists, and nothing in it is overwritten: name another folder")
    files = contents(model, times, shape, levels, origin)
    temporary = hidden(folder, "tmp")
    try:
        with exhausted(folder, sum(map(len, files.values()))):
            shutil.rmtree(temporary, ignore_errors=True)
            for name, data in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                write_file(temporary / name, data)
            sync_directory(temporary)
            os.rename(temporary, folder)
            sync_directory(folder.absolute().parent)
    except BaseException:
        # best effort: the error under way says more than a failure to tidy up after it
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def contents(
    model: Reverse, times: Tensor, shape: tuple[int, ...], levels: int | None, origin: Origin
) -> dict[str, bytes]:
    """The files of the folder by name."""
    if levels is None or len(shape) != 3 or not isinstance(model.process, Gaussian):
        _refuse("it is no Gaussian diffusion of images")
    scheduler = scheduler_of(model, times)
    edge = edge_of(model)
    network = network_of(model, times)
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    config = {"_class_name": "UNet2DModel", **network.config, "sample_size": _size(shape)}
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()
    }
    weights = safetensors.save(state, {"format": "pt"})
    manifest = {
        "schema": SCHEMA,
        "scaling": "symmetric",
        "levels": levels,
        "edge": edge,
        "weights": "ema",
        "step": origin.step,
        "shape": list(shape),
        "sha256": {f"{STEM}.safetensors": hashlib.sha256(weights).hexdigest()},
        "data": origin.data,
        **origin.recipe,
        "nelbo": origin.version,
    }
    return {
        "model_index.json": _json(index),
        "unet/config.json": _json(config),
        f"unet/{STEM}.safetensors": weights,
        f"scheduler/{SCHEDULER}": _json(scheduler),
        MANIFEST: _json(manifest),
        "README.md": card(scheduler, manifest, origin).encode(),
    }


def _refuse(why: str) -> NoReturn:
    raise UsageError(f"diffusers cannot express this model: {why}; {_EXAMPLE}")


def _size(shape: tuple[int, ...]) -> int | list[int]:
    return shape[1] if shape[1] == shape[2] else list(shape[1:])


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def network_of(model: Reverse, times: Tensor) -> UNet:
    """The network itself, if it takes the image alone and whole times 0..T-1.

    Raises:
        UsageError: names what diffusers' UNet2DModel does not have.
    """
    network = model.network
    for part in network.modules():
        if type(part).__name__ in _WRAPPED:
            _refuse(f"its network has {_WRAPPED[type(part).__name__]}")
    if not isinstance(network, Timed) or not isinstance(network.network, UNet):
        _refuse(f"its network is a {type(network).__name__}, not a UNet of whole times")
    steps = torch.arange(len(times), dtype=torch.float64)
    fed = times * network.scale + network.shift
    if not torch.allclose(fed, steps, rtol=0, atol=1e-6):
        _refuse(
            f"its network is told times from {float(fed[0]):g} to {float(fed[-1]):g} in steps of "
            f"{float(fed[1] - fed[0]) if len(fed) > 1 else 0:g}, and diffusers tells whole ones "
            f"from 0 to {len(times) - 1}: take a chain (--schedule linear or cosine), or "
            "--latents 1001"
        )
    return network.network


def scheduler_of(model: Reverse, times: Tensor) -> dict[str, Any]:
    """scheduler_config.json: every beta, what is predicted, the variance, and the clipping.

    Raises:
        UsageError: names what a DDPMScheduler does not have.
    """
    process, rule = model.process, model.parameterization
    assert isinstance(process, Gaussian) and isinstance(rule, GaussianParameterization)
    if type(rule) not in PREDICTIONS:
        _refuse(f"it predicts {type(rule).__name__.lower()} (--predict epsilon, x0 or velocity)")
    if type(rule.variance) not in VARIANCES:
        _refuse("its variance is free (--variance posterior, transition or between)")
    first = process.schedule.lose(times[:1])
    betas = torch.cat((first, process.pair(times[:-1], times[1:]).log_beta.exp()))
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(times),
        "trained_betas": betas.detach().tolist(),
        "prediction_type": PREDICTIONS[type(rule)],
        "variance_type": VARIANCES[type(rule.variance)],
        "clip_sample": rule.clip is not None,
        "clip_sample_range": 1.0 if rule.clip is None else rule.clip,
        "timestep_spacing": "leading",
    }


def edge_of(model: Reverse) -> str:
    """The decoder's variance by its rule.

    Raises:
        UsageError: the decoder is none that a checkpoint can be read with.
    """
    decoder = model.decoder_rule
    if not isinstance(decoder, Discretized):
        _refuse("its decoder is not a normal law cut into levels (--decoder discretized)")
    return EDGES[type(decoder.density.edge)]


def card(scheduler: dict[str, Any], manifest: dict[str, Any], origin: Origin) -> str:
    """README.md: how to sample, how to measure, where it comes from."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", origin.name) or "model"
    steps = scheduler["num_train_timesteps"]
    size = "x".join(map(str, manifest["shape"]))
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---
# {name}

A diffusion model of {size} images (channels x height x width), trained with nelbo
{origin.version}: {scheduler["prediction_type"]}, {scheduler["variance_type"]}, T = {steps};
averaged weights of update {origin.step}.

```python
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("{name}")
images = pipeline(num_inference_steps={steps}).images
```

Its variational bound on your data, by term, with errors:

```sh
nelbo evaluate {name} --data PATH
```

Images enter as 2 level/{manifest["levels"] - 1} - 1. Diffusers ends with the mean of the last
step; the decoder p(x_0|x_1) of the bound is normal around it with the variance rule
"{manifest["edge"]}", cut into {manifest["levels"]} levels. `nelbo/manifest.json` holds the data's
checksums, the options of the training, and the checksum of the weights.
"""
