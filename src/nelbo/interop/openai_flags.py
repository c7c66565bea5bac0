"""The flags of OpenAI's diffusion code bases: what a checkpoint without a configuration needs.

Both keep a bare state dict; network and chain are rebuilt from the command line it was trained
with. `Flags` holds the keys of `model_and_diffusion_defaults` of improved-diffusion (Nichol and
Dhariwal, 2021) and guided-diffusion (Dhariwal and Nichol, 2021) with the defaults of the one at
hand. Keys that neither knows are refused by name, since a misspelt flag is another model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nelbo.errors import InputRefused

IMPROVED, GUIDED = "improved", "guided"
_ONLY = {
    IMPROVED: {"sigma_small"},
    GUIDED: {
        "channel_mult",
        "num_head_channels",
        "resblock_updown",
        "use_fp16",
        "use_new_attention_order",
    },
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    IMPROVED: {"rescale_timesteps": True, "rescale_learned_sigmas": True},
    GUIDED: {},
}
_MULTIPLIERS: dict[str, dict[int, tuple[float, ...]]] = {
    IMPROVED: {256: (1, 1, 2, 2, 4, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)},
    GUIDED: {
        512: (0.5, 1, 1, 2, 2, 4, 4),
        256: (1, 1, 2, 2, 4, 4),
        128: (1, 1, 2, 3, 4),
        64: (1, 2, 3, 4),
    },
}
_MOST = {
    "image_size": 4096,
    "num_channels": 8192,
    "num_res_blocks": 64,
    "num_heads": 1024,
    "diffusion_steps": 100_000,
}
_LEAST = {"num_heads_upsample": -1, "num_head_channels": -1}
_STRANGERS = (
    ("classifier_", "a classifier's; nelbo reads the diffusion model, leave them out"),
    ("large_size", "a super-resolution model's, which needs a second image; not supported"),
    ("small_size", "a super-resolution model's, which needs a second image; not supported"),
    ("clip_denoised", "an option of their scripts, not of the model; set clipping in nelbo"),
)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of one checkpoint; names and meaning are OpenAI's, defaults guided-diffusion's.

    Raises:
        InputRefused: a value is of the wrong type or out of range.
    """

    code: str
    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: str = "16,8"
    channel_mult: str = ""
    dropout: float = 0.0
    class_cond: bool = False
    use_checkpoint: bool = False
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_fp16: bool = False
    use_new_attention_order: bool = False
    learn_sigma: bool = False
    sigma_small: bool = False
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    timestep_respacing: str = ""
    use_kl: bool = False
    predict_xstart: bool = False
    rescale_timesteps: bool = False
    rescale_learned_sigmas: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, str(field.type), getattr(self, field.name))
        if self.noise_schedule not in ("linear", "cosine"):
            raise InputRefused(
                f"noise_schedule={self.noise_schedule!r} is not supported, only 'linear' "
                "and 'cosine'"
            )

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Flags:
        """Read the content of a flags file.

        Arguments:
            content: any of the keys; "code" may name the code base, "improved" or "guided".

        Raises:
            InputRefused: a key is unknown or foreign to the code base, or a value is refused.
        """
        stated = {key: value for key, value in content.items() if key != "code"}
        _refuse_strangers(stated)
        unknown = sorted(stated.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise InputRefused(
                f"unknown keys {', '.join(unknown)}; the file holds those of "
                "model_and_diffusion_defaults, and none is dropped that is not understood"
            )
        code = _code(content.get("code"), stated)
        return cls(code=code, **_DEFAULTS[code] | stated)

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Width of every level in units of num_channels, finest first."""
        if self.channel_mult:
            return tuple(_integers("channel_mult", self.channel_mult, 64))
        known = _MULTIPLIERS[self.code]
        if self.image_size not in known:
            raise InputRefused(
                f"{self.code}-diffusion has no network for image_size={self.image_size}, "
                f"only for {', '.join(str(size) for size in known)}; state channel_mult, as in "
                '"1,2,2,2" (with "code": "guided")'
            )
        return known[self.image_size]

    @property
    def attended(self) -> tuple[bool, ...]:
        """Whether a level has attention, finest first."""
        sides = _integers("attention_resolutions", self.attention_resolutions, 1 << 20)
        factors = {self.image_size // side for side in sides}
        return tuple(2**level in factors for level in range(len(self.multipliers)))

    def guessed(self, content: Mapping[str, Any]) -> dict[str, str]:
        """What the file left to defaults: the code base, and the keys with their values."""
        guessed = {}
        if "code" not in content:
            only = sorted(_ONLY[self.code] & content.keys())
            why = f"the key {only[0]}" if only else "no key of guided-diffusion alone"
            guessed["code"] = f"{self.code}-diffusion ({why})"
        absent = set(_keys(self.code)) - content.keys()
        values = ", ".join(f"{k}={v!r}" for k, v in asdict(self).items() if k in absent)
        return guessed | ({"flags": f"not stated, by default {values}"} if values else {})


def _keys(code: str) -> list[str]:
    other = GUIDED if code == IMPROVED else IMPROVED
    names = [field.name for field in fields(Flags) if field.name != "code"]
    return [name for name in names if name not in _ONLY[other]]


def _code(stated: object, keys: Mapping[str, Any]) -> str:
    if stated not in (None, IMPROVED, GUIDED):
        raise InputRefused(f'code={stated!r} is unknown: write "improved" or "guided"')
    code = stated or (GUIDED if _ONLY[GUIDED] & keys.keys() else IMPROVED)
    assert isinstance(code, str)
    foreign = sorted(keys.keys() - set(_keys(code)))
    if foreign:
        raise InputRefused(
            f"{code}-diffusion has no {', '.join(foreign)}; leave out what the checkpoint "
            'was not trained with, or state "code"'
        )
    return code


def _refuse_strangers(keys: Mapping[str, Any]) -> None:
    for start, what in _STRANGERS:
        found = sorted(key for key in keys if key.startswith(start))
        if found:
            raise InputRefused(f"{', '.join(found)}: {what}")


def _check(key: str, kind: str, value: object) -> None:
    types = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}[kind]
    if not isinstance(value, types) or (kind != "bool" and isinstance(value, bool)):
        raise InputRefused(f"{key}={value!r} is not {_WORDS[kind]}")
    if isinstance(value, str) and len(value) > 1000:
        raise InputRefused(f"{key} is {len(value)} characters long, at most 1000")
    if kind == "int":
        _in_range(key, value, _LEAST.get(key, 1), _MOST.get(key, 1024))
    elif kind == "float":
        _in_range(key, value, 0, 1)


_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": 'a string ("250", not 250)',
}


def _in_range(key: str, value: Any, least: int, most: int) -> None:
    if not (math.isfinite(value) and least <= value <= most) or (least < 0 and value == 0):
        raise InputRefused(f"{key}={value} is outside {least}..{most}")


def _integers(key: str, text: str, most: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 16 or not all(p.isascii() and p.isdigit() and len(p) < 8 for p in parts):
        raise InputRefused(f'{key}={text!r} is not a list of whole numbers like "32,16,8"')
    numbers = [int(part) for part in parts]
    if not all(1 <= number <= most for number in numbers):
        raise InputRefused(f"{key}={text!r} has numbers outside 1..{most}")
    return numbers
