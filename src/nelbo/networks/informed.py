"""A network that is told how noisy its input is, not when it was made.

A learned schedule moves the noise of every time, so that t means nothing that lasts; the log-SNR
does. On a schedule that is linear in log-SNR the two are the same number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nelbo.schedules import Schedule


class Informed(nn.Module):
    """Calls network(x_t, scale (high − λ(t))/(high − low)), whatever the schedule is at the time.

    Arguments:
        network: the module to call. schedule: of the process; its parameters stay the process's.
        high, low: log-SNRs that become 0 and `scale`: constants, those that the schedule started
            with.
        scale: timesteps from one to the other.

    References:
        Kingma et al. 2021, Variational diffusion models, appendix B.
    """

    def __init__(
        self, network: nn.Module, schedule: Schedule, high: float, low: float, scale: float
    ) -> None:
        super().__init__()
        self.network = network
        self.held = [schedule]  # in a list, so that its parameters are listed once
        self.high = high
        self.per_logsnr = scale / (high - low)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Computed in float64 and passed on in float32."""
        out: Tensor = self.network(x_t, self._told(torch.as_tensor(t)).to(x_t.device), cond)
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the schedule hooks its gradients
    def _told(self, t: Tensor) -> Tensor:
        steps: Tensor = (self.high - self.held[0].logsnr(t)) * self.per_logsnr
        return steps.float()
