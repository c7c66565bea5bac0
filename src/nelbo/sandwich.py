"""The sandwich: a divergence held from both sides by two instruments that do not know each other.

From below a discriminator certifies JSD(p, g) >= x. From above, where g is the very sampler that a
variational bound E L >= H(p) + KL(p || g) belongs to,

    JSD(p, g) <= phi(exp(-KL)) <= phi(exp(-(E L - H(p)))),    phi falls in its argument,

so that x <= phi(exp(-(E L - H(p)))), which is the same as E L >= H(p) + kappa(x). With the entropy
known this tests both halves of the program together: a violation is a bug in one of them. Without
it, it says something of the data: H(p) <= E L - kappa(x). The lower side holds without
asymptotics; the mean of L is known with a standard error only, so that the upper side uses the
mean + 1.645 se and is asymptotic.

References:
    Goodfellow et al. 2014; Nguyen, Wainwright and Jordan 2010 (variational lower bounds).
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from nelbo.console import table
from nelbo.estimate import NATS, Estimate, at_least, at_most
from nelbo.jsd import kappa, phi

ONE_SIDED95 = 1.644854
"""Standard errors above the mean that a normal mean exceeds in 5 % of samples."""


@dataclass(frozen=True)
class Reference:
    """A value of the divergence that is known by other means.

    Arguments:
        jsd_nats, error: the value and its absolute error.
        what: the words for it, such as `quadrature`.
        blurred: it is that of both laws after one and the same channel, so that it lies below the
            divergence of the pair itself and only the upper side must hold for it.
    """

    jsd_nats: float
    error: float = 0.0
    what: str = "quadrature"
    blurred: bool = False


@dataclass(frozen=True)
class Sandwich:
    """A certified lower bound on JSD(p, g) and what the variational bound of g says above it.

    Arguments:
        lower: certified, in nats, with confidence `level`.
        bound: E L of the same sampler in nats/example, a density's in the units of the stored
            data, or None for a sampler without one.
        entropy: H(p) in nats in the same units, where it is known. entropy_error: its own.
        exact: the divergence, where it is known.
    """

    lower: float
    level: float
    bound: Estimate | None = None
    entropy: float | None = None
    entropy_error: float = 0.0
    exact: Reference | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.lower <= math.log(2) and 0 < self.level < 1
        assert self.bound is None or self.bound.unit == NATS, "the bound in nats/example"

    @cached_property
    def kappa(self) -> float:
        """KL(p || g) that the lower bound certifies, in nats."""
        return float(kappa(torch.tensor(self.lower, dtype=torch.float64)))

    @property
    def gap(self) -> float | None:
        """E L - H(p) at the upper end of its asymptotic 95 % interval, in nats; None if unknown.

        At least KL(p || g) with that confidence, and negative only by a bug or by chance. Unknown
        as well where the bound's own error is.
        """
        if self.bound is None or self.entropy is None or not math.isfinite(self.bound.se):
            return None
        spread = ONE_SIDED95 * self.bound.se + self.entropy_error
        return self.bound.mean + spread - self.entropy

    @property
    def upper(self) -> float | None:
        """phi(exp(-gap)) in nats, asymptotically above JSD in 95 % of samples; None if unknown.

        A negative gap leaves no divergence that fits it; then the upper side is 0.
        """
        return None if self.gap is None else _phi(max(self.gap, 0.0))

    @property
    def central(self) -> float | None:
        """phi(exp(-(E L - H))) at the mean itself, without its error; None if unknown."""
        if self.bound is None or self.entropy is None:
            return None
        return _phi(max(self.bound.mean - self.entropy, 0.0))

    @property
    def entropy_upper(self) -> Estimate | None:
        """E L - kappa(lower), above H(p); with the errors of the bound. None without a bound."""
        return self.bound and replace(self.bound, mean=self.bound.mean - self.kappa)

    @property
    def holds(self) -> bool:
        """No side contradicts another."""
        return not self._faults()

    @property
    def verdict(self) -> str:
        """One sentence: what holds, or what contradicts what."""
        if faults := self._faults():
            return "a bug: " + "; ".join(faults) + f". {self._chance()}"
        if self.upper is not None:
            return f"holds: {at_least(self.lower)} <= {at_most(self.upper)} nats."
        if self.bound is not None and self.entropy is not None:
            return "the error of the bound is not known: nothing bounds JSD from above."
        if self.bound is not None:
            return "the entropy of the data is not known: nothing bounds JSD from above."
        return "this sampler has no bound: nothing bounds JSD from above."

    def _faults(self) -> list[str]:
        faults, upper, exact = [], self.upper, self.exact
        above = at_least(self.lower)
        if self.gap is not None and self.gap < 0:
            faults.append(f"the bound lies {-self.gap:.4g} nats below the entropy of the data")
        elif upper is not None and self.lower > upper:
            faults.append(f"JSD >= {above} and JSD <= {at_most(upper)} nats contradict")
        if exact is not None and not exact.blurred and self.lower > exact.jsd_nats + exact.error:
            faults.append(f"JSD >= {above} was certified, and it is {exact.jsd_nats:.4f}")
        if exact is not None and upper is not None and exact.jsd_nats - exact.error > upper:
            faults.append(f"JSD <= {at_most(upper)} was found, and it is {exact.jsd_nats:.4f}")
        return faults

    def _chance(self) -> str:
        return (
            f"(Chance alone does this in at most {100 * (1 - self.level):.3g} % of certificates, "
            "and in about 5 % of upper sides: look at another seed first.)"
        )

    def as_json(self) -> dict[str, object]:
        """A JSON object; what is not known is null."""
        above, exact = self.entropy_upper, self.exact
        known = exact and {
            "jsd_nats": exact.jsd_nats,
            "error": exact.error,
            "what": exact.what,
            "blurred": exact.blurred,
        }
        return {
            "jsd_nats_lower": self.lower,
            "level": self.level,
            "jsd_nats_upper": self.upper,
            "upper_level": None if self.upper is None else "0.95, asymptotic",
            "exact": known,
            "bound_nats": self.bound and self.bound.as_json(),
            "entropy_nats": self.entropy,
            "kappa_nats": self.kappa if math.isfinite(self.kappa) else None,
            "entropy_upper_nats": above and above.as_json(),
            "holds": self.holds,
            "verdict": self.verdict,
        }

    def rows(self) -> list[list[str]]:
        """Name, value and confidence of every line of the table."""
        sure = f"{100 * self.level:.3g} %"
        rows = [["JSD from below, certified", f">= {at_least(self.lower)}", sure]]
        if self.exact is not None:
            rows.append([f"JSD, {self.exact.what}", _known(self.exact), "exact"])
        if self.upper is not None:
            upper = f"<= {at_most(self.upper)}"
            rows.append(["JSD from above, phi(exp(H - bound))", upper, "95 %, asymptotic"])
        if self.bound is not None:
            rows.append(["bound E L", _short(self.bound), "± se"])
        if self.entropy is not None:
            rows.append(["entropy H of the data", f"{self.entropy:.4f}", "exact"])
        rows.append(["kappa: KL(p || g) from below", f">= {at_least(self.kappa)}", sure])
        if self.entropy_upper is not None:
            rows.append(["so H <= bound - kappa", f"<= {_short(self.entropy_upper)}", "± se"])
        return rows

    def __str__(self) -> str:
        """A table of at most 80 columns, all in nats, and the verdict."""
        lines = table(self.rows(), ["sandwich", "nats", "confidence"])
        return "\n".join([lines, *textwrap.wrap(self.verdict, 80)])


def _phi(gap: float) -> float:
    return float(phi(torch.tensor(-gap, dtype=torch.float64).exp()))


def _short(value: Estimate) -> str:
    return str(value).partition(f" {value.unit}")[0]


def _known(exact: Reference) -> str:
    text = f"{exact.jsd_nats:.4f}"
    return text if exact.error < 5e-5 else f"{text} ± {exact.error:.4f}"
