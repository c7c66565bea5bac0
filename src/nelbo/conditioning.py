r"""Conditioning: a model times a factor r(x), approximately at once, or exactly with weights.

The target is p̃(x_0) ∝ p_θ(x_0) r(x_0). `Conditioned` multiplies every kernel by r(x_s, s) (see
`factors`), which alone is approximate at any number of steps. With x_N ~ p(x_N), r(·, t_N) := 1,

    W = Π_steps Z(x_t)/r(x_t, t),   Z(x_t) = ∫ p_θ(x_s|x_t) r(x_s, s) dx_s,

E W = ∫ p_θ r, the evidence, and W-weighted x_0 follow p̃, for any positive r(·, t). Weights of many
steps degenerate, so `posterior_samples` carries particles and resamples them when their effective
sample size falls below half (sequential Monte Carlo). Its samples are right in the limit of many
particles, its evidence is unbiased at any number.

References:
    Sohl-Dickstein et al. 2015, section 2.5 (the product); Doucet, de Freitas, Gordon 2001,
    Sequential Monte Carlo methods in practice; Wu et al. 2023, Practical and asymptotically exact
    conditional sampling in diffusion models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributions import Distribution

from nelbo.distributions import per_example
from nelbo.errors import NumericalFailure, UsageError
from nelbo.factors import Factor as Factor
from nelbo.factors import Measured as Measured
from nelbo.factors import Moments as Moments
from nelbo.factors import Noisy as Noisy
from nelbo.factors import Observed as Observed
from nelbo.factors import Tilt as Tilt
from nelbo.particles import Particles as Particles
from nelbo.particles import systematic
from nelbo.randomness import seeded
from nelbo.reverse import Prediction, Reverse


class ConditionedPrediction(Prediction):
    """A network call whose kernels and decoder are multiplied by a factor."""

    def __init__(self, plain: Prediction, model: Reverse, factor: Factor) -> None:
        super().__init__(model, plain.x_t, plain.t, plain.output)
        self.plain = plain
        self.factor = factor

    def multiplied(self, s: Tensor | None) -> tuple[Distribution, Tensor]:
        """p·r/Z and log Z (B,) of the kernel to s, of the decoder for None."""
        return self.factor.multiply(self.plain.decoder() if s is None else self.plain.kernel(s), s)

    def kernel(self, s: Tensor) -> Distribution:
        return self.multiplied(s)[0]

    def decoder(self) -> Distribution:
        return self.multiplied(None)[0]

    @property
    def x_0(self) -> Tensor:  # type: ignore[override]
        _refuse("the predicted data")

    def noise(self, clipped: bool = True) -> Tensor:
        _refuse("the predicted noise")

    def mean_detached(self) -> Prediction:
        _refuse("an objective")

    def __getitem__(self, rows: Tensor) -> Prediction:
        _refuse("the bound")


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"{what} of a conditioned model is not defined: a condition multiplies kernels, and a "
        "deterministic sampler (DDIM) has none. Sample with Ancestral (--sampler ancestral), or "
        "with weights by posterior_samples"
    )


class Conditioned(Reverse):
    """A model whose every kernel, and whose decoder, is multiplied by a factor.

    Walking back with `Ancestral` draws from the plain product, which is *approximate* at any
    number of steps; `posterior_samples` adds the weights that make it right.

    Arguments:
        model: the reverse process. factor: r, on the model's scale.
    Raises:
        ValueError: the model has no kernels.
    """

    def __init__(self, model: Reverse, factor: Factor) -> None:
        if not isinstance(model, Reverse):
            raise ValueError(
                f"{type(model).__name__} has no kernels to multiply: condition the reverse "
                "process (Reverse), and sample it with Ancestral"
            )
        super().__init__(model.process, model.network, model.parameterization, model.decoder_rule)
        self.factor = factor if factor.process is not None else factor.bind(model.process)
        self.train(model.training)

    def at(self, x_t: Tensor, t: Tensor, cond: Any = None) -> ConditionedPrediction:
        return ConditionedPrediction(super().at(x_t, t, cond), self, self.factor)

    def log_z(self, x_t: Tensor, t: Tensor, s: Tensor | None, cond: Any = None) -> Tensor:
        """log Z (B,) of the step from x_t to s, to the data for None; one network call."""
        return self.at(x_t, t, cond).multiplied(s)[1]


# --- sequential Monte Carlo ----------------------------------------------------------------------


def posterior_samples(
    model: Reverse,
    factor: Factor,
    times: Tensor,
    particles: int,
    *,
    populations: int = 1,
    shape: tuple[int, ...] | None = None,
    threshold: float = 0.5,
    seed: int = 0,
    batch: int = 512,
    device: str | torch.device = "cpu",
    track: Callable[[int, int], None] = lambda done, total: None,
) -> Particles:
    """Sequential Monte Carlo: samples of p_θ(x_0) r(x_0)/∫ p_θ r with weights and evidence.

    Arguments:
        model: the reverse process, unconditioned.
        factor: r; one condition for all populations, or B of them for B populations.
        times: (N,) increasing: the grid to walk down.
        particles: P per population.
        populations: R independent repetitions; the number of conditions if there are several.
        shape: of one example, where the factor does not know it (`Tilt`).
        threshold: resample (systematically) where the effective sample size is below this share of
            P; 0 never.
        seed: the particles are a function of it, R and P.
        batch: particles per network call; changes only rounding.
        track: told the number of network calls done and planned, in particles.
    Raises:
        ValueError: a model without kernels, or a factor that does not fit.
        NumericalFailure: a weight is not a number, or no particle of a population can meet r.
    References:
        Doucet, de Freitas, Gordon 2001; Wu et al. 2023, algorithm 1.
    """
    if particles < 1 or populations < 1:
        raise UsageError("at least one particle and one population are needed")
    if isinstance(model, Conditioned) or not isinstance(model, Reverse):
        raise ValueError(
            f"{type(model).__name__} is not a plain reverse process: give the model and the "
            "factor apart, posterior_samples multiplies them"
        )
    example = factor.shape if shape is None else shape
    if example is None:
        raise ValueError(f"{type(factor).__name__} does not know the shape of an example: give it")
    if factor.batch not in (1, populations) and populations != 1:
        raise ValueError(f"{factor.batch} conditions do not fit {populations} populations")
    populations = max(populations, factor.batch)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            bound = factor.bind(model.process, particles)
            walk = _Walk(model, bound, times, (populations, particles), seed, batch, track)
            return walk.down(example, device, threshold)
    finally:
        model.train(was_training)


class _Walk:
    """Particles on their way from noise to data."""

    def __init__(
        self,
        model: Reverse,
        factor: Factor,
        times: Tensor,
        size: tuple[int, int],
        seed: int,
        batch: int,
        track: Callable[[int, int], None],
    ) -> None:
        self.model, self.factor, self.times = model, factor, times
        self.size, self.seed, self.batch, self.track = size, seed, batch, track
        self.log_w = torch.zeros(size, dtype=torch.float64)
        self.log_evidence = torch.zeros(size[0], dtype=torch.float64)
        self.ess: list[Tensor] = []
        self.resampled: list[Tensor] = []

    def down(
        self, example: tuple[int, ...], device: str | torch.device, threshold: float
    ) -> Particles:
        """All steps, the decoder last."""
        rows = self.size[0] * self.size[1]
        with seeded(self.seed, "conditioning", "start"):
            x = self.model.process.start((rows, *example), str(device))
        log_r = torch.zeros(rows, dtype=torch.float64)
        for i in range(len(self.times) - 1, -1, -1):
            x, log_r, law = self.step(x, log_r, i)
            self.track((len(self.times) - i) * rows, len(self.times) * rows)
            index = self.settle(threshold if i else 0.0, i)
            x, log_r = x[index.to(x.device)], log_r[index]
        log_mean = self.log_w.logsumexp(1)
        return Particles(
            x.unflatten(0, self.size),
            self.log_w - log_mean[:, None],
            self.log_evidence + log_mean - math.log(self.size[1]),
            torch.stack(self.ess),
            torch.stack(self.resampled),
            law,
        )

    def step(self, x_t: Tensor, log_r: Tensor, i: int) -> tuple[Tensor, Tensor, Distribution]:
        """x_s, log r(x_s, s) and the product that x_s was drawn from; adds to the weights."""
        s = self.times[i - 1] if i else None
        at = self.predict(x_t, self.times[i])
        kernel = at.decoder() if s is None else at.kernel(s)
        law, log_z = self.factor.multiply(kernel, s)
        with seeded(self.seed, "conditioning", i):
            x_s = law.sample()
        after = torch.zeros_like(log_r)
        if s is not None or not self.factor.exact:
            after = self.factor.log_r(x_s, s).cpu()
        if not self.factor.exact:
            log_z = per_example(kernel.log_prob(x_s) - law.log_prob(x_s)).cpu() + after
        self.log_w = self.log_w + (log_z.cpu() - log_r).view(self.size)
        return x_s, after, law

    def predict(self, x_t: Tensor, t: Tensor) -> Prediction:
        """One prediction for all particles from network calls of limited size."""
        parts = [self.model.network(part, t, None) for part in x_t.split(self.batch)]
        return Prediction(self.model, x_t, t, torch.cat(parts).to(x_t.dtype))

    def settle(self, threshold: float, i: int) -> Tensor:
        """Note the effective sample sizes and resample where they are low: rows to go on with."""
        self.refuse(i)
        log_sum = self.log_w.logsumexp(1)
        ess = (2 * log_sum - (2 * self.log_w).logsumexp(1)).exp()
        low = ess < threshold * self.size[1]
        self.ess.append(ess)
        self.resampled.append(low)
        with seeded(self.seed, "conditioning", "resample", i):
            chosen = systematic(self.log_w)
        stay = torch.arange(self.size[1]).expand(self.size)
        index = torch.where(low[:, None], chosen, stay)
        gain = log_sum - math.log(self.size[1])
        self.log_evidence = torch.where(low, self.log_evidence + gain, self.log_evidence)
        self.log_w = torch.where(low[:, None], torch.zeros_like(self.log_w), self.log_w)
        return (index + self.size[1] * torch.arange(self.size[0])[:, None]).flatten()

    def refuse(self, i: int) -> None:
        """No particle left, or a weight that is not a number."""
        if bool(self.log_w.isnan().any()):
            raise NumericalFailure(f"a weight is not a number at step {i} of the walk")
        if bool((self.log_w == -math.inf).all(1).any()):
            raise NumericalFailure(
                f"at step {i} of the walk no particle can meet the condition: the model gives it "
                "zero probability, or more particles are needed"
            )
