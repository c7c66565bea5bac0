"""The JSON files of a diffusers directory, read field by field; what is not understood is refused.

A field that is ignored is another model under the same weights. So every field of a scheduler or a
network is either computed, known to have no effect on the bound, or refused by name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from nelbo.errors import InputRefused
from nelbo.files import read_json
from nelbo.interop.betas import SCHEDULES, betas, zero_terminal
from nelbo.interop.foreign import Chain, Predicts, Variances

MOST_STEPS, DEPTH = 100_000, 16
CHAIN_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "GaussianDDPMScheduler")
PIPELINES = ("DDPMPipeline", "DDIMPipeline")
_PREDICTS: dict[str, Predicts] = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "velocity"}
_VARIANCES: dict[str, Variances] = {
    "fixed_small": "posterior",
    "fixed_small_log": "posterior",
    "fixed_large": "transition",
    "learned_range": "between",
}
_NO_EFFECT = (
    "timestep_spacing",  # of shorter walks only
    "steps_offset",
    "set_alpha_to_one",  # of DDIM's own last step
    "dynamic_thresholding_ratio",  # of thresholding, which is refused
    "sample_max_value",
    "tensor_format",
)
_LEGACY = {"timesteps": "num_train_timesteps", "clip_predicted_image": "clip_sample"}
_LATENT = {"vae", "vqvae", "movq", "text_encoder", "tokenizer", "transformer", "bert", "prior"}
_WHY = {
    "VePipeline": "a variance-exploding process has another bound",
    "LDMPipeline": "it works on latents, whose bound is not one of the data",
    "StableDiffusion": "it works on latents, whose bound is not one of the data",
    "DiTPipeline": "it works on latents, whose bound is not one of the data",
    "VeScheduler": "a variance-exploding process has another bound",
    "VpScheduler": "a continuous stochastic differential equation has another bound",
    "EulerDiscrete": "it is a sampler, and names no variance of the reverse steps",
    "EDM": "its network takes scaled inputs and noise levels for times",
    "PNDM": "it is a sampler, and names no variance of the reverse steps",
    "Flow": "flow matching has another bound",
    "Conditional": "it needs text or other conditions",
    "Condition": "it needs text or other conditions",
    "Transformer": "only UNet2DModel is computed here",
}


class Fields:
    """The fields of one JSON object; each is taken once, and the rest must be empty.

    Arguments:
        path: the file, for messages. value: its content.
    Raises:
        InputRefused: it is no object, or nested too deeply.
    """

    def __init__(self, path: Path, value: Any) -> None:
        self.path = path
        if not isinstance(value, dict):
            raise InputRefused(f"{path}: holds no JSON object")
        if _depth(value) > DEPTH:
            raise InputRefused(f"{path}: is nested more than {DEPTH} levels deep")
        self.notes = {k: v for k, v in value.items() if k.startswith("_")}
        self.left = {k: v for k, v in value.items() if not k.startswith("_")}

    @classmethod
    def read(cls, path: Path) -> Fields:
        """The fields of a file of at most 1 MB, with finite numbers and no repeated keys."""
        return cls(path, read_json(path))

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise InputRefused with the file and the field."""
        raise InputRefused(f"{self.path}: {key}: {why}")

    def flag(self, key: str, default: bool) -> bool:
        """A true or false."""
        value = self.left.pop(key, default)
        if not isinstance(value, bool):
            self.refuse(key, f"{value!r} is neither true nor false")
        return value

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """A number in [low, high]."""
        value = self.left.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, f"{str(value)[:60]!r} is no number")
        if not low <= value <= high:
            self.refuse(key, f"{str(value)[:40]} is not between {low:g} and {high:g}")
        return value

    def count(self, key: str, default: int, high: int) -> int:
        """A whole number in 1..high."""
        value = self.number(key, default, 1, high)
        if value != int(value):
            self.refuse(key, f"{value:g} is no whole number")
        return int(value)

    def word(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of some words."""
        value = self.left.pop(key, default)
        if value not in allowed:
            self.refuse(key, f"{str(value)[:60]!r} is not computed, only {', '.join(allowed)}")
        return str(value)

    def done(self) -> None:
        """Refuse what was not taken."""
        if self.left:
            key = min(self.left)
            self.refuse(key, "is not known here, and a field that is ignored is another model")


def _depth(value: Any) -> int:
    """How deeply objects and lists are nested; a stack of its own, so that depth cannot hurt."""
    most, stack = 0, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        most = max(most, depth)
        if isinstance(item, dict | list):
            parts = item.values() if isinstance(item, dict) else item
            stack += [(part, depth + 1) for part in parts if isinstance(part, dict | list)]
    return most


def why_not(name: str) -> str:
    """Why a class of diffusers is not measured, as far as its name tells."""
    return next((why for part, why in _WHY.items() if part in name), "it is not known here")


def check_index(fields: Fields) -> str | None:
    """Refuse pipelines that are none of pixels in one chain; returns the scheduler's class.

    Raises:
        InputRefused: names the class or the component.
    """
    name = str(fields.notes.get("_class_name", PIPELINES[0]))[:80]
    if name not in PIPELINES:
        fields.refuse("_class_name", f"{name}: {why_not(name)}; only {' and '.join(PIPELINES)}")
    for part in sorted(_LATENT & fields.left.keys()):
        if fields.left[part] not in (None, [None, None]):
            fields.refuse(part, "latents or text are no part of a chain over pixels")
    unet = _class(fields, "unet", "UNet2DModel")
    if unet != "UNet2DModel":
        fields.refuse("unet", f"{unet}: {why_not(unet)}; only UNet2DModel")
    return _class(fields, "scheduler", "") or None


def _class(fields: Fields, part: str, default: str) -> str:
    value = fields.left.get(part, [None, default])
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)):
        fields.refuse(part, "is not [library, class]")
    return str(value[1])[:80]


def chain_of(fields: Fields, named: str | None = None) -> Chain:
    """The diffusion that a scheduler's configuration describes.

    Arguments:
        named: the scheduler's class according to model_index.json.
    Raises:
        InputRefused: names the field that cannot be computed.
    """
    own = str(fields.notes.get("_class_name", named or CHAIN_SCHEDULERS[0]))[:80]
    for name in (named or own, own):
        if name not in CHAIN_SCHEDULERS:
            fields.refuse("_class_name", f"{name}: {why_not(name)}; only DDPM and DDIM schedulers")
    for old, new in _LEGACY.items():
        if old in fields.left:
            if new in fields.left:
                fields.refuse(old, f"stands beside {new}, its newer name; keep one")
            fields.left[new] = fields.left.pop(old)
    for key in _NO_EFFECT:
        fields.left.pop(key, None)
    if fields.left.pop("timestep_values", None) is not None:
        fields.refuse("timestep_values", "times of its own are not computed")
    if fields.flag("thresholding", False):
        fields.refuse("thresholding", "a threshold that looks at the whole image is not computed")
    predict = _prediction(fields)
    variance = _variance(fields, name)
    values, schedule = _betas(fields, predict)
    size = fields.number("clip_sample_range", 1.0, 1e-6, 1e6)
    clip = size if fields.flag("clip_sample", True) else None
    fields.done()
    return Chain(betas=values, predict=predict, variance=variance, clip=clip, schedule=schedule)


def _prediction(fields: Fields) -> Predicts:
    old = fields.left.pop("predict_epsilon", None)
    default = "sample" if old is False else "epsilon"
    if old is not None and fields.left.get("prediction_type", default) != default:
        fields.refuse("predict_epsilon", f"{old!r} contradicts prediction_type")
    return _PREDICTS[fields.word("prediction_type", default, tuple(_PREDICTS))]


def _variance(fields: Fields, name: str) -> Variances:
    """DDIM schedulers name no variance: with eta = 1 theirs is the posterior's."""
    if name == "DDIMScheduler":
        fields.left.pop("variance_type", None)
        return "posterior"
    return _VARIANCES[fields.word("variance_type", "fixed_small", tuple(_VARIANCES))]


def _betas(fields: Fields, predict: Predicts) -> tuple[Tensor, str]:
    steps = fields.count("num_train_timesteps", 1000, MOST_STEPS)
    start = fields.number("beta_start", 1e-4, 0, 1)
    end = fields.number("beta_end", 0.02, 0, 1)
    trained = fields.left.pop("trained_betas", None)
    name = str(fields.left.pop("beta_schedule", "linear"))
    values = _trained(fields, trained, steps)
    if values is None:
        fields.left["beta_schedule"] = name
        values = betas(fields.word("beta_schedule", "linear", SCHEDULES), steps, start, end)
    name = name if trained is None else "trained betas"
    if fields.flag("rescale_betas_zero_snr", False):
        if predict == "epsilon":
            fields.refuse(
                "rescale_betas_zero_snr",
                "with prediction_type epsilon the last KL is infinite: pure noise says nothing of "
                "the data through a predicted noise",
            )
        if steps < 2:
            fields.refuse("rescale_betas_zero_snr", "needs two steps or more")
        values, name = zero_terminal(values), f"{name} to zero snr"
    key = "beta_schedule" if trained is None else "trained_betas"
    _check(fields, values, key)
    if predict == "epsilon" and float(values[-1]) == 1:
        fields.refuse(key, "the last beta is 1: a predicted noise says nothing of the data there")
    return values, name


def _trained(fields: Fields, trained: Any, steps: int) -> Tensor | None:
    if trained is None:
        return None
    numbers = isinstance(trained, list) and all(
        isinstance(b, int | float) and not isinstance(b, bool) and abs(b) < 1e9 for b in trained
    )
    if not numbers or len(trained) != steps:
        found = f"{len(trained)} entries" if isinstance(trained, list) else "no list"
        fields.refuse("trained_betas", f"{found}, expected {steps} numbers (num_train_timesteps)")
    return torch.tensor(trained, dtype=torch.float64)


def _check(fields: Fields, values: Tensor, key: str) -> None:
    inner, last = values[:-1], float(values[-1])
    if not (bool(((inner > 0) & (inner < 1)).all()) and 0 < last <= 1 and math.isfinite(last)):
        low, high = float(values.min()), float(values.max())
        fields.refuse(key, f"betas from {low:g} to {high:g}; each must lie between 0 and 1")
