"""The identities of likelihood and bound: they agree, their errata do not, planted errors show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import nelbo.binary
import nelbo.bound
import nelbo.distributions
import nelbo.entropy
from nelbo.bits import Bits
from nelbo.bound import Bound
from nelbo.decoders import Discretized, EdgeFixed
from nelbo.derivation import edges, grids, ratio, steps, telescoping, wrongbounds, wrongterms
from nelbo.derivation.identity import Erratum, Identity, Line
from nelbo.derivation.line import Affine, Levelled
from nelbo.derivation.models import affine, bits, exact_affine, levels, settings
from nelbo.derivation.rows import log_weights
from nelbo.derivation.settings import Joint, Known, Sampled
from nelbo.derivation.stated import Stated
from nelbo.distributions import DiagonalNormal, DiscretizedNormal
from nelbo.parameterizations import GaussianParameterization, Velocity
from nelbo.processes.bernoulli import Bernoulli
from nelbo.processes.gaussian import Gaussian
from nelbo.reverse import Prediction
from nelbo.variances import Transition

MODULES = (ratio, telescoping, steps, edges, grids, wrongbounds, wrongterms)
IDENTITIES: list[Identity] = [i for module in MODULES for i in module.IDENTITIES]
ERRATA: list[Erratum] = [e for module in MODULES for e in module.ERRATA]
Plant = Callable[[pytest.MonkeyPatch], None]


def shown(line: Line) -> str:
    sides = " | ".join(f"{s.what}: {s.value:.15g} ± {s.se:.2g}" for s in line.sides)
    return f"{line.family} {line.relation} {sides} ({line.note})"


@cache
def lines_of(identity: Identity, seed: int) -> list[Line]:
    return identity.lines(seed)


def disagreeing(only: set[str]) -> set[tuple[str, str]]:
    """(id, family) of every line of these identities that disagrees, computed anew."""
    some = [one for one in IDENTITIES if one.id in only]
    return {(one.id, line.family) for one in some for line in one.lines(0) if not line.agrees}


# --- the identities ------------------------------------------------------------------------------


def test_every_identity_of_the_bound_is_there() -> None:
    assert sorted(int(i.id[1:]) for i in IDENTITIES) == list(range(1, 18))
    assert len({i.name for i in IDENTITIES}) == 17
    for one in IDENTITIES:
        assert one.title and one.latex and one.text and one.assumes and one.steps
        assert one.functions and one.source and "$" not in one.latex
    known = {i.id for i in IDENTITIES}
    assert all(e.identity in known and e.printed and e.right and e.why for e in ERRATA)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda i: i.id)
def test_identity_agrees_for_both_families(identity: Identity, seed: int) -> None:
    lines = lines_of(identity, seed)
    assert lines
    for line in lines:
        assert line.agrees, shown(line)
    assert {"Gaussian", "Bernoulli"} <= {line.family for line in lines}


@pytest.mark.parametrize("erratum", ERRATA, ids=lambda e: e.id)
def test_erratum_disagrees(erratum: Erratum) -> None:
    for seed in (0, 1):
        line = erratum.line(seed)
        assert not line.agrees, shown(line)


def test_named_functions_exist() -> None:
    """Every dotted name leads to something in nelbo."""
    names = {name for one in IDENTITIES for name in one.functions}
    names |= {s.by for one in IDENTITIES for line in lines_of(one, 0) for s in line.sides}
    for name in names - {"closed form"}:
        module, rest = _module(name)
        for part in rest:
            module = getattr(module, part)


def _module(name: str) -> tuple[Any, list[str]]:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            return __import__(".".join(parts[:cut]), fromlist=["_"]), parts[cut:]
        except ModuleNotFoundError:
            continue
    raise AssertionError(name)


# --- the small models ----------------------------------------------------------------------------


def test_expectations_over_the_rows_are_exact() -> None:
    """Against 100 000 drawn trajectories: 6 comparisons at |z| < 5 fail once in 290 000."""
    for setting in settings():
        place = 2
        truth = setting.trajectories()
        exact = truth.mean(-log_weights(setting.model, setting.times, truth)).value[place]
        x_0 = setting.x_0[place : place + 1].expand(100_000, -1)
        drawn = Sampled(setting.model, setting.times, x_0, setting.weight, setting.family, 3)
        rows = drawn.trajectories()
        mean = rows.mean(-log_weights(setting.model, setting.times, rows))
        assert abs(float(mean.value[0] - exact)) < 5 * float(mean.se[0])
        term, sampled = setting.term(1), drawn.term(1)
        assert abs(float(term.value[place] - sampled.value[0])) < 5 * float(sampled.se[0])


def test_more_nodes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = levels().bound().total
    monkeypatch.setattr(Levelled, "nodes", 90)
    torch.testing.assert_close(levels().bound().total, before, rtol=0, atol=1e-12)


def test_models_have_a_gap() -> None:
    """Every example of the three lacks a tenth of a nat at least."""
    for setting in settings():
        gap = setting.bound().total + setting.log_likelihood()
        assert float(gap.min()) > 0.1, setting.family


def test_reference_value_of_the_exact_chain() -> None:
    """N(.5, .49) at log-SNR 4, 2, 0, −2: the entropy 1.062264 and the divergence of the end."""
    known = exact_affine()
    keep = float(known.model.process.schedule.keep(known.times[-1]))
    v = keep * 0.49 + 1 - keep
    end = 0.5 * (v + keep * 0.25 - 1 - torch.tensor(v).double().log())
    assert known.average(known.bound().total) == pytest.approx(1.0622635893 + float(end), abs=1e-8)


# --- a model of any size -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [affine, levels, bits])
def test_stated_identities_hold_by_monte_carlo(make: Callable[[], Known]) -> None:
    """`on` a sampled setting, as for a trained model; 20 000 rows."""
    setting = make()
    pick = torch.multinomial(
        setting.weight, 20_000, True, generator=torch.Generator().manual_seed(0)
    )
    x_0 = setting.x_0[pick]
    sampled = Sampled(setting.model, setting.times, x_0, setting.weight, "a run", 1)
    said = set()
    for one in IDENTITIES:
        assert isinstance(one, Stated)
        for line in one.on(sampled, 5):
            assert line.agrees, f"{one.id} {shown(line)}"
            said.add(one.id)
    assert said == {"I6", "I7", "I8", "I9", "I10", "I11", "I12", "I13", "I14"}


# --- planted errors ------------------------------------------------------------------------------


def code(patch: pytest.MonkeyPatch, function: Any, wrong: Any) -> None:
    """Another body for a function, wherever it has been imported to."""
    patch.setattr(function, "__code__", wrong.__code__)


def normal_posterior(patch: pytest.MonkeyPatch) -> None:
    """The mean of q(x_s|x_t, x_0) is 1 % too large."""
    right = Gaussian.posterior

    def posterior(*args: Tensor) -> DiagonalNormal:
        law = right(*args)  # type: ignore[arg-type]
        return DiagonalNormal(1.01 * law.mean, law.logvar)

    patch.setattr(Gaussian, "posterior", posterior)


def normal_posterior_variance(patch: pytest.MonkeyPatch) -> None:
    """β in place of β̃, in the process and so in all that reads it."""
    right = Gaussian.pair
    patch.setattr(
        Gaussian,
        "pair",
        lambda p, s, t: right(p, s, t)._replace(log_posterior=right(p, s, t).log_beta),
    )


def bit_posterior(patch: pytest.MonkeyPatch) -> None:
    """log-odds of q(x_s|x_t, x_0) 1 % too large."""
    right = Bernoulli.posterior
    patch.setattr(Bernoulli, "posterior", lambda *args: Bits(1.01 * right(*args).logits))


def normal_transition(patch: pytest.MonkeyPatch) -> None:
    right = Gaussian.transition

    def transition(*args: Tensor) -> DiagonalNormal:
        law = right(*args)  # type: ignore[arg-type]
        return DiagonalNormal(law.mean, law.logvar + 0.01)

    patch.setattr(Gaussian, "transition", transition)


def bit_transition(patch: pytest.MonkeyPatch) -> None:
    right = Bernoulli.transition
    patch.setattr(Bernoulli, "transition", lambda *args: Bits(right(*args).logits + 0.01))


def kernel_variance(patch: pytest.MonkeyPatch) -> None:
    """σ² of p_θ(x_s|x_t) 1 % too large."""
    right = GaussianParameterization.kernel

    def kernel(p: GaussianParameterization, at: Prediction, s: Tensor) -> DiagonalNormal:
        law = right(p, at, s)
        return DiagonalNormal(law.mean, law.logvar + 0.01)

    patch.setattr(GaussianParameterization, "kernel", kernel)


def kernel_mean(patch: pytest.MonkeyPatch) -> None:
    right = GaussianParameterization.kernel

    def kernel(p: GaussianParameterization, at: Prediction, s: Tensor) -> DiagonalNormal:
        law = right(p, at, s)
        return DiagonalNormal(1.01 * law.mean, law.logvar)

    patch.setattr(GaussianParameterization, "kernel", kernel)


def bit_kernel(patch: pytest.MonkeyPatch) -> None:
    right = nelbo.binary.mixed
    patch.setattr(nelbo.binary, "mixed", lambda *args: Bits(right(*args).logits + 0.01))


def transition_rule(patch: pytest.MonkeyPatch) -> None:
    """`Transition` gives 1.01 β: right for no data."""
    right = Transition.between
    patch.setattr(Transition, "between", lambda *args: right(*args) + 0.01)


def velocity(patch: pytest.MonkeyPatch) -> None:
    """x̂_0 = √k x_t − √l v̂ is 1 % too large."""
    right = Velocity.convert
    patch.setattr(Velocity, "convert", lambda *args: 1.01 * right(*args))


def no_prior(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Bound, "total", property(lambda b: b.diffusion.sum(1) + b.reconstruction))


def no_decoder(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Bound, "total", property(lambda b: b.prior + b.diffusion.sum(1)))


def one_pair_too_many(patch: pytest.MonkeyPatch) -> None:
    def total(b: Bound) -> Tensor:
        count = b.diffusion.shape[1] + 1
        return b.prior + b.diffusion.mean(1) * count + b.reconstruction

    patch.setattr(Bound, "total", property(total))


def bound_without_its_last_pair(patch: pytest.MonkeyPatch) -> None:
    """In `bound` itself, whose draws are its own."""

    def wrong(model, x_0, times, cond=None):  # type: ignore[no-untyped-def]
        index = torch.arange(len(times))
        terms = torch.stack([term(model, x_0, times, i, cond) for i in index], dim=1)  # type: ignore[name-defined] # noqa: F821
        return Bound(prior_term(model, x_0, times), terms[:, 1:-1], terms[:, 0])  # type: ignore[name-defined] # noqa: F821

    code(patch, nelbo.bound.bound, wrong)


def bound_without_prior(patch: pytest.MonkeyPatch) -> None:
    """In `bound` itself; the prior's part is below a hundredth of a nat for the line."""

    def wrong(model, x_0, times, cond=None):  # type: ignore[no-untyped-def]
        index = torch.arange(len(times))
        terms = torch.stack([term(model, x_0, times, i, cond) for i in index], dim=1)  # type: ignore[name-defined] # noqa: F821
        return Bound(0 * terms[:, 0], terms[:, 1:], terms[:, 0])

    code(patch, nelbo.bound.bound, wrong)


def decoder_twice_in_a_batch(patch: pytest.MonkeyPatch) -> None:
    """In `term_of` with an index per example, which objectives use."""

    def wrong(at, x_0, times, index):  # type: ignore[no-untyped-def]
        i = int(index.flatten()[0])
        return decoder_term(at, x_0) if i <= index.dim() else pair_term(at, x_0, times[i - 1])  # type: ignore[name-defined] # noqa: F821

    code(patch, nelbo.bound.term_of, wrong)


def divergence_turned(patch: pytest.MonkeyPatch) -> None:
    """KL(p ‖ q) in place of KL(q ‖ p)."""
    right = nelbo.bound.kl_divergence
    patch.setattr(nelbo.bound, "kl_divergence", lambda p, q: right(q, p))


def shifted_bins(patch: pytest.MonkeyPatch) -> None:
    """Every level reads the bin to its right; the masses still sum to one, in a circle."""
    right = DiscretizedNormal.log_mass
    patch.setattr(DiscretizedNormal, "log_mass", lambda d, level: right(d, (level + 1) % d.levels))


def narrow_bins(patch: pytest.MonkeyPatch) -> None:
    """The decoder thinks that it has 1 % less spread."""
    right = Discretized.distribution

    def distribution(d: Discretized, at: Prediction) -> DiscretizedNormal:
        law = right(d, at)
        wrong = DiscretizedNormal(law.mean, law.logvar, law.levels)
        offset = law.logvar - 0.02
        wrong.log_mass = DiscretizedNormal(law.mean, offset, law.levels).log_mass  # type: ignore[method-assign]
        return wrong

    patch.setattr(Discretized, "distribution", distribution)


def closed_edges(patch: pytest.MonkeyPatch) -> None:
    """The outer bins end where the others do: the masses no longer sum to one."""

    def log_mass(d: DiscretizedNormal, level: Tensor) -> Tensor:
        half, inverse = 1 / (d.levels - 1), (-0.5 * d.logvar).exp()
        offset = 2 * level.double() / (d.levels - 1) - 1 - d.mean
        interval = nelbo.distributions._log_interval
        mass: Tensor = interval((offset - half) * inverse, (offset + half) * inverse)
        return mass

    patch.setattr(DiscretizedNormal, "log_mass", log_mass)


def edge_of_the_wrong_time(patch: pytest.MonkeyPatch) -> None:
    right = EdgeFixed.distribution

    def distribution(d: EdgeFixed, at: Prediction) -> Any:
        law = right(d, at)
        if isinstance(law, Bits):
            return Bits(1.01 * law.logits)
        assert isinstance(law, DiagonalNormal)
        return DiagonalNormal(law.mean, law.logvar + 0.01)

    patch.setattr(EdgeFixed, "distribution", distribution)


def entropies_swapped(patch: pytest.MonkeyPatch) -> None:
    """H_q(X_1|X_0) and H_q(X_N|X_0) change places in K."""
    form = nelbo.entropy.EntropyForm
    k = property(lambda f: -f.divergences + f.first - f.last - f.prior)
    patch.setattr(form, "k", k)


def weights_too_large(patch: pytest.MonkeyPatch) -> None:
    right = nelbo.likelihood._Walker.walk

    def walk(self: Any, x_0: Tensor, cells: Any) -> Tensor:
        return right(self, x_0, cells) + 0.1

    patch.setattr(nelbo.likelihood._Walker, "walk", walk)


G, B, LEVELS = "Gaussian", "Bernoulli", "Gaussian, 8 levels"
PLANTED: list[tuple[Plant, set[tuple[str, str]]]] = [
    (normal_posterior, {("I6", G), ("I7", G), ("I8", G), ("I11", G)}),
    (normal_posterior_variance, {("I6", G), ("I8", G), ("I11", G)}),
    (bit_posterior, {("I6", B), ("I7", B), ("I8", B), ("I11", B)}),
    (normal_transition, {("I6", G), ("I8", G), ("I17", G)}),
    (bit_transition, {("I6", B), ("I8", B), ("I17", B)}),
    (kernel_variance, {("I2", G), ("I16", G)}),
    (kernel_mean, {("I2", G), ("I16", G)}),
    (bit_kernel, {("I2", B), ("I16", B)}),
    (transition_rule, {("I2", G)}),
    (velocity, {("I2", G)}),
    (no_prior, {("I11", G), ("I11", B), ("I3", G), ("I3", B)}),
    (no_decoder, {("I11", G), ("I11", B), ("I16", G), ("I16", B)}),
    (one_pair_too_many, {("I11", G), ("I11", B), ("I16", G), ("I16", B)}),
    (bound_without_its_last_pair, {("I11", G), ("I11", LEVELS), ("I11", B)}),
    (bound_without_prior, {("I11", G), ("I11", LEVELS), ("I11", B)}),
    (decoder_twice_in_a_batch, {("I11", G), ("I11", LEVELS), ("I11", B)}),
    (divergence_turned, {("I9", G), ("I9", B), ("I10", G), ("I10", B), ("I11", G), ("I11", B)}),
    (shifted_bins, {("I1", LEVELS)}),
    (narrow_bins, {("I1", LEVELS)}),
    (closed_edges, {("I1", LEVELS)}),
    (edge_of_the_wrong_time, {("I13", G), ("I13", B), ("I14", G), ("I14", B)}),
    (entropies_swapped, {("I14", G), ("I14", B), ("I15", G), ("I15", B)}),
    (weights_too_large, {("I1", G), ("I1", B), ("I11", G), ("I11", B)}),
]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with monkeypatch.context() as patch:
        yield patch


@pytest.mark.parametrize(("plant", "seen"), PLANTED, ids=lambda v: getattr(v, "__name__", ""))
def test_planted_error_is_seen(
    planted: pytest.MonkeyPatch, plant: Plant, seen: set[tuple[str, str]]
) -> None:
    plant(planted)
    found = disagreeing({one for one, _ in seen})
    assert seen <= found, f"not seen: {seen - found}"


def test_gap_needs_the_joint_law() -> None:
    """Levels have no gap in closed form, lines and bits do; the gap of a subset is another."""
    assert not isinstance(levels(), Joint)
    line = affine()
    assert isinstance(line, Affine)
    shorter = replace(line, times=line.times[1:])
    assert bool((shorter.gap() < line.gap()).all())
