r"""Checkpoints of improved-diffusion and guided-diffusion: a state dict and its training flags.

    β_i     linear: 1000/T times the line from 1e-4 to 0.02; cosine: capped at 0.999
    ε̂, x̂_0  predict_xstart
    σ²      learn_sigma: log β̃ + (v + 1)/2 (log β − log β̃); else sigma_small: β̃; else β
    i       0..T−1 of the full chain, times 1000/T with rescale_timesteps

timestep_respacing keeps some of the steps: the grid is theirs, the network sees the numbers that
they have in the full chain. Their evaluation clips x̂_0 to [−1, 1] and gives the decoder the
variance of the second kept step; both are assumptions here, and can be set.

References:
    Nichol and Dhariwal (2021); Dhariwal and Nichol (2021); their released code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nelbo.errors import InputRefused, UsageError
from nelbo.files import read_json
from nelbo.interop.foreign import Assumptions, Chain, Foreign, Stated, Variances, assemble
from nelbo.interop.openai_flags import Flags
from nelbo.interop.openai_names import configuration, convert, shapes
from nelbo.interop.respacing import respacing
from nelbo.interop.weights import exactly, state_of
from nelbo.networks.unet import UNet
from nelbo.schedules import Cosine

FIRST, LAST, CLASSES = "input_blocks.0.0.weight", "out.2.weight", "label_emb.weight"
_LATENT = ("first_stage_model.", "cond_stage_model.", "model.diffusion_model.")


def read(
    weights: Path, flags: Path, assumptions: Assumptions, trust_pickle: bool = False
) -> Foreign:
    """The reverse process of a checkpoint.

    Arguments:
        weights: model*.pt or ema_*.pt (pickles), or the same tensors as safetensors.
        flags: JSON with the flags it was trained with; see `Flags.of`.
        assumptions: what the user says of it; label is needed for class_cond.
        trust_pickle: whether a pickle may be opened; then its tensors alone are read.

    Raises:
        InputRefused: the files do not fit each other, or hold what is not supported.
        UsageError: the label is missing, not expected, or no class of the network.
    """
    content = read_json(flags)
    if not isinstance(content, dict):
        raise InputRefused(f"{flags}: must hold one JSON object, the flags by name")
    with _naming(flags):
        stated = Flags.of(content)
        chain = chain_of(stated)
    tensors = state_of(weights, trust_pickle)
    refuse_others(tensors, weights)
    network = _network(tensors, stated, (weights, flags))
    check_label(network, assumptions.label, weights)
    shape = (network.settings.in_channels, stated.image_size, stated.image_size)
    timed = rescaled(network, stated)
    foreign = assemble(timed, chain, shape, assumptions, Stated(weights=average(weights)))
    return replace(
        foreign,
        description=foreign.description | {"code": f"{stated.code}-diffusion"},
        assumed=foreign.assumed | _guessed(stated, content),
    )


def chain_of(flags: Flags) -> Chain:
    """Betas, prediction, variance and kept steps.

    Raises:
        InputRefused: a chain too short for its schedule, or a respacing that is none.
    """
    spec = flags.timestep_respacing
    try:
        kept = tuple(respacing(flags.diffusion_steps, spec)) if spec else None
    except UsageError as error:
        raise InputRefused(f"timestep_respacing: {error}") from error
    fixed: Variances = "posterior" if flags.sigma_small else "transition"
    return Chain(
        betas=betas(flags),
        predict="x0" if flags.predict_xstart else "epsilon",
        variance="between" if flags.learn_sigma else fixed,
        clip=1.0,
        schedule=flags.noise_schedule + (f", respaced {spec}" if spec else ""),
        kept=kept,
    )


def betas(flags: Flags) -> Tensor:
    """(T,) float64.

    Raises:
        InputRefused: the linear schedule leaves (0, 1).
    """
    steps = flags.diffusion_steps
    if flags.noise_schedule == "cosine":
        return Cosine(steps).betas()
    if steps <= 20:
        raise InputRefused(
            f"diffusion_steps={steps} with noise_schedule=linear: betas reach {20 / steps:g}, and "
            "must stay below 1; the schedule is that of more than 20 steps"
        )
    return torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)


class Rescaled(nn.Module):
    """Gives the network i·scale for i, in float32 as the original does.

    Arguments:
        network: network(x_t, i, cond). scale: 1000/T.
    """

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network = network
        self.scale = scale

    def forward(self, x_t: Tensor, i: Tensor, cond: Tensor | None = None) -> Tensor:
        """Call the network; i () or (B,)."""
        out: Tensor = self.network(x_t, i.float() * self.scale, cond)
        return out


def rescaled(network: nn.Module, flags: Flags) -> nn.Module:
    """The network with its times as rescale_timesteps has them."""
    if not flags.rescale_timesteps:
        return network
    return Rescaled(network, 1000.0 / flags.diffusion_steps)


def refuse_others(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Refuse, by name, networks that are no `UNetModel` over images.

    Raises:
        InputRefused: a latent model, a classifier, or none of theirs.
    """
    if any(name.startswith(_LATENT) for name in tensors):
        raise InputRefused(
            f"{where}: is a latent diffusion model, whose bound is none of images; not supported"
        )
    starts = {name.split(".")[0] for name in tensors}
    if "input_blocks" in starts and "output_blocks" not in starts:
        raise InputRefused(
            f"{where}: is a classifier (it has no output_blocks); give the diffusion model"
        )
    if CLASSES in tensors and tensors[CLASSES].dim() != 2:
        raise InputRefused(f"{where}: {CLASSES!r} is no table of classes")
    for name in (FIRST, LAST):
        if name not in tensors or tensors[name].dim() != 4:
            raise InputRefused(
                f"{where}: is no UNetModel of improved- or guided-diffusion: {name!r} is missing "
                "or no image convolution; give model*.pt or ema_*.pt"
            )


def network_of(tensors: Mapping[str, Tensor], flags: Flags, where: str) -> UNet:
    """The network with its weights, from tensors under their names.

    The number of channels and of classes is the file's; all else is checked against the flags.

    Raises:
        InputRefused: names the tensors that are missing, unexpected or of another shape.
    """
    classes = len(tensors[CLASSES]) if CLASSES in tensors and flags.class_cond else None
    if flags.class_cond and classes is None:
        raise InputRefused(f"{where}: class_cond is set, but {CLASSES!r} is missing")
    settings = configuration(flags, tensors[FIRST].shape[1], classes)
    # Nothing is allocated for a network that the file does not hold.
    with torch.device("meta"):
        network = UNet(**settings.json())
    checked = exactly(tensors, shapes(network), where)
    state = convert(network, checked, flags.use_new_attention_order)
    network.load_state_dict(state, assign=True)
    return network.eval()


def _network(tensors: Mapping[str, Tensor], flags: Flags, files: tuple[Path, Path]) -> UNet:
    weights, stated = files
    with _naming(stated):
        configuration(flags, 3, None)
    _compare_ends(tensors, flags, files)
    return network_of(tensors, flags, str(weights))


def _compare_ends(tensors: Mapping[str, Tensor], flags: Flags, files: tuple[Path, Path]) -> None:
    """The two flags that are most often forgotten, refused in their own words."""
    channels, out = tensors[FIRST].shape[1], tensors[LAST].shape[0]
    needed = channels * (2 if flags.learn_sigma else 1)
    if channels == 6 and 2 * out == needed:
        raise InputRefused(
            f"{files[0]}: is a super-resolution model (6 channels in for 3 of an image), which "
            "needs a second image; not supported"
        )
    if out != needed:
        raise InputRefused(
            f"{files[0]}: {channels} channels in and {out} out do not fit "
            f"learn_sigma={flags.learn_sigma} of {files[1]}"
        )
    if CLASSES in tensors and not flags.class_cond:
        raise InputRefused(
            f"{files[0]}: has classes ({CLASSES!r}), but class_cond is not set in {files[1]}"
        )


def check_label(network: UNet, label: int | None, where: Path) -> None:
    """Demand a label for a network with classes, and none for others.

    Raises:
        UsageError: says which labels there are.
    """
    classes = network.settings.num_class_embeds
    if classes is None:
        if label is not None:
            raise UsageError(f"{where}: has no classes (class_cond is not set): leave out --label")
        return
    if label is None:
        raise UsageError(
            f"{where}: was trained with {classes} classes, so that its bound is one for each "
            f"class: add --label 0..{classes - 1}"
        )
    if not 0 <= label < classes:
        raise UsageError(f"{where}: --label {label} is no class of it: 0..{classes - 1}")


def average(weights: Path) -> str | None:
    """What their file names say of averaging; None where it is another name."""
    ema = re.fullmatch(r"ema_([\d.]+)_(\d+)", weights.stem)
    if ema:
        return f"average with rate {ema[1]} after {int(ema[2])} steps, by the file's name"
    raw = re.fullmatch(r"model(\d+)", weights.stem)
    return f"not averaged, after {int(raw[1])} steps, by the file's name" if raw else None


def _guessed(flags: Flags, content: Mapping[str, Any]) -> dict[str, str]:
    guessed = flags.guessed(content)
    if flags.use_fp16:
        guessed["fp16"] = "computed in float32; with use_fp16 the original computes in float16"
    return guessed


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before a refusal of its content."""
    try:
        yield
    except InputRefused as error:
        raise InputRefused(f"{path}: {error}") from error
