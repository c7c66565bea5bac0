"""The exact game: stored values, identities I26 to I33, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from goldens import load
from torch import Tensor, nn

from nelbo.data.mixture import GaussianMixture
from nelbo.errors import InputRefused
from nelbo.jsd import phi
from nelbo.lattices import Box
from nelbo.quadrature import (
    Exact,
    LogDensity,
    OptimalDiscriminator,
    exact_ladder,
    jsd,
    kl,
    slack,
    value,
)
from nelbo.randomness import generator, seeded

LOG2 = math.log(2)
GOLD = load("mixture2d")


def mixture(means: object, std: float, weights: object = None) -> GaussianMixture:
    """Isotropic components, equal weights by default."""
    centres = torch.as_tensor(means, dtype=torch.float64)
    count, dims = centres.shape
    shares = torch.as_tensor(weights or [1 / count] * count, dtype=torch.float64)
    spread = (std**2 * torch.eye(dims, dtype=torch.float64)).expand(count, dims, dims)
    return GaussianMixture(shares, centres, spread.contiguous())


def ring(count: int, radius: float, std: float, kept: int | None = None, turn: float = 0.0):
    angle = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count + turn
    return mixture(radius * torch.stack([angle.cos(), angle.sin()], 1)[:kept], std)


def stored_ring(name: str, kept: int | None = None, turn: float = 0.0) -> GaussianMixture:
    n, radius, std = (GOLD[f"{name}/{key}"] for key in ("n", "radius", "std"))
    return ring(int(n), float(radius), float(std), kept, turn)


def stored_grid(name: str, rows: int) -> GaussianMixture:
    n, step, std = (GOLD[f"{name}/{key}"].item() for key in ("n", "step", "std"))
    axis = step * (torch.arange(n, dtype=torch.float64) - (n - 1) / 2)
    return mixture(torch.cartesian_prod(axis, axis)[: rows * n], std)


def at(mean: float, std: float = 1.0, dims: int = 1) -> GaussianMixture:
    return mixture([[mean] + [0.0] * (dims - 1)], std)


def lopsided() -> tuple[GaussianMixture, GaussianMixture]:
    p = mixture([[0.0, 1.0], [2.0, -1.0], [-1.5, 0.3]], 0.6, [0.5, 0.3, 0.2])
    return p, mixture([[0.5, 0.5], [1.5, -1.2]], 0.8, [0.6, 0.4])


def assert_stored(found: Exact, expected: float) -> None:
    assert abs(found.value - expected) < 1e-9
    assert found.error < 1e-8


@pytest.mark.parametrize("name", ["ring0", "ring1", "ring2"])
def test_rings_are_those_stored(name: str) -> None:
    whole = stored_ring(name)
    for kept in (1, 4, 7, 8):
        expected = GOLD[f"{name}/jsd_first_k_nats"][kept - 1]
        assert_stored(jsd(whole, stored_ring(name, kept)), expected)
    turned = stored_ring(name, turn=math.pi / int(GOLD[f"{name}/n"]))
    assert_stored(jsd(whole, turned), GOLD[f"{name}/jsd_half_angle_rotation_nats"])


@pytest.mark.parametrize("name", ["grid0", "grid1"])
def test_grids_are_those_stored(name: str) -> None:
    found = jsd(stored_grid(name, 5), stored_grid(name, 4))
    assert_stored(found, GOLD[f"{name}/jsd_first_k_rows_nats"][3])


def test_single_gaussians_are_those_stored() -> None:
    for shift, expected in zip(GOLD["gauss_shift"], GOLD["gauss_shift_jsd_nats"], strict=True):
        assert_stored(jsd(at(0), at(float(shift))), expected)
    for dims in (1, 2):
        stored = zip(GOLD["gauss_scale"], GOLD[f"gauss_scale_{dims}d_jsd_nats"], strict=True)
        for scale, expected in stored:
            assert_stored(jsd(at(0, 1, dims), at(0, float(scale), dims)), expected)
    values = [jsd(at(0), at(d)).value for d in (0.2, 0.5, 1, 2, 4)]
    assert values == pytest.approx([0.004975, 0.030311, 0.111421, 0.336831, 0.632720], abs=5e-7)


def test_dropped_modes_cost_phi() -> None:
    """I31 with separate modes, and the table of phi(k/8)."""
    whole = ring(8, 1.0, 0.01)
    stated = [0.49693, 0.38040, 0.29030, 0.21576, 0.15180, 0.09560, 0.04541]
    for kept, expected in enumerate(stated, 1):
        found = jsd(whole, ring(8, 1.0, 0.01, kept)).value
        assert found == pytest.approx(expected, abs=1e-5)
        assert found == pytest.approx(float(phi(torch.tensor(kept / 8).double())), abs=1e-9)


def test_divergences_of_gaussians_have_closed_forms() -> None:
    p, g = at(0.3, 0.7), at(-0.4, 1.2)
    expected = math.log(1.2 / 0.7) + (0.7**2 + 0.7**2) / (2 * 1.2**2) - 0.5
    assert kl(p, g).value == pytest.approx(expected, abs=1e-10)
    assert kl(p, p).value == 0 and abs(jsd(p, p).value) < 1e-14
    assert jsd(p, g).value == pytest.approx(jsd(g, p).value, abs=1e-12)


def test_log_densities_on_a_box_are_the_mixtures() -> None:
    p, g = lopsided()
    box = Box(torch.full((2,), -9.0).double(), torch.full((2,), 9.0).double(), 0.5)
    assert jsd(p.log_prob, g.log_prob, box).value == pytest.approx(jsd(p, g).value, abs=1e-9)
    assert kl(p, g.log_prob, box).value == pytest.approx(kl(p, g).value, abs=1e-9)


def bump(*starts: float) -> LogDensity:
    """Raised cosines of equal mass on [start, start + 1], nothing elsewhere."""

    def log_prob(x: Tensor) -> Tensor:
        inside = [(x[:, 0] > start) & (x[:, 0] < start + 1) for start in starts]
        height = (1 - (2 * math.pi * x[:, 0]).cos()) / len(starts)
        return torch.where(torch.stack(inside).any(0), height.log(), -math.inf)

    return log_prob


def test_where_a_density_vanishes_nothing_is_lost() -> None:
    """Laws on disjoint places are log 2 apart; of a part of the other, phi of the part."""
    box = Box(torch.tensor([-0.01]).double(), torch.tensor([4.1]).double(), 1 / 64)
    assert jsd(bump(0), bump(1), box).value == pytest.approx(LOG2, abs=1e-12)
    part = jsd(bump(0, 1, 2, 3), bump(2), box).value
    assert part == pytest.approx(float(phi(torch.tensor(0.25).double())), abs=1e-12)
    best = OptimalDiscriminator(bump(0), bump(1))
    assert best(torch.tensor([[0.5], [1.5], [2.5]])).tolist() == [math.inf, -math.inf, 0.0]
    with pytest.raises(InputRefused, match="mass of g"):
        jsd(bump(0), bump(3.5), box)


# --- the game ------------------------------------------------------------------------------------


def test_the_best_discriminator_beats_every_other() -> None:
    """I28, I29 and I30: V(D*) = 2 JSD - log 4, and V falls by 2 slack for any other D."""
    p, g = lopsided()
    best = OptimalDiscriminator(p.log_prob, g.log_prob)
    top, divergence = value(p, g, best).value, jsd(p, g).value
    assert top == pytest.approx(2 * divergence - math.log(4), abs=1e-9)
    assert abs(slack(p, g, best).value) < 1e-14
    draws = torch.randn(8, 4, dtype=torch.float64, generator=generator(0, "perturbations"))
    for a, b, c, d in draws.tolist():

        def other(x: Tensor, a=a, b=b, c=c, d=d) -> Tensor:  # noqa: ANN001
            return best(x) * (1 + a / 4) + b * (x[:, 0] * c + d).sin()

        lower, lost = value(p, g, other), slack(p, g, other)
        assert lower.value < top and lost.value > 0
        assert divergence - (lower.value + math.log(4)) / 2 == pytest.approx(lost.value, abs=1e-9)


def bernoulli_slack(p: GaussianMixture, g: GaussianMixture, logit: object) -> float:
    """E_m KL(Bern(D*) || Bern(D)) from probabilities, on a grid of its own."""
    axis = torch.arange(-9, 9, 0.05, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    a, b = p.log_prob(x).exp(), g.log_prob(x).exp()
    keep = a + b > 1e-300
    a, b, given = a[keep], b[keep], torch.sigmoid(logit(x[keep]))  # type: ignore[operator]
    ideal = a / (a + b)
    apart = torch.xlogy(ideal, ideal / given) + torch.xlogy(1 - ideal, (1 - ideal) / (1 - given))
    return float(((a + b) / 2 * apart).sum() * 0.05**2)


def test_the_slack_is_the_divergence_of_the_posteriors() -> None:
    p, g = lopsided()

    def tilted(x: Tensor) -> Tensor:
        return x[:, 0] - 0.5 * x[:, 1]

    expected = bernoulli_slack(p, g, tilted)
    assert slack(p, g, tilted).value == pytest.approx(expected, abs=1e-9)
    wrong = bernoulli_slack(p, g, lambda x: -tilted(x))
    assert abs(wrong - expected) > 0.1


def test_equal_laws_reach_minus_log_4_and_no_others() -> None:
    p = lopsided()[0]
    best = OptimalDiscriminator(p.log_prob, p.log_prob)
    assert value(p, p, best).value == pytest.approx(-math.log(4), abs=1e-12)
    for shift in (0.01, 0.1, 1.0):
        g = GaussianMixture(p.weights, p.means + shift, p.covariances)
        best = OptimalDiscriminator(p.log_prob, g.log_prob)
        assert value(p, g, best).value > -math.log(4) + 1e-6


def test_noise_lowers_the_divergence() -> None:
    """I33; and the pair with its second member diffused less would break the order."""
    levels = [8.0, 4.0, 2.0, 0.0, -2.0, -4.0]
    p, g = ring(8, 1.0, 0.15), ring(8, 1.0, 0.2, 7)
    steps = [rung.value for rung in exact_ladder(p, g, levels)]
    assert all(later < before for before, later in zip(steps, steps[1:], strict=False))
    assert steps[0] < jsd(p, g).value and 0 < steps[-1] < 1e-4
    keep, lose = (torch.tensor(x).double().sigmoid() for x in (-2.0, 2.0))
    assert jsd(p.diffused(keep, lose), g.diffused(keep, lose / 2)).value > steps[3]


# --- discrete pairs ------------------------------------------------------------------------------


def discrete(p: np.ndarray, g: np.ndarray) -> np.ndarray:
    """JSD of rows (n, k) of masses."""
    m = (p + g) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(x > 0, x * np.log(x / m), 0) for x in (p, g)]
    return (parts[0] + parts[1]).sum(1) / 2


def test_phi_bounds_the_divergence_of_discrete_pairs() -> None:
    """I32 in both directions, equality under pure dropping, and I31 for masses left uncovered."""
    rng = np.random.default_rng(0)
    p, g = (rng.dirichlet([0.5] * 4, 20_000) for _ in range(2))
    for first, second in ((p, g), (g, p)):
        apart = (first * np.log(first / second)).sum(1)
        upper = phi(torch.as_tensor(np.exp(-apart))).numpy()
        assert (discrete(p, g) <= upper + 1e-12).all()
        assert (discrete(p, g) > phi(torch.as_tensor(np.exp(-0.5 * apart))).numpy()).any()
    kept = p[:, :2].sum(1)
    dropped = np.concatenate([p[:, :2] / kept[:, None], 0 * p[:, 2:]], 1)
    assert np.allclose(discrete(p, dropped), phi(torch.as_tensor(kept)).numpy(), atol=1e-12)
    narrow = np.concatenate([g[:, :2] / g[:, :2].sum(1, keepdims=True), 0 * g[:, 2:]], 1)
    assert (discrete(p, narrow) >= phi(torch.as_tensor(kept)).numpy() - 1e-12).all()


# --- a discriminator that learned ---------------------------------------------------------------


def trained(p: GaussianMixture, g: GaussianMixture, steps: int) -> nn.Module:
    """A small network, trained on draws with the log loss."""
    rng = generator(0, "draws")
    with seeded(0, "weights"):
        net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0)).double()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    softplus = nn.functional.softplus
    for _ in range(steps):
        loss = softplus(-net(p.sample(512, rng))).mean() + softplus(net(g.sample(512, rng))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def test_a_trained_discriminator_reaches_the_divergence() -> None:
    p, g = at(0), at(1)
    divergence = jsd(p, g).value
    before, after = trained(p, g, 0), trained(p, g, 250)
    reached = (value(p, g, after).value + math.log(4)) / 2
    assert reached <= divergence + 1e-10
    assert slack(p, g, after).value == pytest.approx(divergence - reached, abs=1e-9)
    assert slack(p, g, after).value < 0.002 < 0.05 < slack(p, g, before).value


def test_a_kinked_discriminator_comes_with_its_own_error() -> None:
    p, g = at(0), at(1)

    def kinked(x: Tensor) -> Tensor:
        return (x[:, 0] - 0.1234).abs() - 0.3

    found = value(p, g, kinked, agreement=1e-5)
    assert 1e-9 < found.error < 1e-4
    assert abs(value(p, g, kinked, agreement=1e-7).value - found.value) < found.error


# --- refusals ------------------------------------------------------------------------------------


def test_what_cannot_be_summed_is_refused() -> None:
    p = at(0, 1, 3)
    with pytest.raises(InputRefused, match="2 dimensions"):
        jsd(p, p)
    with pytest.raises(InputRefused, match="Box"):
        jsd(at(0), at(0).log_prob)
    with pytest.raises(InputRefused, match="too narrow"):
        jsd(at(0, 1e-6, 2), at(0, 1.0, 2))
    small = Box(torch.tensor([-1.0]).double(), torch.tensor([1.0]).double(), 0.1)
    with pytest.raises(InputRefused, match="mass of p .* not 1"):
        jsd(at(0).log_prob, at(0).log_prob, small)
