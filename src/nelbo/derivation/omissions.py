r"""What common notes leave out of the bound: a weight, a term, the law of t, a floor.

Each is left out because it seems small or equivalent; each moves the figure that is reported.
"""

from __future__ import annotations

import torch

from nelbo.bound import decoder_term, pair_term, prior_term
from nelbo.decoders import Constant
from nelbo.derivation.denoisers import (
    Exact,
    at_logsnr,
    averaged,
    called,
    compared,
    mixture_points,
    model_of,
    normal,
    quadratic_points,
    two_modes,
)
from nelbo.derivation.draws import ExactChain
from nelbo.derivation.identity import Erratum, Identity, Line, Side
from nelbo.derivation.noise import NOISE, PAIR, STEPS, chain
from nelbo.derivation.simpleweight import simple_of
from nelbo.objectives import Vlb, noise_error
from nelbo.processes.gaussian import Gaussian
from nelbo.schedules import Linear
from nelbo.variances import Posterior

VLB, ENTROPY = "nelbo.objectives.Vlb", "nelbo.data.mixture.GaussianMixture.entropy"


class DroppedWeight(Erratum):
    id = "E40"
    identity = "I24"
    printed = "L_simple as the last line of the derivation of the bound"
    right = "another objective: the bound has the weight ½ expm1(lambda_s-lambda_t) at t"
    why = "without the weights it is no bound and no likelihood; train what you like, report L"

    def line(self, seed: int) -> Line:
        c = chain()
        at, x_0, index = c.at("noise")
        summed = averaged(pair_term(at, x_0, c.times[index - 1]), c.points).sum()
        simple = simple_of(c.models["noise"], c.points, c.times) * len(c.times)
        return compared(
            "Gaussian",
            ("N L_simple", simple, "nelbo.objectives.Simple"),
            ("sum of E KL", summed, PAIR),
        )


class NoVariance(Erratum):
    id = "E43"
    identity = "I23"
    printed = "the decoder's variance sigma_1² is beta_1 or beta~_1"
    right = "beta_1, or beta~ of the first pair: beta~_1 = 0"
    why = "beta~ of the step to data is 0, and a point mass has no finite term"

    def line(self, seed: int) -> Line:
        schedule = at_logsnr([30.0, 4.0, 0.0, -6.0])
        data_time, *times = schedule.grid()
        first = Gaussian(schedule).pair(data_time, times[0]).log_posterior
        found = []
        for edge in (Constant(float(first)), None):
            data = normal([0.5], [[0.49]])
            model, points = model_of(data, schedule, Posterior(), edge), quadratic_points(data)
            at, x_0, _ = called(model, points, times[0][None])
            found.append(averaged(decoder_term(at, x_0), points))
        return compared(
            "Gaussian",
            (
                "decoder term with beta~ towards keep = 1 - 1e-13",
                found[0],
                "nelbo.bound.decoder_term",
            ),
            ("with beta_1", found[1], "nelbo.bound.decoder_term"),
        )


class NoPrior(Erratum):
    id = "E45"
    identity = "I34"
    printed = "the prior term can be ignored"
    right = "it is computed, per example, always"
    why = "without it a chain that ends early reports less than the entropy of the data"

    def line(self, seed: int) -> Line:
        schedule, data = at_logsnr([4.0, 2.0]), normal([0.5], [[0.49]])
        times, points = schedule.grid(), quadratic_points(data)
        objective, model = Vlb(times), model_of(data, schedule, Exact())
        at, x_0, index = called(model, points, times)
        p = objective.probabilities
        whole = averaged(objective.loss(at, x_0, index, p[index]), points) @ p
        without = whole - points.weight @ prior_term(model, points.x_0, times)
        entropy = data.entropy()[0]
        sides = (
            Side("E L without the prior term", float(without), by=VLB),
            Side(
                "H(q), which no bound is below",
                entropy,
                by=ENTROPY,
            ),
        )
        return Line("Gaussian", sides, ">=", note="a chain that ends at log-SNR 2")


class ExactNoise(Erratum):
    id = "E47"
    identity = "I25"
    printed = "the trained network predicts the exact noise"
    right = "it predicts E[eps|x_t]; an error of snr_t E Var(x_0|x_t) is left"
    why = "many x_0 lead to one x_t, and no function of x_t tells them apart"

    def line(self, seed: int) -> Line:
        data, schedule = two_modes(), Linear(STEPS)
        points, times = mixture_points(data), schedule.grid()
        at, x_0, _ = called(model_of(data, schedule), points, times)
        return compared(
            "Gaussian",
            ("squared error of the exact noise", 0.0, "by definition"),
            ("least squared error", averaged(noise_error(at, x_0), points), NOISE),
            unit="squared error",
        )


class LawOfTime(Erratum):
    id = "E48"
    identity = "I34"
    printed = "t ~ Uniform(1, T), each term times T"
    right = "t uniform on the N times t_1..t_N; at t_1 the term is the decoder's"
    why = "a real t in (1, T), rounded, has half the probability of others at both ends"

    def line(self, seed: int) -> Line:
        g = ExactChain()
        n, points = len(g.times), quadratic_points(normal([0.5], [[0.49]]))
        p = torch.ones(n, dtype=torch.float64) / (n - 1)
        p[[0, -1]] /= 2
        objective = Vlb(g.times)
        at, x_0, index = called(g.gaussian, points, g.times)
        loss = averaged(objective.loss(at, x_0, index, objective.probabilities[index]), points)
        return compared(
            "Gaussian",
            ("mean over t uniform on (1, T), rounded", p @ loss, VLB),
            ("the bound", g.truth(), ENTROPY),
        )


IDENTITIES: tuple[Identity, ...] = ()
ERRATA: tuple[Erratum, ...] = (
    DroppedWeight(),
    NoVariance(),
    NoPrior(),
    ExactNoise(),
    LawOfTime(),
)
