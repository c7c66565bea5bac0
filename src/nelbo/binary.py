r"""What a network's output means for bits: probabilities of data, or of a flip.

    w = P(x_0=1|x_t),                 f = P(x_s=1|x_t) = w q_1 + (1 − w) q_0,
    b = P(x_s ≠ x_t) (a flip),        f = x_t (1 − b) + (1 − x_t) b,

bit by bit, with q_j = q(x_s=1|x_t, x_0=j). The first form holds the best kernel that factorises
over bits, for any s < t; the second speaks of one step of one chain.

References:
    Sohl-Dickstein et al. 2015, table App.1 (the kernel f_b).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nelbo.bits import Bits
from nelbo.parameterizations import Chain
from nelbo.processes.bernoulli import Bernoulli
from nelbo.reverse import Decoder, Parameterization, Prediction


def bernoulli_process(at: Prediction, what: str) -> Bernoulli:
    """The process, if it is Bernoulli; otherwise a ValueError that says what needed it."""
    process = at.model.process
    if not isinstance(process, Bernoulli):
        name = type(process).__name__
        raise ValueError(f"{what} is defined for a Bernoulli process, not {name}")
    return process


class BinaryParameterization(Parameterization, ABC):
    """Shared by all parameterisations of bits: one output channel, and nothing but a mean."""

    @abstractmethod
    def data_logits(self, at: Prediction) -> Tensor:
        """logit of p(x_0=1|x_1), read by the decoder, (B, *shape)."""

    def x_0(self, at: Prediction) -> Tensor:
        return self.convert(at)

    def detach_mean(self, output: Tensor) -> Tensor:
        raise ValueError(
            "a bit has no variance apart from its mean: use the objective Vlb instead of Hybrid"
        )

    def channels(self, data_channels: int) -> int:
        return data_channels


class Logits(BinaryParameterization):
    """The network gives logit w = logit P(x_0=1|x_t)."""

    def data_logits(self, at: Prediction) -> Tensor:
        return at.output

    def convert(self, at: Prediction) -> Tensor:
        return torch.sigmoid(self.data_logits(at))

    def kernel(self, at: Prediction, s: Tensor) -> Bits:
        return mixed(at, self.data_logits(at), s)


class Context(BinaryParameterization):
    """The network gives what the other bits say of a bit; the bit's own evidence is added exactly.

    logit w = output + log q(x_t|x_0=1) − log q(x_t|x_0=0), bit by bit. Next to the data the
    evidence is all and grows without limit; the output need not follow it.
    """

    def data_logits(self, at: Prediction) -> Tensor:
        process = bernoulli_process(at, "Context")
        q = process.schedule
        own: Tensor = process.evidence(at.x_t, q.log_keep(at.t), q.log_lose(at.t))
        return at.output + own

    def convert(self, at: Prediction) -> Tensor:
        return torch.sigmoid(self.data_logits(at))

    def kernel(self, at: Prediction, s: Tensor) -> Bits:
        return mixed(at, self.data_logits(at), s)


class Flip(BinaryParameterization):
    """The network gives logit b, b = P(x_s ≠ x_t) for the step of its chain that ends in t.

    It says nothing of other steps, so that a kernel to any other s is refused. At the first time
    the step leads to the data, b = P(x_0 ≠ x_1). Elsewhere x̂_0 = (f − q_0)/(q_1 − q_0) is what
    the kernel implies; it leaves [0, 1] where the kernel is no mixture of the two posteriors.

    Arguments:
        times: (N,) the chain for which the network was trained.
    """

    def __init__(self, times: Tensor) -> None:
        super().__init__()
        self.chain = Chain(times)

    def data_logits(self, at: Prediction) -> Tensor:
        first = self.chain.before(at.t)[2]
        if not bool(first.all()):
            raise ValueError(
                "Flip reads data at the first time of its chain only: take the decoder there, or "
                "the parameterisation Logits"
            )
        return self._logits(at)

    def _logits(self, at: Prediction) -> Tensor:
        """logit f."""
        return torch.where(at.x_t > 0.5, -at.output, at.output)

    def convert(self, at: Prediction) -> Tensor:
        process = bernoulli_process(at, "Flip")
        s, t, first = self.chain.before(at.t)
        one, zero = (
            process.posterior(at.x_t, torch.full_like(at.x_t, bit), t, s).mean for bit in (1, 0)
        )
        f = torch.sigmoid(self._logits(at))
        inside = (f - zero) / (one - zero)
        return torch.where(_wide(first, f), f, inside)

    def kernel(self, at: Prediction, s: Tensor) -> Bits:
        bernoulli_process(at, "Flip")
        before, _, first = self.chain.before(at.t)
        if bool((first | ((before - s.to(before.device)).abs() > 1e-9)).any()):
            raise ValueError(
                "Flip knows the steps of its own chain only: use all of its times, or the "
                "parameterisation Logits, which serves every s < t"
            )
        return Bits(self._logits(at))


def _wide(mask: Tensor, x: Tensor) -> Tensor:
    """A mask () or (B,) as one over x (B, *shape)."""
    mask = mask.to(x.device)
    return mask if mask.dim() == 0 else mask.reshape(-1, *([1] * (x.dim() - 1)))


def mixed(at: Prediction, logits: Tensor, s: Tensor) -> Bits:
    """f = w q_1 + (1 − w) q_0, both f and 1 − f as sums of positive numbers, in logarithms.

    Arguments:
        logits: logit w, (B, *shape). s: () or (B,), before the prediction's time.
    """
    process = bernoulli_process(at, "this kernel")
    one, zero = (
        process.posterior(at.x_t, torch.full_like(at.x_t, bit), at.t, s).logits for bit in (1, 0)
    )
    of_one, of_zero = logsigmoid(logits), logsigmoid(-logits)
    yes = torch.logaddexp(of_one + logsigmoid(one), of_zero + logsigmoid(zero))
    no = torch.logaddexp(of_one + logsigmoid(-one), of_zero + logsigmoid(-zero))
    return Bits(yes - no)


class BernoulliDecoder(Decoder):
    """p(x_0=1|x_1), bit by bit, as the parameterisation reads it off the network."""

    def distribution(self, at: Prediction) -> Bits:
        parameterization = at.model.parameterization
        if not isinstance(parameterization, BinaryParameterization):
            raise ValueError(
                "BernoulliDecoder reads bits off Logits, Context or Flip: use it with one of them"
            )
        return Bits(parameterization.data_logits(at))
