r"""Output heads: wrappers that widen what a network says about each dimension.

`LevelHead` gives a logit for each of n levels from few numbers per dimension. The logits are a
combination of fixed functions of the level, cosines that fade towards the fast ones and a spike at
either end, plus a learned bias that depends on the place alone:

    logit_j = Σ_m h_m cos(π m (j + ½)/n)/(1 + (m/2)²) + h_low [j = 0] + h_high [j = n−1] + bias_j.

A network with free logits can memorise the exact level of every training pixel; one that speaks in
smooth functions of the level cannot, and on little data it predicts better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nelbo.networks.layers import Dropout
from nelbo.randomness import picked, place_of


def level_basis(levels: int, waves: int) -> Tensor:
    """(waves + 2, n) float32: fading cosines, then the two spikes."""
    j = torch.arange(levels, dtype=torch.float64)
    m = torch.arange(1, waves + 1, dtype=torch.float64)[:, None]
    cosines = torch.cos(math.pi * m * (j + 0.5) / levels) / (1 + (m / 2) ** 2)
    ends = torch.stack([j == 0, j == levels - 1]).double()
    return torch.cat([cosines, ends]).float()


class LevelHead(nn.Module):
    """Logits (B, C·n, H, W) from a network with C·(waves + 2) output channels.

    Arguments:
        network: the wrapped network.
        shape: (C, H, W) of the data.
        levels: n.
        waves: how many cosines.
    """

    basis: Tensor

    def __init__(
        self, network: nn.Module, shape: tuple[int, ...], levels: int, waves: int = 8
    ) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("basis", level_basis(levels, waves), persistent=False)
        self.bias = nn.Parameter(torch.zeros(shape[0], levels, *shape[1:]))

    @staticmethod
    def channels(data_channels: int, waves: int) -> int:
        """Output channels that the wrapped network must have."""
        return data_channels * (waves + 2)

    @torch.no_grad()
    def start_at(self, frequencies: Tensor) -> None:
        """Set the bias to log frequencies (C, n, H, W), all positive, of the training data."""
        self.bias.copy_(frequencies.log())

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Call the network and expand its channels."""
        h = self.network(x_t, t, cond)
        grouped = h.unflatten(1, (-1, len(self.basis)))
        logits = torch.einsum("bcmhw,mn->bcnhw", grouped, self.basis.to(h.dtype)) + self.bias
        return logits.flatten(1, 2)


class Ensemble(nn.Module):
    """The mean output of several networks; in training each learns from its own part of a batch.

    A batch costs as much as one network's in training, and one call of every member afterwards.
    On little data the members overfit differently, and their mean overfits less.

    Arguments:
        members: networks of one kind, with weights of their own.

    References:
        Lakshminarayanan, Pritzel, Blundell 2017, Simple and scalable predictive uncertainty
        estimation using deep ensembles.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B, ...) the mean over members; in training row b comes from member b mod members."""
        count = len(self.members)
        if not self.training:
            mean: Tensor = sum(member(x_t, t, cond) for member in self.members) / count
            return mean
        times = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        out: Tensor | None = None
        start, _ = place_of(len(x_t))
        for k, member in enumerate(self.members):
            rows = torch.arange((k - start) % count, len(x_t), count)
            if not len(rows):
                continue
            here = rows.to(x_t.device)
            with picked(rows, f"member {k}"):
                part = member(x_t[here], times[here], None if cond is None else cond[here])
            if out is None:
                out = part.new_zeros(len(x_t), *part.shape[1:])
            out[here] = part
        assert out is not None, "an ensemble has members"
        return out


def channel_dropout(module: nn.Module) -> nn.Module:
    """Turn every dropout of a convolutional network into dropout of whole channels, in place.

    Dropped single values of a feature map can be read off their neighbours; dropped channels
    cannot. No parameter has another name or shape afterwards.

    References:
        Tompson et al. 2015, Efficient object localization using convolutional networks.
    """
    for name, child in module.named_children():
        if isinstance(child, Dropout):
            setattr(module, name, Dropout(child.p, channels=True))
        else:
            channel_dropout(child)
    return module
