r"""Between two images, through the latent at time t.

Both are given the same noise, x_t = √k x_0 + √l ε and x_t′ = √k x_0′ + √l ε; a point between them,

    x̄_t = (1 − λ) x_t + λ x_t′,

has the noise level of a latent of time t, and the model walks from it to data. The noise of the
walk is the same for every λ, so that what differs between neighbours is λ alone. Late t keeps
little of either image, early t all of it.

References:
    Ho, Jain, Abbeel 2020, section 4.4, figures 8 and 9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nelbo.processes.base import along
from nelbo.reverse import Reverse, gaussian_process


@torch.no_grad()
def interpolate(model: Reverse, ends: Tensor, shares: Tensor, times: Tensor) -> Tensor:
    """(m, *shape) data on the model's scale; draws from the global generator.

    Arguments:
        ends: (2, *shape) the two images on the model's scale.
        shares: (m,) λ, 0 for the first image and 1 for the second.
        times: (N,) increasing: the way back starts at the last one.
    """
    x_t = between(model, ends, shares, times[-1])
    for i in range(len(times) - 1, 0, -1):
        law = model.kernel(x_t, times[i], times[i - 1])
        x_t = law.mean + law.variance.sqrt() * torch.randn_like(x_t[:1])
    drawn: Tensor = model.decoder(x_t, times[0]).sample()
    return drawn


def between(model: Reverse, ends: Tensor, shares: Tensor, t: Tensor) -> Tensor:
    """(m, *shape) (1 − λ) x_t + λ x_t′ with noise that both ends share.

    Raises:
        ValueError: the process is not Gaussian.
    """
    schedule = gaussian_process(model.process, "interpolation").schedule
    share = along(shares, ends)
    mixed = (1 - share) * ends[:1] + share * ends[1:]
    noise = torch.randn_like(ends[:1])
    return (
        along(schedule.keep(t).sqrt(), mixed) * mixed
        + along(schedule.lose(t).sqrt(), mixed) * noise
    )
