r"""Exact models of bits that are one of few known patterns, and their bound by enumeration.

With evidence e_i = log q(x_{t,i}|1) − log q(x_{t,i}|0), a pattern m has the posterior weight
exp(Σ_i m_i e_i), up to a factor, and

    logit P(x_{0,i}=1|x_t) = log Σ_{m: m_i=1} exp(m·e) − log Σ_{m: m_i=0} exp(m·e).

For the heartbeat the classes of places with the same phase matter only through their numbers of
ones, and the classes of the phases that are not the true one only through how many of them hold
how many: a few hundred states stand for all 2^length latents, and the bound of the exact kernels
is a sum.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nelbo.bound import prior_term, term_of
from nelbo.data.heartbeat import patterns
from nelbo.distributions import per_example
from nelbo.processes.bernoulli import Bernoulli
from nelbo.reverse import Reverse


class PatternPosterior(nn.Module):
    """logit P(x_0=1|x_t) of data that is one of M equally likely patterns.

    Arguments:
        known: (M, D) bits. process: that drew x_t.
    """

    known: Tensor

    def __init__(self, known: Tensor, process: Bernoulli) -> None:
        super().__init__()
        self.register_buffer("known", known.double(), persistent=False)
        self.process = process

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B, D) in the dtype of x_t; ±∞ where the patterns agree."""
        q = self.process.schedule
        x = x_t.double()
        evidence = self.process.evidence(x, q.log_keep(t), q.log_lose(t))
        known = self.known.to(x)
        score = (evidence @ known.T)[:, :, None]
        one, zero = (score + mask.log() for mask in (known, 1 - known))
        out: Tensor = one.logsumexp(1) - zero.logsumexp(1)
        return out.to(x_t.dtype)


@dataclass(frozen=True)
class States:
    """Latents (S, length) that stand for all, seen from one pattern.

    Arguments:
        share: of the patterns that look like this one. pattern: (length,). log_count: (S,) how
            many latents a state stands for.
    """

    share: float
    pattern: Tensor
    latents: Tensor
    log_count: Tensor


def states(length: int, period: int) -> Iterator[States]:
    """The states of the heartbeat, from each kind of phase (one kind if period divides length)."""
    places = [list(range(phase, length, period)) for phase in range(period)]
    sizes = Counter(len(p) for p in places)
    rows = patterns(length, period).double()
    for size, count in sizes.items():
        phase = next(i for i, p in enumerate(places) if len(p) == size)
        others = [p for i, p in enumerate(places) if i != phase]
        groups = [[p for p in others if len(p) == k] for k in sorted({len(p) for p in others})]
        fills = [_fills([places[phase]]), *(_fills(g) for g in groups)]
        latents, logs = [], []
        for parts in itertools.product(*fills):
            x = torch.zeros(length, dtype=torch.float64)
            x[[i for ones, _ in parts for i in ones]] = 1
            latents.append(x)
            logs.append(sum(log for _, log in parts))
        log_count = torch.tensor(logs, dtype=torch.float64)
        yield States(count / period, rows[phase], torch.stack(latents), log_count)


def _fills(group: list[list[int]]) -> list[tuple[list[int], float]]:
    """Ways to fill classes of one size with ones, up to order: places, log number of latents."""
    size, n = len(group[0]), len(group)
    out = []
    for counts in itertools.combinations_with_replacement(range(size + 1), n):
        ones = [i for c, p in zip(counts, group, strict=True) for i in p[:c]]
        log = sum(math.log(math.comb(size, c)) for c in counts) + math.lgamma(n + 1)
        log -= sum(math.lgamma(k + 1) for k in Counter(counts).values())
        out.append((ones, log))
    return out


def number_of_states(length: int, period: int) -> int:
    """How many states `states` gives, without making them."""
    sizes = Counter(len(range(phase, length, period)) for phase in range(period))
    total = 0
    for own in sizes:
        left = sizes - Counter({own: 1})
        total += (own + 1) * math.prod(math.comb(k + n, n) for k, n in left.items())
    return total


@torch.no_grad()
def expected_terms(model: Reverse, length: int, period: int, times: Tensor) -> Tensor:
    """(1 + N,) E prior, E decoder and E KL of every pair, nats, of a model that treats the places
    of a phase, and the phases, alike: exact, no sampling.

    Arguments:
        times: (N,). model: in float64, as `PatternPosterior` is.
    """
    out = torch.zeros(len(times) + 1, dtype=torch.float64)
    for here in states(length, period):
        x_0 = here.pattern.expand_as(here.latents)
        out[0] += here.share * prior_term(model, x_0[:1], times)[0]
        for i, t in enumerate(times):
            log_q = per_example(model.process.marginal(x_0, t).log_prob(here.latents))
            value = term_of(model.at(here.latents, t), x_0, times, torch.tensor(i))
            out[1 + i] += here.share * ((log_q + here.log_count).exp() * value).sum()
    return out
