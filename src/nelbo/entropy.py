r"""The bound as Sohl-Dickstein et al. wrote it: divergences plus entropies known in closed form.

    K = −Σ_pairs E KL(q(x_s|x_t, x_0) ‖ p_θ(x_s|x_t)) + H_q(X_N|X_0) − H_q(X_1|X_0) − H_p(X_N).

With the fixed edge step (`EdgeFixed`) and ce(t) = −E_q log π(x_t), the bound L of `bound` is

    E L = −K + [ce(t_N) − ce(t_1) + ce(0) − H_p(X_N)],

so K = −E L if and only if the bracket is 0: if the data has the second moment (or, for bits, the
mean activity) of π, or if π is uniform. L_null = E log π(x_0) is what π alone gives to the data.

A reverse step has an entropy between two bounds that involve the forward process only,

    H_q(X_t|X_s) + H_q(X_s|X_0) − H_q(X_t|X_0) ≤ H_q(X_s|X_t) ≤ H_q(X_t|X_s),

the lower one, H_q(X_s|X_t, X_0), always, the upper one wherever H_q(X_t) ≥ H_q(X_s).
Everything is nats per example.

References:
    Sohl-Dickstein et al. 2015, eq. 11 to 14, section 2.6 and appendix A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.distributions import kl_divergence, per_example
from nelbo.processes.base import Process
from nelbo.reverse import Reverse


@dataclass(frozen=True)
class EntropyForm:
    """K of a batch by its parts, nats per example (B,), float64."""

    divergences: Tensor
    """Σ_pairs KL, one draw of each x_t."""
    last: Tensor
    """H_q(X_N|X_0)."""
    first: Tensor
    """H_q(X_1|X_0)."""
    prior: Tensor
    """H_p(X_N)."""
    null: Tensor
    """log π(x_0), whose mean is L_null."""
    excess: Tensor
    """ce(t_N) − ce(t_1) + ce(0) − H_p(X_N): what −K lacks to be the bound with `EdgeFixed`."""

    @property
    def k(self) -> Tensor:
        """(B,) K."""
        return -self.divergences + self.last - self.first - self.prior

    @property
    def gain(self) -> Tensor:
        """(B,) K − L_null: what the model knows beyond π."""
        return self.k - self.null

    @property
    def bound(self) -> Tensor:
        """(B,) the bound L under the fixed edge step, from this form."""
        return self.excess - self.k


def entropy_form(process: Process, x_0: Tensor, times: Tensor, divergences: Tensor) -> EntropyForm:
    """K from the divergences of the pairs, however they were measured; the rest in float64.

    Arguments:
        x_0: (B, *shape). times: (N,). divergences: (B,) Σ_pairs KL in nats.
    """
    x_0 = x_0.double()
    first, last = (process.marginal(x_0, t) for t in (times[0], times[-1]))
    prior = process.prior(x_0)
    h_first, h_last, h_prior = (per_example(law.entropy()) for law in (first, last, prior))
    # the cross-entropy of q(x_t|x_0) under π is its entropy and its divergence from π
    ce_first, ce_last = (
        per_example(law.entropy() + kl_divergence(law, prior)) for law in (first, last)
    )
    null = per_example(prior.log_prob(x_0))
    excess = ce_last - ce_first - null - h_prior
    return EntropyForm(divergences, h_last, h_first, h_prior, null, excess)


def measure(model: Reverse, x_0: Tensor, times: Tensor) -> EntropyForm:
    """K with one draw of every x_t: N − 1 network calls per example, none at the first time."""
    process = model.process
    total = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
    for s, t in zip(times[:-1], times[1:], strict=True):
        x_t = process.marginal(x_0, t).sample()
        posterior = process.posterior(x_t, x_0, t, s)
        total = total + per_example(kl_divergence(posterior, model.kernel(x_t, t, s)))
    return entropy_form(process, x_0, times, total)


@dataclass(frozen=True)
class StepEntropies:
    """Bounds on the entropy of every reverse step, nats per example, (B, N−1)."""

    lower: Tensor
    """H_q(X_s|X_t, X_0)."""
    upper: Tensor
    """H_q(X_t|X_s)."""


def step_entropies(process: Process, x_0: Tensor, times: Tensor) -> StepEntropies:
    """Both bounds for every pair of neighbours, exact; their means over data bound H_q(X_s|X_t).

    Arguments:
        x_0: (B, *shape). times: (N,).
    """
    x_0 = x_0.double()
    still = torch.stack([per_example(process.marginal(x_0, t).entropy()) for t in times], 1)
    pairs = zip(times[:-1], times[1:], strict=True)
    upper = torch.stack([_transition_entropy(process, x_0, s, t) for s, t in pairs], 1)
    return StepEntropies(upper + still[:, :-1] - still[:, 1:], upper)


def _transition_entropy(process: Process, x_0: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """E_{q(x_s|x_0)} of the entropy of q(x_t|x_s); (B,)."""
    law = process.marginal(x_0, s)
    if not law.has_enumerate_support:
        # the noise of a continuous step does not depend on where it starts
        return per_example(process.transition(law.mean, s, t).entropy())
    values = [
        law.log_prob(x_s).exp() * process.transition(x_s, s, t).entropy()
        for x_s in law.enumerate_support()
    ]
    return per_example(torch.stack(values).sum(0))
