"""Directories of the library diffusers, read without it: pipelines over pixels in one chain.

    DIR/model_index.json                                  classes, by name; none is imported
    DIR/unet/config.json, diffusion_pytorch_model.*       UNet2DModel, tensors of the same names
    DIR/scheduler/scheduler_config.json                   betas, prediction, variance, clipping
    DIR/nelbo/manifest.json                               of our exports: what the rest leaves open

or all files in DIR itself. The network reads whole times 0..T-1. Tests hold its output, and every
quantity of the scheduler's own step, equal to diffusers'.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch

from nelbo.errors import InputRefused
from nelbo.interop import weights
from nelbo.interop.configs import Fields, chain_of, check_index
from nelbo.interop.foreign import Assumptions, Chain, Foreign, Stated, assemble
from nelbo.interop.scales import Scaling
from nelbo.networks.unet import UNet
from nelbo.networks.unet_config import UNetConfig

INDEX, STEM = "model_index.json", "diffusion_pytorch_model"
SCHEDULER, MANIFEST = "scheduler_config.json", "nelbo/manifest.json"
SCHEMA = 1
MOST = 1 << 16
"""Largest number in a network's configuration."""
MOST_LEVELS, MOST_LAYERS = 16, 64
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LISTED: dict[str, type] = {"block_out_channels": int, "sample_size": int}
"""Of what a list consists; of words where nothing is said."""
_MAY_BE_NULL = ("sample_size", "mid_block_type", "attention_head_dim")
_MAY_BE_ZERO = ("freq_shift", "dropout", "norm_eps", "downsample_padding")
_KINDS: dict[str, tuple[type, ...]] = {
    "sample_size": (int, list),
    "center_input_sample": (bool,),
    "time_embedding_type": (str,),
    "freq_shift": (int, float),
    "flip_sin_to_cos": (bool,),
    "down_block_types": (list,),
    "mid_block_type": (str,),
    "up_block_types": (list,),
    "block_out_channels": (list,),
    "mid_block_scale_factor": (int, float),
    "downsample_type": (str,),
    "upsample_type": (str,),
    "dropout": (int, float),
    "act_fn": (str,),
    "norm_eps": (int, float),
    "resnet_time_scale_shift": (str,),
    "add_attention": (bool,),
    "class_embed_type": (str,),
}
"""Types of the fields of a network's configuration that are not plain whole numbers."""


@dataclass(frozen=True)
class Layout:
    """Where the files of a directory lie."""

    root: Path
    unet: Path
    """Folder of config.json and the weights."""
    scheduler: Path
    """The file scheduler_config.json."""


def is_directory(path: Path) -> bool:
    """Whether a path looks like a diffusers directory."""
    signs = (INDEX, "config.json", "unet/config.json")
    return any((path / sign).is_file() for sign in signs)


def layout(root: Path) -> Layout:
    """A pipeline with folders, or everything in one."""
    nested = (root / "unet" / "config.json").is_file()
    scheduler = root / "scheduler" / SCHEDULER
    return Layout(
        root,
        root / "unet" if nested else root,
        scheduler if scheduler.is_file() or nested else root / SCHEDULER,
    )


def read(
    root: Path, assumptions: Assumptions | None = None, *, trust_pickle: bool = False
) -> Foreign:
    """The model of a diffusers directory.

    Arguments:
        root: the directory. assumptions: what its files do not say.
        trust_pickle: whether weights in a pickle (.bin) may be opened.
    Raises:
        InputRefused: a file is missing, damaged or a link out of the directory; a field is not
            computed; tensors do not fit. The message names the file and the field.
    """
    assumptions = Assumptions() if assumptions is None else assumptions
    places = layout(root)
    named = None
    if (root / INDEX).exists():
        named = check_index(Fields.read(weights.inside(root / INDEX, root)))
    scheduler = Fields.read(weights.inside(places.scheduler, root))
    chain = chain_of(scheduler, named)
    config = Fields.read(weights.inside(places.unet / "config.json", root))
    settings = settings_of(config)
    shape = _shape(config, settings)
    _check_channels(config, settings, chain)
    _check_class(config, settings, assumptions)
    files = weights.locate(places.unet, STEM)
    for file in files:
        weights.inside(file, root)
    network = _network(config, settings, files, trust_pickle)
    return assemble(network, chain, shape, assumptions, _stated(root, files))


def settings_of(config: Fields) -> UNetConfig:
    """The network's configuration, types and sizes checked.

    Raises:
        InputRefused: names the file and the field.
    """
    name = str(config.notes.get("_class_name", "UNet2DModel"))[:80]
    if name != "UNet2DModel":
        config.refuse("_class_name", f"{name}: only UNet2DModel is computed here")
    defaults = {field.name: field.default for field in fields(UNetConfig)}
    for key, value in config.left.items():
        if value is None and defaults.get(key) is not None and key not in _MAY_BE_NULL:
            config.refuse(key, "is null, and has to have a value")
        if value is not None and key in defaults:
            _check_type(config, key, value)
    try:
        return UNetConfig.of(config.left)
    except (InputRefused, TypeError) as error:
        raise InputRefused(f"{config.path}: {error}") from error


def _check_type(config: Fields, key: str, value: Any) -> None:
    kinds = _KINDS.get(key, (int,))
    right = isinstance(value, kinds) and (isinstance(value, bool) == (kinds == (bool,)))
    if not right:
        words = " or ".join(kind.__name__ for kind in kinds)
        config.refuse(key, f"{str(value)[:60]!r} is no {words}")
    parts = value if isinstance(value, list) else [value]
    if len(parts) > MOST_LEVELS:
        config.refuse(key, f"{len(parts)} entries, at most {MOST_LEVELS} are read")
    kind = _LISTED.get(key, str)
    if isinstance(value, list) and not all(type(part) is kind for part in parts):
        config.refuse(key, f"{str(value)[:60]} is no list of {kind.__name__}")
    numbers = [part for part in parts if not isinstance(part, str | bool)]
    high = {"layers_per_block": MOST_LAYERS, "dropout": 1}.get(key, MOST)
    low = 0 if key in _MAY_BE_ZERO else 1
    if not all(isinstance(part, int | float) and low <= part <= high for part in numbers):
        config.refuse(key, f"{str(value)[:60]} is not between {low} and {high}")


def _shape(config: Fields, settings: UNetConfig) -> tuple[int, int, int]:
    size = settings.sample_size
    if size is None:
        config.refuse("sample_size", "is not given, and the size of an image must be: write it in")
    sides = (size, size) if isinstance(size, int) else size
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        config.refuse("sample_size", f"{sides} is neither a side nor [height, width]")
    if any(side % settings.factor for side in sides):
        config.refuse("sample_size", f"{sides[0]}x{sides[1]} is no multiple of {settings.factor}")
    return settings.in_channels, sides[0], sides[1]


def _check_channels(config: Fields, settings: UNetConfig, chain: Chain) -> None:
    """A learned variance doubles the output, and nothing else does."""
    data, out = settings.in_channels, settings.out_channels
    want = 2 * data if chain.variance == "between" else data
    if out != want:
        kind = "learned_range" if chain.variance == "between" else "fixed"
        config.refuse(
            "out_channels",
            f"{out} with in_channels {data} and a variance_type that is {kind}: {want} are needed",
        )


def _check_class(config: Fields, settings: UNetConfig, assumptions: Assumptions) -> None:
    label, classes = assumptions.label, settings.num_class_embeds
    if settings.class_embed_type is None and classes is None:
        if label is not None:
            config.refuse("num_class_embeds", f"there are no classes: leave out --label {label}")
        return
    key = "num_class_embeds" if settings.class_embed_type is None else "class_embed_type"
    if label is None:
        config.refuse(key, "the network wants a class: give one with --label")
    if settings.class_embed_type is None and not 0 <= label < (classes or 0):
        config.refuse(key, f"--label {label}: classes go from 0 to {(classes or 0) - 1}")


def _network(config: Fields, settings: UNetConfig, files: list[Path], trust_pickle: bool) -> UNet:
    """The network with its weights; nothing is allocated before the shapes are known to fit."""
    if settings.own:
        raise InputRefused(
            f"{config.path}: diffusers' UNet2DModel has no {', '.join(settings.own)}"
        )
    try:
        with torch.device("meta"):
            network = UNet(**settings.json())
    except InputRefused as error:
        raise InputRefused(f"{config.path}: {error}") from error
    state = weights.load(files, network.state_dict(), modern, trust_pickle)
    network.load_state_dict(state, assign=True)
    return network


def modern(name: str) -> str:
    """The name of a tensor today: attention once had query, key, value and proj_attn."""
    parts = name.split(".")
    if len(parts) > 2 and "attentions" in parts and parts[-2] in _ATTENTION:
        parts[-2] = _ATTENTION[parts[-2]]
    return ".".join(parts)


def _stated(root: Path, files: list[Path]) -> Stated:
    """What the manifest of our own export says; nothing if there is none.

    Raises:
        InputRefused: the weights are no longer those of the manifest.
    """
    path = root / MANIFEST
    if not path.exists():
        return Stated()
    manifest = Fields.read(weights.inside(path, root))
    if manifest.left.get("schema") != SCHEMA:
        manifest.refuse("schema", f"{manifest.left.get('schema')!r}, this version reads {SCHEMA}")
    scaling = manifest.word("scaling", "symmetric", ("symmetric", "unit"))
    stated = Stated(
        scaling=cast(Scaling, scaling),
        levels=manifest.count("levels", 256, MOST),
        edge=cast(Any, manifest.word("edge", "lose", ("lose", "ratio", "following"))),
        weights=manifest.word("weights", "ema", ("ema", "raw")),
        clip=True,
    )
    sums = manifest.left.get("sha256")
    for file in files:
        want = sums.get(file.name) if isinstance(sums, dict) else None
        if want != hashlib.sha256(file.read_bytes()).hexdigest():
            manifest.refuse("sha256", f"{file.name} is not the file that was exported")
    return stated
