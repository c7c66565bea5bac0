"""A residual perceptron for vectors: each block normalises, is scaled and shifted by the time.

    h_0 = W_in x
    h_{k+1} = h_k + V_k SiLU(U_k (norm(h_k) (1 + a_k) + b_k)),   (a_k, b_k) = linear maps of e(t)
    y = W_out norm(h_depth)

The score of data on a curve changes its shape from one noise level to the next, so the time enters
every block as a factor, not as one more input. The output starts at zero.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from nelbo.errors import InputRefused
from nelbo.networks.layers import TimeFeatures, per_example, without_condition


class MLP(nn.Module):
    """Residual perceptron (B, dims) -> (B, out), for the model's own time in [0, 1].

    Arguments:
        dims: D, the length of the input vectors.
        width: of the hidden states.
        depth: residual blocks of two linear layers each.
        time_width: features of the embedded time.
        out: length of the output vectors; D when None.
    """

    def __init__(
        self,
        dims: int,
        width: int = 128,
        depth: int = 3,
        time_width: int = 64,
        out: int | None = None,
    ) -> None:
        super().__init__()
        self.dims = dims
        self.time = TimeFeatures(time_width)
        self.first = nn.Linear(dims, width)
        self.blocks = nn.ModuleList([_Block(width, time_width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, dims if out is None else out)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Tensor | None = None) -> Tensor:
        """Apply the network.

        Arguments:
            x_t: (B, dims).
            t: () or (B,), in [0, 1].
            cond: must be None.

        Returns:
            (B, out).

        Raises:
            InputRefused: the shape of x_t or t is off, or cond is given.
        """
        without_condition(cond, self)
        if x_t.ndim != 2 or x_t.shape[1] != self.dims:
            raise InputRefused(f"the MLP reads (B, {self.dims}), this input is {tuple(x_t.shape)}")
        embedded = self.time(per_example(t, x_t))
        h = self.first(x_t)
        for block in self.blocks:
            h = block(h, embedded)
        out: Tensor = self.last(self.norm(h))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.time = nn.Linear(time_width, 2 * width)
        self.linear_1 = nn.Linear(width, 2 * width)
        self.linear_2 = nn.Linear(2 * width, width)

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.time(embedded).chunk(2, dim=1)
        timed = self.norm(h) * (1 + scale) + shift
        out: Tensor = h + self.linear_2(F.silu(self.linear_1(timed)))
        return out
