"""The minimax game: losses by hand, penalties per example, values, and players without batches."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nelbo import gan, jsd
from nelbo.averages import Halving
from nelbo.data.base import Dataset
from nelbo.data.differentiable import Dequantised, Moved
from nelbo.gan import DiscriminatorLoss, Game, GeneratorLoss, Rules
from nelbo.networks import adversaries as players
from nelbo.randomness import seeded

REAL = torch.tensor([0.0, math.log(3), -2.0], dtype=torch.float64)
FAKE = torch.tensor([0.0, -math.log(2), 1.5], dtype=torch.float64)
LOSSES = [gan.Minimax(), gan.NonSaturating(), gan.Hinge(), gan.Relativistic()]


def plug_in(real: Tensor, fake: Tensor) -> float:
    return jsd.plug_in(real, fake)[0]


def sp(u: float) -> float:
    return math.log1p(math.exp(u))


# --- losses and value ----------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    """D(x) = 1/2, 3/4 and D(y) = 1/2, 1/3 give logarithms that anybody can check."""
    half, quarters = math.log(2), -math.log(3 / 4)
    both = [2 * half, quarters - math.log(2 / 3), sp(2) + sp(1.5)]
    pairs = [half, math.log1p(1 / 6), sp(3.5)]
    expected: list[tuple[list[float], list[float]]] = [
        (both, [-half, math.log(2 / 3), -sp(1.5)]),
        (both, [half, math.log(3), sp(-1.5)]),
        ([2.0, 1 - math.log(2), 5.5], [0.0, math.log(2), -1.5]),
        (pairs, [half, math.log(7), sp(-3.5)]),
    ]
    for loss, (critic, maker) in zip(LOSSES, expected, strict=True):
        assert loss.discriminator(REAL, FAKE).tolist() == pytest.approx(critic), loss
        assert loss.generator(REAL, FAKE).tolist() == pytest.approx(maker), loss


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: type(x).__name__)
def test_where_the_players_pull(loss: gan.Loss) -> None:
    """D wants reals up and fakes down, G wants fakes up; only where hinge is flat does D rest."""
    real, fake = (x.clone().requires_grad_() for x in (REAL, FAKE))
    up, down = torch.autograd.grad(loss.discriminator(real, fake).sum(), [real, fake])
    assert bool((up <= 0).all() and (down >= 0).all()) and bool(up.any() and down.any())
    (maker,) = torch.autograd.grad(loss.generator(real, fake).sum(), fake)
    assert bool((maker < 0).all())


def test_the_value_is_that_of_the_probabilities() -> None:
    expected = torch.sigmoid(REAL).log() + (1 - torch.sigmoid(FAKE)).log()
    assert torch.allclose(gan.value(REAL, FAKE), expected, rtol=1e-14)
    assert plug_in(REAL, FAKE) == pytest.approx(math.log(2) + float(expected.mean()) / 2)
    assert plug_in(torch.zeros(3), torch.zeros(3)) == pytest.approx(0, abs=1e-15)
    far = torch.full((1,), 1e4)  # where a probability in float32 is 0 or 1
    assert float(gan.value(-far, far)) == -2e4 and float(gan.value(far, -far)) == 0


def test_the_losses_that_read_the_value_say_it() -> None:
    for loss in LOSSES[:2]:
        mean = float(loss.discriminator(REAL, FAKE).mean())
        assert plug_in(REAL, FAKE) == pytest.approx(math.log(2) - mean / 2)


def test_the_best_offset() -> None:
    offset = gan.best_offset(REAL, FAKE)
    best = plug_in(REAL + offset, FAKE + offset)
    for step in (-1e-3, 1e-3):
        assert plug_in(REAL + offset + step, FAKE + offset + step) < best
    assert gan.best_offset(REAL + 40, FAKE + 40) == pytest.approx(offset - 40)
    assert best > plug_in(REAL, FAKE)
    # two apart sets: any b between them is as good, and none may overflow
    assert plug_in(REAL + 900, FAKE + 500) < 0.7
    assert math.isfinite(gan.best_offset(REAL + 900, FAKE - 900))


# --- players -------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """s(x) = x·Ax/2 + b·x, whose gradient is Ax + b with A symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[2.0, 0.5], [0.5, -1.0]]))
        self.b = nn.Parameter(torch.tensor([0.3, -0.7]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 0.5 * (x @ self.a * x).sum(1) + x @ self.b
        return out

    def slope(self, x: Tensor) -> Tensor:
        """(B, 2), written down by hand."""
        return x @ (self.a + self.a.T) / 2 + self.b


def small() -> Game:
    with seeded(0, "players"):
        maker = players.VectorGenerator(3, 2, width=16, depth=2)
        critic = players.VectorDiscriminator(2, 16, 2, directions=4, finest=4.0)
    return Game(maker, critic, 3)


def quadratic() -> Game:
    return Game(small().generator, Quadratic(), 3)


def data(count: int = 5) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(1))


def critic_loss(game: Game, rules: Rules, x: Tensor, progress: float = 0.0) -> Tensor:
    with seeded(3, "move"):
        return DiscriminatorLoss(game, rules, lambda: progress)(x)


def check_penalty(penalty: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> None:
    x = data()
    expected = 0.5 * 0.8 * slope(x).square().sum(1)
    assert torch.allclose(penalty(x), expected, rtol=1e-5)


def r1_of(game: Game) -> Callable[[Tensor], Tensor]:
    loss = gan.NonSaturating()
    return lambda x: critic_loss(game, Rules(loss, r1=0.8), x) - critic_loss(game, Rules(loss), x)


def test_r1_is_half_gamma_times_the_squared_slope_of_each_real() -> None:
    game = quadratic()
    assert isinstance(game.discriminator, Quadratic)
    check_penalty(r1_of(game), game.discriminator.slope)


def test_the_check_finds_a_norm_over_the_batch() -> None:
    game = quadratic()
    critic = game.discriminator
    assert isinstance(critic, Quadratic)

    def broken(x: Tensor) -> Tensor:
        return (0.4 * critic.slope(x).square().sum()).expand(len(x))

    with pytest.raises(AssertionError):
        check_penalty(broken, critic.slope)


def test_r2_is_the_same_at_fakes() -> None:
    game, loss = quadratic(), gan.Relativistic()
    with seeded(3, "move"):
        fakes = game.generator(game.noise(5))
    found = critic_loss(game, Rules(loss, r2=2.0), data()) - critic_loss(game, Rules(loss), data())
    slope = game.discriminator.slope(fakes)  # type: ignore[operator]
    assert torch.allclose(found, slope.square().sum(1), rtol=1e-4, atol=1e-6)


def test_the_penalty_of_a_network_against_finite_differences() -> None:
    game, x, step = small().double(), data().double(), 1e-6
    found = r1_of(game)(x)
    parts = []
    for k in range(2):
        move = torch.zeros(2, dtype=torch.float64)
        move[k] = step
        with torch.no_grad():
            parts.append((game.discriminator(x + move) - game.discriminator(x - move)) / 2 / step)
    expected = 0.4 * torch.stack(parts, 1).square().sum(1)
    assert torch.allclose(found, expected, rtol=1e-6)


def test_the_penalty_teaches() -> None:
    """d/db of γ/2 |Ax + b|² is γ (Ax + b)."""
    game = quadratic()
    critic = game.discriminator
    assert isinstance(critic, Quadratic)
    (found,) = torch.autograd.grad(r1_of(game)(data()).sum(), critic.b)
    assert torch.allclose(found, 0.8 * critic.slope(data()).sum(0), rtol=1e-4, atol=1e-5)


def test_penalties_relax_by_a_half_cosine() -> None:
    rules = Rules(gan.Hinge(), r1=4.0, relax=0.1)
    assert [rules.strength(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.55, 0.1])
    full, half = (critic_loss(quadratic(), rules, data(), p) for p in (0.0, 0.5))
    none = critic_loss(quadratic(), Rules(gan.Hinge()), data())
    assert torch.allclose(half - none, 0.55 * (full - none), rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: type(x).__name__)
def test_a_player_moves_its_own_weights_only(loss: gan.Loss) -> None:
    game, rules = small(), Rules(loss, r1=0.1, r2=0.1)
    DiscriminatorLoss(game, rules)(data()).mean().backward()
    assert all(p.grad is None for p in game.generator.parameters())
    moved = [p.grad is not None and bool(p.grad.any()) for p in game.discriminator.parameters()]
    assert sum(moved) >= len(moved) - 1  # the last bias may cancel
    game.zero_grad(set_to_none=True)
    GeneratorLoss(game, rules)(data()).mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in game.generator.parameters())
    assert all(p.grad is None and p.requires_grad for p in game.discriminator.parameters())


def test_the_minimax_generator_goes_down_the_value() -> None:
    game, x = small(), data(64)
    with seeded(2, "z"):
        loss = GeneratorLoss(game, Rules(gan.Minimax()))(x).mean()
    with seeded(2, "z"):
        value = game.value(x, game.noise(64)).mean()
    weights = list(game.generator.parameters())
    for mine, other in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(value, weights), strict=True
    ):
        assert torch.allclose(mine, other, atol=1e-7)


def test_the_running_value() -> None:
    """Over the last batches; a relativistic D is read at its best offset."""
    game, x = small(), data(64)
    loss = DiscriminatorLoss(game, Rules(gan.NonSaturating()))
    assert math.isnan(loss.plug_in())
    with seeded(2, "z"):
        mean = float(loss(x).mean().detach())
    assert loss.plug_in() == pytest.approx(math.log(2) - mean / 2, abs=1e-6)
    pairs = DiscriminatorLoss(game, Rules(gan.Relativistic()))
    with seeded(2, "z"):
        pairs(x)
    assert pairs.plug_in() > loss.plug_in()


def test_a_discriminator_reaches_the_value_of_two_known_laws() -> None:
    """N(0, 1) against N(1, 1/4): held-out L_D <= JSD, within 5 standard errors and .004 nats.

    A loss with another factor (half of it, say) would be off by .1 nats and more.
    """
    torch.manual_seed(0)
    critic = players.VectorDiscriminator(1, 32, 2, directions=0)
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)
    loss = gan.NonSaturating()
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / 300)
        x, y = torch.randn(1024, 1), 1 + 0.5 * torch.randn(1024, 1)
        optimizer.zero_grad()
        loss.discriminator(critic(x), critic(y)).mean().backward()
        optimizer.step()
    u = np.linspace(-12, 12, 200_001)
    p, g = np.exp(-(u**2) / 2), 2 * np.exp(-2 * (u - 1) ** 2)
    p, g = p / p.sum(), g / g.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = p * np.log(2 * p / (p + g)), np.where(g > 0, g * np.log(2 * g / (p + g)), 0)
    exact = float(sum(t.sum() for t in terms)) / 2
    with torch.no_grad():
        real, fake = critic(torch.randn(200_000, 1)), critic(1 + 0.5 * torch.randn(200_000, 1))
    se = float(gan.value(real, fake).std()) / 2 / math.sqrt(200_000)
    assert exact - 0.004 - 5 * se < plug_in(real, fake) < exact + 5 * se


# --- rows are independent ------------------------------------------------------------------------


def check_rows(network: nn.Module, x: Tensor) -> None:
    """Neither the order nor the company of a row changes what becomes of it."""
    network.train()
    with torch.no_grad():
        whole = network(x)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        parts = torch.cat([network(part) for part in x.split(3)])
        assert torch.allclose(network(x[order]), whole[order], atol=1e-5)
        assert torch.allclose(parts, whole, atol=1e-5)


PLAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: players.VectorGenerator(3, 2, 16, 2), (3,)),
    (lambda: players.VectorDiscriminator(2, 16, 2, 2), (2,)),
    (lambda: players.ImageGenerator(5, (3, 8, 12), 8), (5,)),
    (lambda: players.ImageDiscriminator((3, 8, 12), 8), (3, 8, 12)),
]


@pytest.mark.parametrize("kind", range(len(PLAYERS)))
def test_no_statistics_of_a_batch(kind: int) -> None:
    make, shape = PLAYERS[kind]
    torch.manual_seed(0)
    network = make()
    for parameter in network.parameters():  # what starts at zero could hide something
        nn.init.normal_(parameter, std=0.2)
    check_rows(network, torch.randn(8, *shape))


def test_the_check_finds_batch_normalisation() -> None:
    with pytest.raises(AssertionError):
        check_rows(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(8, 3))


@pytest.mark.parametrize("size", [(3, 3), (7, 9), (8, 8), (28, 28), (32, 20)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    shape = (1, *size)
    assert players.ImageGenerator(4, shape, 4)(torch.randn(2, 4)).shape == (2, *shape)
    assert players.ImageDiscriminator(shape, 4)(torch.randn(2, *shape)).shape == (2,)


# --- what D sees ---------------------------------------------------------------------------------


def images(count: int = 200) -> Tensor:
    return torch.rand(count, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_changes_are_the_same_for_reals_and_fakes() -> None:
    rules, x = Rules(gan.Hinge(), change=Moved(0.5)), images()
    with seeded(0, "change"):
        seen = rules.seen(x)
    with seeded(0, "change"):
        assert torch.equal(rules.real(x), seen)
    changed = (seen != x).flatten(1).any(1).double().mean()
    # 1 - 1/2^3 of them, a shift by (0, 0) apart; a share of one half alone would be seen
    assert 0.75 < float(changed) < 0.95
    with seeded(0, "change"):
        assert torch.equal(Moved(0.0)(x), x)


def test_gradients_pass_through_every_change() -> None:
    """Each output pixel of a shift has one source, a cut one has none, brightness adds nothing."""
    x = images().requires_grad_()
    cut = 3 * 3 * 2
    for change, expected in (
        (Moved(1.0, cut=0.0, bright=0.0), 128.0 - 2),
        (Moved(1.0, shift=0.0, bright=0.0), 128.0 - cut),
        (Moved(1.0), 128.0 - cut),
    ):
        torch.manual_seed(0)
        (slope,) = torch.autograd.grad(change(x).sum(), x)
        sums = slope.flatten(1).sum(1)
        assert bool((sums >= 0).all()) and float(sums.mean()) == pytest.approx(expected, abs=3)


def dataset(levels: int) -> Dataset:
    rows = torch.arange(levels, dtype=torch.uint8)[:, None, None, None].expand(levels, 1, 4, 4)
    parts = {"train": rows, "validation": rows, "test": rows}
    return Dataset.of_levels("levels", parts, levels, {})


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_rounding_undoes_dequantisation(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, also for the extreme draws of float32; and the noise fills the bin."""
    made = dataset(levels)
    x = made.encode(made.train)
    torch.manual_seed(0)
    noisy = Dequantised(levels)(x)
    assert torch.equal(made.decode(noisy), made.train)
    u = (noisy - x).double() * (levels - 1) / 2
    assert float(u.abs().max()) <= 0.5 and float(u.var()) == pytest.approx(1 / 12, rel=0.2)
    assert float((noisy == x).double().mean()) < 0.01
    for extreme in (0.0, 1 - 2.0**-24):
        monkeypatch.setattr(torch, "rand", lambda *shape, u=extreme, **_: torch.full(shape, u))
        assert torch.equal(made.decode(Dequantised(levels)(x)), made.train)


# --- the average ---------------------------------------------------------------------------------


def test_half_of_the_weight_is_younger_than_the_half_life() -> None:
    decay = Halving(1000.0, 10)
    late = [decay(step) for step in range(10_000, 10_100)]
    assert math.prod(late) == pytest.approx(0.5)  # 100 updates of 10 examples
    early = decay(99)  # 1000 examples so far: a twentieth of them
    assert early == pytest.approx(0.5 ** (10 / 50))
    assert Halving(0.0, 10)(5) == 0.0
