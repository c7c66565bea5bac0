r"""The variational bound, by term, for any family.

    L(x_0) = KL(q(x_N|x_0) ‖ p(x_N))                                        prior
           + Σ_pairs E_{q(x_t|x_0)} KL(q(x_s|x_t, x_0) ‖ p_θ(x_s|x_t))       diffusion
           + E_{q(x_1|x_0)} [−log p_θ(x_0|x_1)]                             reconstruction

in nats per example, summed over dimensions. L ≥ −log p_θ(x_0). Each expectation is estimated by
one fresh draw of its own x_t; nothing here knows a family, only distributions.

References:
    Sohl-Dickstein et al. 2015, section 2.4; Ho, Jain, Abbeel 2020, eq. 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nelbo.distributions import kl_divergence, per_example
from nelbo.reverse import Prediction, Reverse


@dataclass(frozen=True)
class Bound:
    """The bound of a batch by term, nats per example, float64."""

    prior: Tensor
    """(B,)"""
    diffusion: Tensor
    """(B, N−1); column i−1 is the pair (times[i−1], times[i])."""
    reconstruction: Tensor
    """(B,)"""

    @property
    def total(self) -> Tensor:
        """(B,) prior + Σ diffusion + reconstruction."""
        return self.prior + self.diffusion.sum(1) + self.reconstruction


def prior_term(model: Reverse, x_0: Tensor, times: Tensor) -> Tensor:
    """KL(q(x_N|x_0) ‖ p(x_N)), exact, no network call; (B,) nats."""
    process = model.process
    marginal = process.marginal(x_0, times[-1])
    return per_example(kl_divergence(marginal, process.prior(x_0)))


def pair_term(at: Prediction, x_0: Tensor, s: Tensor) -> Tensor:
    """KL(q(x_s|x_t, x_0) ‖ p_θ(x_s|x_t)) at the prediction's (x_t, t); (B,) nats."""
    posterior = at.model.process.posterior(at.x_t, x_0, at.t, s)
    return per_example(kl_divergence(posterior, at.kernel(s)))


def decoder_term(at: Prediction, x_0: Tensor) -> Tensor:
    """−log p_θ(x_0|x_1) at the prediction's x_1; (B,) nats."""
    return -per_example(at.decoder().log_prob(x_0))


def term_of(at: Prediction, x_0: Tensor, times: Tensor, index: Tensor) -> Tensor:
    """The term that a prediction belongs to; (B,) nats.

    Arguments:
        at: a prediction at x_t ~ q(x_t|x_0), t = times[index].
        x_0: (B, *shape). times: (N,) increasing. index: (B,) int64 in 0..N−1 or ();
            0 is the decoder term, i ≥ 1 the pair (times[i−1], times[i]).
    """
    if index.dim() == 0:
        i = int(index)
        return decoder_term(at, x_0) if i == 0 else pair_term(at, x_0, times[i - 1])
    if index.is_cuda:  # to ask how many rows are of which kind would stall the queue
        return term_masked(at, x_0, times, index)
    values = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
    first, others = (index == 0).nonzero()[:, 0], (index > 0).nonzero()[:, 0]
    if len(first):
        rows = first.to(x_0.device)
        values = values.index_copy(0, rows, decoder_term(at[rows], x_0[rows]))
    if len(others):
        rows = others.to(x_0.device)
        value = pair_term(at[rows], x_0[rows], times[index[others] - 1])
        values = values.index_copy(0, rows, value)
    return values


def term_masked(at: Prediction, x_0: Tensor, times: Tensor, index: Tensor) -> Tensor:
    """`term_of` in operations whose sizes do not depend on the index; (B,) nats.

    Both kinds are computed for every row and one is taken. What is not taken is read at a time at
    which it is finite: the gradient of what is infinite would not be 0, but no number.

    Arguments:
        as of `term_of`, all on one device.
    """
    first = index == 0
    nearest = torch.where(first, at.t, times[0])
    decoder = decoder_term(Prediction(at.model, at.x_t, nearest, at.output), x_0)
    if len(times) == 1:
        return decoder
    later = torch.where(first, times[1], at.t)
    s = times[(index - 1).clamp(min=0)]
    return torch.where(
        first, decoder, pair_term(Prediction(at.model, at.x_t, later, at.output), x_0, s)
    )


def draw(model: Reverse, x_0: Tensor, t: Tensor) -> Tensor:
    """x_t ~ q(x_t|x_0), (B, *shape); t () or (B,).

    The noise is held where the family allows it, so that a learned schedule has a gradient.

    Raises:
        ValueError: the process has parameters and its draws have no gradient.
    """
    law = model.process.marginal(x_0, t)
    if law.has_rsample:
        return law.rsample()
    if any(p.requires_grad for p in model.process.parameters()):
        raise ValueError(
            f"{type(model.process).__name__} draws discrete latents, through which a schedule "
            "cannot learn: give it a fixed schedule"
        )
    return law.sample()


def term(model: Reverse, x_0: Tensor, times: Tensor, index: Tensor, cond: Any = None) -> Tensor:
    """One term per example with one network call: what objectives and evaluation draw.

    Arguments:
        x_0: (B, *shape). times: (N,). index: () or (B,), see `term_of`.
    Returns:
        (B,) nats. Σ_i over 0..N−1 plus `prior_term` is the bound in expectation.
    """
    t = times[index]
    return term_of(model.at(draw(model, x_0, t), t, cond), x_0, times, index)


def bound(model: Reverse, x_0: Tensor, times: Tensor, cond: Any = None) -> Bound:
    """All terms, each with its own draw: N network calls per example.

    Arguments:
        x_0: (B, *shape) on the model's scale. times: (N,) increasing, float64.
    """
    index = torch.arange(len(times))
    terms = torch.stack([term(model, x_0, times, i, cond) for i in index], dim=1)
    return Bound(prior_term(model, x_0, times), terms[:, 1:], terms[:, 0])
