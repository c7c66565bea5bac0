"""How a network is computed: kernels of our own, algorithms chosen by trial, compilation.

None of it changes a tensor, a name or what is computed, only how; results differ by rounding.
"""

from __future__ import annotations

import torch
from torch import nn

from nelbo.errors import InputRefused, UsageError
from nelbo.networks import native, triton_norm

KERNELS = ("auto", "plain", "triton", "native")


def prepared(
    network: nn.Module,
    device: str | torch.device,
    *,
    kernels: str = "auto",
    compiled: bool = False,
    graphs: bool = True,
) -> str:
    """Make a network fast on a device, in place; a sentence that says what was done.

    Arguments:
        kernels: "plain", "triton" (CUDA), "native" (C, on a processor), or "auto": the one of the
            device where it can run, else plain, and why.
        compiled: torch.compile.
        graphs: with compiled, on CUDA: replay the kernels of a shape as one graph. Every gradient
            lives until the next forward call only, so a batch must not be split.
    Raises:
        InputRefused: triton or native was asked for and cannot run on the device, or the network
            has nothing for them to do.
        UsageError: no such kernels.
    """
    if kernels not in KERNELS:
        raise UsageError(f"kernels are one of {', '.join(KERNELS)}, not {kernels!r}")
    if torch.device(device).type == "cuda":
        # shapes are fixed in training: trying the algorithms of a convolution pays at once
        torch.backends.cudnn.benchmark = True
    said = f"kernels: {_fused(network, torch.device(device), kernels, compiled)}"
    if compiled:
        replayed = graphs and torch.device(device).type == "cuda"
        network.compile(mode="reduce-overhead" if replayed else None)
        said += ", compiled, replayed as a graph" if replayed else ", compiled"
    return said


def _fused(network: nn.Module, device: torch.device, kernels: str, compiled: bool) -> str:
    # the compiler cannot look into C, and what it makes of torch's functions has no such need
    whole = compiled and device.type == "cpu"
    wanted = kernels
    if kernels == "auto":
        wanted = "triton" if device.type == "cuda" else "native"
    maker = {"triton": triton_norm, "native": native}.get(wanted)
    if maker is None:
        return "plain"
    if not any(hasattr(part, "kernels") for part in network.modules()):
        if kernels == "auto":
            return "plain"
        raise InputRefused(
            f"--kernels {kernels} computes parts of a U-Net, and this network has none: leave it "
            "out"
        )
    if kernels == "auto":
        reason = "the network is compiled" if whole else maker.obstacle(device)
        if reason is not None:
            return f"plain ({wanted}: {reason})"
    return f"{wanted} in {maker.fuse(network, device)} places"
