"""How a network is computed: fused kernels, algorithms chosen by trial, compilation.

None of it changes a tensor, a name or what is computed, only how; results differ by rounding.
"""

from __future__ import annotations

import torch
from torch import nn

from nelbo.errors import UsageError
from nelbo.networks.triton_norm import fuse, obstacle

KERNELS = ("auto", "plain", "triton")


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
        kernels: "plain", "triton", or "auto": triton where it can run, else plain, and why.
        compiled: torch.compile.
        graphs: with compiled, on CUDA: replay the kernels of a shape as one graph. Every gradient
            lives until the next forward call only, so a batch must not be split.
    Raises:
        InputRefused: triton was asked for and cannot run on the device.
        UsageError: no such kernels.
    """
    if kernels not in KERNELS:
        raise UsageError(f"kernels are one of {', '.join(KERNELS)}, not {kernels!r}")
    if torch.device(device).type == "cuda":
        # shapes are fixed in training: trying the algorithms of a convolution pays at once
        torch.backends.cudnn.benchmark = True
    said = "kernels: plain"
    reason = obstacle(device) if kernels == "auto" else None
    if reason is not None:
        said += f" (triton: {reason})"
    elif kernels != "plain":
        said = f"kernels: triton in {fuse(network, device)} places"
    if compiled:
        replayed = graphs and torch.device(device).type == "cuda"
        network.compile(mode="reduce-overhead" if replayed else None)
        said += ", compiled, replayed as a graph" if replayed else ", compiled"
    return said
