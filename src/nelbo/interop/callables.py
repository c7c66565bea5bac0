"""Any Python function of (x_t, i) as a model that can be measured.

Nearly every code base has a function that takes noisy images (B, C, H, W) and whole times (B,)
from 0 to T-1, and gives the noise, the image or v. With its betas that is a complete model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nelbo.errors import InputRefused
from nelbo.interop.foreign import (
    Assumptions,
    Chain,
    Foreign,
    Predicts,
    Stated,
    Variances,
    assemble,
)
from nelbo.networks.layers import per_example

Function = Callable[[Tensor, Tensor], Tensor]


class Called(nn.Module):
    """A function of whole times as a network.

    Arguments:
        function: (x_t (B, ...), i (B,) int64) -> (B, ...).
        out: channels that it must give.
    """

    def __init__(self, function: Function, out: int) -> None:
        super().__init__()
        self.function = function
        self.out = out

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Call the function with the times as integers.

        Raises:
            InputRefused: what it returns is no tensor of the right shape.
        """
        value = self.function(x_t, per_example(t, x_t).round().long())
        want = (len(x_t), self.out, *x_t.shape[2:])
        if not isinstance(value, Tensor) or tuple(value.shape) != want:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputRefused(
                f"the function returned {found} for x_t {tuple(x_t.shape)}, expected a tensor "
                f"{want}; wrap it so that it does"
            )
        return value


def wrap(
    function: Function,
    *,
    betas: Sequence[float] | Tensor,
    shape: tuple[int, int, int],
    prediction: Predicts = "epsilon",
    variance: Variances = "posterior",
    clip: float | None = None,
    assumptions: Assumptions | None = None,
) -> Foreign:
    r"""A reverse process from a function that predicts at whole times.

    p_θ(x_{i-1}|x_i) = N(μ(x_i, x̂_0), σ²), x̂_0 from the function's output and β_1..β_T.

    Arguments:
        function: (x_t (B, C, H, W), i (B,) int64 in 0..T-1) -> (B, C, H, W), or (B, 2C, H, W) with
            the mean's part first where the variance is "between". i = 0 is one step of noise. A
            module is put into eval mode; what a closure holds is yours to put there.
        betas: (T,) of the forward process, in (0, 1).
        shape: (C, H, W).
        prediction: "epsilon", "x0", "velocity", or "mean" (of the step before).
        variance: "posterior" (β̃), "transition" (β), or "between" (learned, as improved diffusion).
        clip: size to which the sampler clips x̂_0; None: not at all.
        assumptions: scaling, levels and decoder variance.
    Returns:
        the model, its grid, and words for what was assumed.
    Raises:
        InputRefused: betas that are none.
    References:
        Ho, Jain, Abbeel 2020, eq. 5-12; Nichol, Dhariwal 2021, eq. 15.
    """
    values = torch.as_tensor(betas, dtype=torch.float64)
    chain = Chain(betas=values, predict=prediction, variance=variance, clip=clip)
    network = Called(function, shape[0] * (2 if variance == "between" else 1))
    assumptions = Assumptions() if assumptions is None else assumptions
    stated = Stated(weights="as passed")
    return assemble(network, chain, shape, assumptions, stated)
