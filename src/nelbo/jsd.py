r"""The Jensen-Shannon divergence, bounded from below by samples.

With the logit s of any discriminator D, clipped to [-B, B], one pair (x, y) of a real and a fake
pays

    Z = 1/2 [log 2 - sp(-s(x))] + 1/2 [log 2 - sp(s(y))],   sp(s) = log(1 + e^s),

between log 2 - sp(B) and log 2 - sp(-B), a range of width exactly B. Its mean L(D) is at most
JSD(p, g), because the slack is a mean Kullback-Leibler divergence. The bound is what a gambler can
prove: for a candidate mean m, capital 1 and at each pair a stake, fixed by earlier pairs alone, on
"this pair pays more than m". If the mean were m or less, the capital would reach 1/alpha at some
time with probability at most alpha (Ville). Capital falls with m, and bisection finds the largest
m at which it did reach 1/alpha. No asymptotics, and true for every D.

For a sampler that never leaves a set of p-mass r, JSD >= phi(r), and phi(exp(-KL)) >= JSD:

    phi(r) = log 2 + 1/2 [r log r - (1 + r) log(1 + r)],      kappa(x) = -log phi^-1(x).

All is float64 and in nats.

References:
    Goodfellow et al. 2014 (the game); Waudby-Smith, Ramdas 2023 (betting); Pandeva et al. 2024
    (e-values of classifiers); Maurer, Pontil 2009 (empirical Bernstein).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from nelbo.errors import InputRefused, UsageError

LOG2 = math.log(2)
CEILING = 0.75
"""Largest share of the capital that a pair can lose, c in I62."""
HALVINGS = 60
DEEP = 70


def phi(r: float | Tensor) -> Tensor:
    """log 2 + [r log r - (1 + r) log(1 + r)]/2, falling from log 2 at 0 to 0 at 1.

    Arguments:
        r: mass in [0, 1], any shape.
    Returns:
        nats, float64, of the shape of r.
    Raises:
        UsageError: r is outside [0, 1] or NaN.
    """
    mass = torch.as_tensor(r, dtype=torch.float64)
    if not bool(((mass >= 0) & (mass <= 1)).all()):
        raise UsageError(f"phi takes a mass between 0 and 1, not {r}")
    return _phi_of_gap(-mass.log())


def kappa(x: float | Tensor) -> Tensor:
    """The divergence KL that JSD >= x enforces: u with phi(exp(-u)) = x; 0 at 0, inf at log 2.

    Arguments:
        x: nats in [0, log 2], any shape.
    Returns:
        nats, float64, of the shape of x; accurate to the conditioning of x.
    Raises:
        UsageError: x is outside [0, log 2] or NaN.
    """
    jsd = torch.as_tensor(x, dtype=torch.float64)
    if not bool(((jsd >= 0) & (jsd <= LOG2)).all()):
        raise UsageError(f"kappa takes a JSD between 0 and log 2 nats, not {x}")
    # phi(exp(-u)) is concave in u: below its tangent at 0, above its chord to u = 800.
    low, high = 2 * jsd / LOG2, 800 * jsd / LOG2
    for _ in range(DEEP):
        middle = (low + high) / 2
        # Near log 2 the gap to it keeps the digits that the value itself has lost.
        more = torch.where(
            jsd < LOG2 / 2, _phi_of_gap(middle) < jsd, _short_of_log2(middle) > LOG2 - jsd
        )
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return torch.where(jsd >= LOG2, math.inf, (low + high) / 2)


def _phi_of_gap(u: Tensor) -> Tensor:
    """phi(e^-u) without cancellation at small u: [(1-r) log 2 - r u - (1+r) log((1+r)/2)]/2."""
    r, lost = torch.exp(-u), -torch.expm1(-u)
    inner = torch.where(r > 0, r * u, torch.zeros_like(u))
    return (lost * LOG2 - inner - (1 + r) * torch.log1p(-lost / 2)) / 2


def _short_of_log2(u: Tensor) -> Tensor:
    """log 2 - phi(e^-u)."""
    r = torch.exp(-u)
    return ((1 + r) * torch.log1p(r) + r * u) / 2


def payoff(real: Tensor, fake: Tensor, clip: float | Tensor) -> Tensor:
    """Z of each pair with logits clipped to [-clip, clip]; mean L(D) <= JSD.

    Arguments:
        real, fake: (n,) logits of "real" at n reals and n fakes.
        clip: B > 0, one or (n,); inf leaves the logits as they are.
    Returns:
        (n,) float64 nats, in [log 2 - sp(B), log 2 - sp(-B)].
    Raises:
        InputRefused: logits that are not finite, not (n,), or not equally many.
        UsageError: clip is not positive.
    """
    a, b = checked(real, fake)
    limit = torch.as_tensor(clip, dtype=torch.float64)
    if not bool((limit > 0).all()):
        raise UsageError(f"the clip of the logits must be positive, not {clip}")
    a, b = (torch.maximum(torch.minimum(s, limit), -limit) for s in (a, b))
    return LOG2 - (softplus(-a) + softplus(b)) / 2


def lowest(clip: float | Tensor) -> Tensor:
    """log 2 - sp(B), the least that a pair can pay."""
    return LOG2 - softplus(torch.as_tensor(clip, dtype=torch.float64))


def checked(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64 on the CPU, or a refusal; see `payoff`."""
    a, b = (torch.as_tensor(s).detach().to("cpu", torch.float64) for s in (real, fake))
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0:
        raise InputRefused(
            f"logits of shape {tuple(a.shape)} and {tuple(b.shape)}: give one per real and one "
            "fake per real, both (n,)"
        )
    for name, s in (("reals", a), ("fakes", b)):
        bad = int((~torch.isfinite(s)).sum())
        if bad:
            raise InputRefused(
                f"{bad} of {len(s)} logits of the {name} are NaN or infinite: nothing is "
                "certified by them; mend the discriminator, or lower its temperature"
            )
    return a, b


def lower_bound(
    real: Tensor, fake: Tensor, clip: float, alpha: float = 0.05, c: float = CEILING
) -> float:
    """Lower confidence bound on JSD(p, g), by betting.

    The discriminator, the clip and everything else must have been fixed before these pairs were
    opened; the pairs must be independent of it and in random order.

    Arguments:
        real, fake: (n,) held-out logits, one fake per real.
        clip: B, positive and finite.
        alpha: P(bound > L(D)) is at most alpha.
        c: the largest share of the capital that one pair may lose.
    Returns:
        nats, at least 0; 0 says that nothing was detected at this n.
    Raises:
        InputRefused: see `payoff`. UsageError: alpha is not in (0, 1), or clip not positive.
    """
    refuse_level(alpha)
    z = (payoff(real, fake, clip) - lowest(clip)) / clip
    n = len(z)
    count = torch.arange(1, n + 1, dtype=torch.float64)
    mu = (0.5 + z.cumsum(0)) / (count + 1)
    v = (0.25 + (z - mu).square().cumsum(0)) / (count + 1)
    # The stake of a pair knows the variance up to the pair before.
    before = torch.cat([torch.full((1,), 0.25, dtype=torch.float64), v[:-1]])
    stake = (2 * math.log(1 / alpha) / (n * before)).sqrt()

    def capital(m: float) -> float:
        return float(torch.log1p(stake.clamp(max=c / m) * (z - m)).cumsum(0).max())

    m = largest(capital, math.log(1 / alpha), 1e-9, 1.0)
    return max(0.0, float(lowest(clip)) + clip * m)


def largest(capital: Callable[[float], float], goal: float, low: float, high: float) -> float:
    """The largest m in (low, high) with capital(m) >= goal, of a falling capital; 0 if none."""
    if capital(low) < goal:
        return 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if capital(middle) >= goal else (low, middle)
    return low


def refuse_level(alpha: float) -> None:
    """Raise UsageError unless 0 < alpha < 1."""
    if not 0 < alpha < 1:
        raise UsageError(f"alpha = {alpha}: give the error probability, between 0 and 1")


def predicted_bound(
    real: Tensor, fake: Tensor, clip: float, n: int | None = None, alpha: float = 0.05
) -> float:
    """mean - sqrt(2 var log(1/alpha)/n) - B log(1/alpha)/n: what n pairs like these would certify.

    It chooses clip, temperature and candidate on a calibration part, and certifies nothing.

    Arguments:
        real, fake: (m,) logits of the calibration part.
        n: pairs of the certificate; m when None.
    """
    z = payoff(real, fake, clip)
    return float(promise(z, torch.tensor(float(clip)), len(z) if n is None else n, alpha))


def promise(z: Tensor, clip: Tensor, n: int, alpha: float) -> Tensor:
    """`predicted_bound` of payoffs: (..., m) nats and clips (...) -> (...) nats."""
    rate = math.log(1 / alpha) / n
    return z.mean(-1) - (2 * z.var(-1, correction=0) * rate).sqrt() - clip * rate


def plug_in(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Mean and standard error of the unclipped payoff: an estimate of L(D), not a bound.
    Returns:
        (nats, nats); the error is nan for one pair.
    """
    z = payoff(real, fake, math.inf)
    return float(z.mean()), float(z.std() / math.sqrt(len(z))) if len(z) > 1 else math.nan


def log_e_value(real: Tensor, fake: Tensor) -> float:
    """log of E = prod 4 D(x)(1 - D(y)), unclipped; reject p = g at E >= 1/alpha: E_{p=g} E <= 1.
    Returns:
        nats, twice the sum of the unclipped payoffs: no product, hence no overflow.
    """
    return float(2 * payoff(real, fake, math.inf).sum())


def hoeffding(real: Tensor, fake: Tensor, clip: float, alpha: float = 0.05) -> float:
    """mean - B sqrt(log(1/alpha)/(4n)), for 2n halves of range B/2; a reference for betting."""
    z = payoff(real, fake, clip)
    return float(z.mean()) - clip * math.sqrt(math.log(1 / alpha) / (4 * len(z)))


def empirical_bernstein(real: Tensor, fake: Tensor, clip: float, alpha: float = 0.05) -> float:
    """mean - sqrt(2 var log(2/alpha)/n) - 7 B log(2/alpha)/(3(n-1)); a reference for betting."""
    z = payoff(real, fake, clip)
    rate = math.log(2 / alpha)
    tail = 7 * clip * rate / (3 * (len(z) - 1))
    return float(z.mean() - (2 * z.var() * rate / len(z)).sqrt()) - tail


@dataclass(frozen=True)
class TwoCells:
    """JSD and total variation bounded from below by one threshold on the logit."""

    jsd_nats_lower: float
    tv_lower: float
    threshold: float


def two_cells(real: Tensor, fake: Tensor, threshold: float, alpha: float = 0.05) -> TwoCells:
    """Exact binomial limits of P(s > threshold), alpha/2 each, joined to a bound on JSD.

    bound = h((a + b)/2) - h(a)/2 - h(b)/2 at the lower limit a for reals and the upper limit b for
    fakes, if a > b, else 0. No clip; best where D is almost never wrong.

    Arguments:
        real, fake: (n,) held-out logits. threshold: fixed before they were opened.
    """
    refuse_level(alpha)
    s, t = checked(real, fake)
    a = limit_below(int((s > threshold).sum()), len(s), alpha / 2)
    b = 1 - limit_below(int((t <= threshold).sum()), len(t), alpha / 2)
    if a <= b:
        return TwoCells(0.0, 0.0, threshold)
    jsd = _entropy((a + b) / 2) - _entropy(a) / 2 - _entropy(b) / 2
    return TwoCells(max(0.0, jsd), a - b, threshold)


def limit_below(hits: int, n: int, alpha: float) -> float:
    """Clopper-Pearson: the probability at which `hits` or more of n have probability alpha."""
    if hits == 0:
        return 0.0
    k = torch.arange(hits, n + 1, dtype=torch.float64)
    size = torch.tensor(float(n + 1), dtype=torch.float64)
    ways = torch.lgamma(size) - torch.lgamma(k + 1) - torch.lgamma(size - k)

    def tail(p: float) -> float:
        return float((ways + k * math.log(p) + (n - k) * math.log1p(-p)).exp().sum())

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) < alpha else (low, middle)
    return low


def _entropy(p: float) -> float:
    """Of a coin, in nats."""
    return sum(-q * math.log(q) for q in (p, 1 - p) if q > 0)
