"""Numbers that carry their error.

Over n examples with R independent Monte-Carlo replicates each, let B be the variance of the n
per-example means and W the mean variance within an example. The mean has

    se    = sqrt(B / n)          for the population: examples and Monte-Carlo noise together,
    se_mc = sqrt(W / (n R))      for this very set of examples: noise and time draws alone,

and B already contains W / R, so that the two are never added. One replicate per example cannot
tell noise from examples: its se is sound, its se_mc is unknown (nan, shown as "?").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nelbo.errors import InputRefused, NumericalFailure

NATS = "nats/example"
NORMAL95 = 1.959964
"""Standard errors to either side that hold 95 % of a normal distribution."""


def student95(freedom: float) -> float:
    """Errors to either side that hold 95 % where the error itself is known with `freedom`.

    The expansion of Student's quantile in 1/freedom, within 1 % from 3 degrees on.

    References:
        Abramowitz, Stegun 1964, 26.7.5.
    """
    z, v = NORMAL95, max(freedom, 3.0)
    first = (z**3 + z) / (4 * v)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return z + first + second + third


def at_least(value: float, digits: int = 4) -> str:
    """A lower bound as text, rounded down: no more is claimed than was found."""
    scale = 10.0**digits
    return f"{math.floor(value * scale + 1e-9) / scale:.{digits}f}"


def at_most(value: float, digits: int = 4) -> str:
    """An upper bound as text, rounded up."""
    scale = 10.0**digits
    return f"{math.ceil(value * scale - 1e-9) / scale:.{digits}f}"


@dataclass(frozen=True)
class Estimate:
    """A mean over n examples, its standard errors, and its unit."""

    mean: float
    se: float
    se_mc: float
    n: int
    unit: str = NATS

    @classmethod
    def of(
        cls,
        values: Tensor,
        *,
        exact: bool = False,
        se_mc_known: float | None = None,
        unit: str = NATS,
    ) -> Estimate:
        """Estimate the mean: se = sqrt(B/n), se_mc = sqrt(W/(nR)), in float64.

        Arguments:
            values: (n,) one value per example, or (n, R) with R independent replicates.
            exact: the (n,) values hold no Monte-Carlo noise, so that se_mc is 0.
            se_mc_known: se_mc measured by other means, for designs that couple examples
                (repeat the whole design R times: the deviation of the R means / sqrt(R)).
        Returns:
            se is nan for n = 1; se_mc is nan for one replicate that is not `exact`.
        Raises:
            InputRefused: there are no examples.
            NumericalFailure: a value is nan; the message says which.
        """
        assert values.dim() in (1, 2), "values must be (n,) or (n, R)"
        assert not exact or (values.dim() == 1 and se_mc_known is None), "exact values are (n,)"
        if values.numel() == 0:
            raise InputRefused("no examples: a mean needs at least one")
        table = values.detach().to("cpu", torch.float64).reshape(len(values), -1)
        _refuse_nan(table)
        means = table.mean(1).tolist()
        noise = 0.0 if exact else se_mc_known
        return cls(
            mean=math.fsum(means) / len(means),
            se=math.sqrt(_variance(means) / len(means)),
            se_mc=_within(table) if noise is None else noise,
            n=len(means),
            unit=unit,
        )

    def merge(self, other: Estimate) -> Estimate:
        """Pool disjoint examples exactly, as if all had been estimated at once.

        With S = n (n-1) se^2 the sum of squared deviations, S = S_1 + S_2 + n_1 n_2 (m_1-m_2)^2/n.
        There is no sum of estimates: terms of one bound share examples, and correlate.

        Raises:
            ValueError: the units differ.
        """
        if self.unit != other.unit:
            raise ValueError(f"cannot merge {self.unit} with {other.unit}: convert one first")
        n = self.n + other.n
        between = self.n * other.n / n * (self.mean - other.mean) ** 2
        squares = self._squares() + other._squares() + between
        return Estimate(
            mean=(self.n * self.mean + other.n * other.mean) / n,
            se=math.sqrt(squares / (n - 1) / n),
            se_mc=math.hypot(self.n * self.se_mc, other.n * other.se_mc) / n,
            n=n,
            unit=self.unit,
        )

    def _squares(self) -> float:
        # One example has no spread, although its standard error is unknown.
        return self.se**2 * self.n * (self.n - 1) if self.n > 1 else 0.0

    def bits(self) -> Estimate:
        """The same in bits per example: nats / log 2."""
        return self._scaled(1 / math.log(2), "bits/example")

    def bits_per_dim(self, dims: int) -> Estimate:
        """The same in bits per dimension: nats / (dims log 2)."""
        assert dims > 0
        return self._scaled(1 / (dims * math.log(2)), "bits/dim")

    def _scaled(self, factor: float, unit: str) -> Estimate:
        if self.unit != NATS:
            raise ValueError(f"only {NATS} convert to {unit}, and this is {self.unit}")
        mean, se, se_mc = (factor * x for x in (self.mean, self.se, self.se_mc))
        return replace(self, mean=mean, se=se, se_mc=se_mc, unit=unit)

    def as_json(self) -> dict[str, float | int | str | None]:
        """A JSON object {mean, se, se_mc, n, unit}; what is not finite becomes null."""
        numbers = {"mean": self.mean, "se": self.se, "se_mc": self.se_mc}
        finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        return {**finite, "n": self.n, "unit": self.unit}

    def __str__(self) -> str:
        """`3.0210 ± 0.0040 bits/dim (n=10000)`: two significant digits of the error."""
        if not math.isfinite(self.se):
            error, number = "?", f"{self.mean:.4g}"
        elif self.se == 0:
            error, number = "0", f"{self.mean:.6g}"
        else:
            # Through the rounded form, so that .0996 counts as .10 and not as .0996.
            digits = max(0, 1 - int(f"{self.se:.1e}".partition("e")[2]))
            error, number = f"{self.se:.{digits}f}", f"{self.mean:.{digits}f}"
        return f"{number} ± {error} {self.unit} (n={self.n})"


def _refuse_nan(table: Tensor) -> None:
    bad = table.mean(1).isnan().nonzero().flatten().tolist()
    # Both infinities among the means would leave the mean of all without a value as well.
    if bad or math.isnan(float(table.sum())):
        raise NumericalFailure(
            f"{len(bad)} of {len(table)} examples have no value (nan), the first ones "
            f"{bad[:8]}: the mean is not defined"
        )


def _variance(values: list[float]) -> float:
    """Unbiased variance; nan for one value."""
    if len(values) == 1:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _within(table: Tensor) -> float:
    examples, replicates = table.shape
    if replicates == 1:
        return math.nan
    within = math.fsum(table.var(1).tolist()) / examples
    return math.sqrt(within / (examples * replicates))
