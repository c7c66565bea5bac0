r"""The bound of infinitely many latents as a training objective.

With λ = log-SNR, as N → ∞ the sum of the bound's pairs becomes an integral over time,

    L = KL(q(x_N|x_0) ‖ p(x_N)) + ½ ∫ (−λ′(t)) E‖ε − ε̂‖² dt + E[−log p_θ(x_0|x_1)],

of which one time is drawn per example.

References:
    Kingma et al. 2021, Variational diffusion models, eq. 17-18, appendix I.2.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from nelbo.bound import decoder_term, draw, prior_term
from nelbo.estimate import NATS
from nelbo.learned_schedule import LearnedLogSNR
from nelbo.objectives import Objective, noise_error
from nelbo.reverse import Prediction, Reverse
from nelbo.schedules import Smooth

DECODER = 1 / 16
"""How often the decoder is drawn beside a continuum of times."""


class Continuous(Objective):
    """The bound as N → ∞: prior KL at t_N, decoder at t_1, and ½ ∫ E‖ε − ε̂‖² dλ between them.

    The integral is cut at the times of the grid. Index i ≥ 1 stands for (t_{i−1}, t_i), where t is
    uniform and the part is ½ (−λ′(t)) ‖ε − ε̂‖² (t_i − t_{i−1}); index 0 is the decoder. Nothing
    is lost by the cuts: they only let probabilities vary over time. A fixed schedule changes
    nothing between its end points, and of a learned one (`LearnedLogSNR`) this trains the end
    points, and the shape for the least variance of one draw, in the same backward pass.

    Arguments:
        times: (N,), N ≥ 2. probabilities: (N,); if None, the decoder is drawn with `decoder` and
            every time alike with the rest.
        decoder: how often the decoder is drawn.

    References:
        Kingma et al. 2021, eq. 17–18, appendix I.2.
    """

    unit = NATS

    def __init__(
        self, times: Tensor, probabilities: Tensor | None = None, decoder: float = DECODER
    ) -> None:
        if len(times) < 2:
            raise ValueError("an integral over time needs two end points: take N ≥ 2 latents")
        if probabilities is None:
            widths = times.diff() / (times[-1] - times[0])
            probabilities = torch.cat([times.new_full((1,), decoder), (1 - decoder) * widths])
        super().__init__(times, probabilities)

    def given(
        self,
        model: Reverse,
        x_0: Tensor,
        index: Tensor,
        fraction: Tensor,
        probability: Tensor,
        cond: Any = None,
    ) -> Tensor:
        """(B,) losses at given places."""
        times = self.grid(x_0.device)
        before = times[(index - 1).clamp(min=0)]
        t = before + fraction * (times[index] - before)
        schedule = _smooth(model)
        learned = schedule if isinstance(schedule, LearnedLogSNR) else None
        with learned.routed(len(x_0)) if learned else nullcontext() as weights:
            at = model.at(draw(model, x_0, t), t, cond)
            loss = self.loss(at, x_0, index, probability)
        if weights is not None:
            # per dimension, so that the gradient keeps its size beside the others
            weights.settle((loss - self.always(at, x_0)).detach() / x_0[0].numel())
        return loss

    def always(self, at: Prediction, x_0: Tensor) -> Tensor:
        return prior_term(at.model, x_0, self.grid(x_0.device))

    def part(self, at: Prediction, x_0: Tensor, index: Tensor) -> Tensor:
        times = self.grid(index.device)
        width = times[index] - times[(index - 1).clamp(min=0)]
        rate = -0.5 * _smooth(at.model).slope(at.t) * width
        # at the decoder's time the width is 0, and with it this part
        value = rate.to(x_0.device) * noise_error(at, x_0)
        if index.is_cuda:
            nearest = Prediction(at.model, at.x_t, times[:1].expand_as(at.t), at.output)
            return value + torch.where(index == 0, decoder_term(nearest, x_0), 0.0)
        rows = (index == 0).nonzero()[:, 0].to(x_0.device)
        return value.index_add(0, rows, decoder_term(at[rows], x_0[rows])) if len(rows) else value


def _smooth(model: Reverse) -> Smooth:
    schedule = model.process.schedule
    if not isinstance(schedule, Smooth):
        raise ValueError(
            f"{type(schedule).__name__} is defined at its own steps only, and the bound in "
            "continuous time needs every time: take LogSNRLinear or LearnedLogSNR"
        )
    return schedule
