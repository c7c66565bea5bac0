r"""Where the papers use one word for two things: signs, and two derivations taken for one."""

from __future__ import annotations

from nelbo.decoders import EdgeFixed
from nelbo.derivation.identity import Erratum, Identity, Line, Side
from nelbo.derivation.models import BERNOULLI, GAUSSIAN, affine, bits
from nelbo.entropy import entropy_form

BOUND, ENTROPY = "nelbo.bound.term_of", "nelbo.entropy.entropy_form"


class OppositeSigns(Erratum):
    id = "E14"
    identity = "I2"
    printed = "L is a lower bound of log p(x_0), to be maximised; elsewhere L is the loss"
    right = "here L is a loss, L >= −log p(x_0), and K = −E L where the two forms agree"
    why = "a loss read as the log-likelihood's lower bound lies above it"

    def line(self, seed: int) -> Line:
        setting = affine()
        sides = (
            Side("E L", setting.average(setting.bound().total), 0.0, BOUND),
            Side("E log p(x_0)", setting.average(setting.log_likelihood())),
        )
        return Line(GAUSSIAN, sides, "<=")


class TwoDerivations(Erratum):
    id = "E49"
    identity = "I15"
    printed = "the derivations of 2015 and of 2020 lead to the same bound"
    right = "K = −E L only with the fixed edge step and ce(t_N) − ce(t_1) + ce(0) = H_p(X_N)"
    why = "bits whose mean activity is not π: the two differ by the bracket"

    def line(self, seed: int) -> Line:
        setting = bits(EdgeFixed())
        bound = setting.bound()
        form = entropy_form(
            setting.model.process, setting.x_0, setting.times, bound.diffusion.sum(1)
        )
        sides = (
            Side("-K, by entropies", -setting.average(form.k), 0.0, ENTROPY),
            Side("E L, by three terms", setting.average(bound.total), 0.0, BOUND),
        )
        return Line(BERNOULLI, sides, note="pi = .3, activity of the data .4 and .5")


IDENTITIES: tuple[Identity, ...] = ()
ERRATA: tuple[Erratum, ...] = (OppositeSigns(), TwoDerivations())
