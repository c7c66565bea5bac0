"""What is drawn for an example does not depend on how its batch is cut into pieces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nelbo import randomness
from nelbo.gan import DiscriminatorLoss, GeneratorLoss
from nelbo.networks.layers import Dropout
from nelbo.randomness import by_row, for_all, picked, place_of, rows_of
from nelbo.recipes.adversarial import build_game
from nelbo.recipes.build import build
from nelbo.recipes.families import kind_of
from nelbo.recipes.groups import Options
from nelbo.timesampling import ladder

CUTS = [[0, 11], [0, 4, 11], [0, 1, 5, 6, 11], list(range(12))]


def pieces(cuts: list[int], compute: Callable[[range], Tensor], seed: int = 0) -> Tensor:
    """compute(rows) of every piece of a batch of 11, one after the other."""
    found = []
    for low, high in zip(cuts, cuts[1:], strict=False):
        torch.manual_seed(low)  # whatever was drawn before
        with rows_of(range(low, high), cuts[-1], seed, "test"):
            found.append(compute(range(low, high)))
    return torch.cat(found)


def drawn(rows: range) -> Tensor:
    """Draws of several kinds, one after the other."""
    count = len(rows)
    normal = by_row(count, lambda n, g: torch.randn(n, 3, generator=g))
    shared = for_all(lambda g: torch.rand(2, generator=g))
    uniform = by_row(count, lambda n, g: torch.rand(n, 1, dtype=torch.float64, generator=g))
    dropped = Dropout(0.5)(torch.ones(count, 4, 2))
    whole = Dropout(0.5, channels=True)(torch.ones(count, 4, 2))
    columns = [normal, shared.expand(count, 2), uniform, dropped.flatten(1), whole.flatten(1)]
    return torch.cat([*columns, ladder(count)[:, None]], 1)


@pytest.mark.parametrize("block", [512, 4, 1])
def test_pieces_draw_what_the_batch_draws(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "BLOCK", block)
    found = [pieces(cuts, drawn) for cuts in CUTS]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert len(found[0][:, 0].unique()) == 11 and len(found[0][:, 3].unique()) == 1
    assert not torch.equal(found[0], pieces(CUTS[0], drawn, seed=1))


def test_rows_that_are_picked_draw_their_own() -> None:
    def some(rows: range) -> Tensor:
        every = by_row(len(rows), lambda n, g: torch.randn(n, generator=g))
        with picked(torch.arange(0, len(rows), 2), "some"):
            half = by_row(-(-len(rows) // 2), lambda n, g: torch.randn(n, generator=g))
        again = by_row(len(rows), lambda n, g: torch.randn(n, generator=g))
        assert not torch.equal(every, again)
        return half

    with rows_of(range(3, 9), 11, 0, "test"):
        assert place_of(6) == (3, 11)
        assert len(some(range(3, 9))) == 3
    assert place_of(6) == (0, 6)


def test_outside_of_a_batch_draws_are_plain() -> None:
    torch.manual_seed(3)
    first = by_row(5, lambda n, g: torch.randn(n, generator=g))
    torch.manual_seed(3)
    assert torch.equal(first, torch.randn(5))


def test_dropout_is_that_of_torch() -> None:
    """Kept with probability 1 − p and scaled; 40,000 draws, off by less than five errors."""
    layer, x = Dropout(0.3), torch.ones(40_000)
    torch.manual_seed(0)
    seen = layer(x)
    assert set(seen.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7))}
    assert abs(float((seen == 0).float().mean()) - 0.3) < 5 * (0.21 / 40_000) ** 0.5
    assert torch.equal(layer.eval()(x), x) and torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()


SMALL = {
    "channels": 16,
    "multipliers": (1,),
    "layers": 1,
    "attention": (),
    "latents": 12,
    "dropout": 0.5,
}
WAYS = {
    "vlb": {},
    "independent": {"times": "independent"},
    "second-moment": {"times": "second-moment"},
    "continuous": {"objective": "continuous", "schedule": "learned"},
    "simple": {"objective": "simple"},
    "hybrid": {
        "objective": "hybrid",
        "variance": "between",
        "predict": "epsilon",
        "decoder": "discretized",
    },
    "augmented": {"augment": 0.5},
    "members": {"members": 2},
    "levels": {"predict": "levels"},
    "channels": {"drop_channels": True},
}


def losses(kind: str, cuts: list[int]) -> Tensor:
    options = kind_of("digits", "diffusion")(**(SMALL | WAYS[kind]))
    assert isinstance(options, Options)
    recipe = build(options)
    x_0 = recipe.dataset.encode(recipe.dataset.train[:11])
    model = recipe.model.train()
    torch.manual_seed(5)
    for parameter in model.network.parameters():  # fresh networks put out zeros
        parameter.data += 0.05 * torch.randn_like(parameter)
    return pieces(cuts, lambda rows: recipe.objective(model, x_0[rows.start : rows.stop]).detach())


@pytest.mark.parametrize("kind", WAYS)
def test_losses_of_pieces_are_those_of_the_batch(kind: str) -> None:
    whole, cut = losses(kind, CUTS[0]), losses(kind, CUTS[2])
    torch.testing.assert_close(cut, whole, rtol=2e-5, atol=1e-5)


def test_bits() -> None:
    recipe = build(kind_of("heartbeat", "diffusion")(width=8))  # type: ignore[arg-type]
    x_0 = recipe.dataset.encode(recipe.dataset.train[:11])

    def loss(rows: range) -> Tensor:
        return recipe.objective(recipe.model, x_0[rows.start : rows.stop]).detach()

    torch.testing.assert_close(pieces(CUTS[2], loss), pieces(CUTS[0], loss), rtol=1e-5, atol=1e-5)


def test_a_plain_draw_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above sees a draw that is not made by row."""
    monkeypatch.setattr("nelbo.networks.layers.by_row", lambda n, make, device: make(n, None))
    with pytest.raises(AssertionError):
        test_losses_of_pieces_are_those_of_the_batch("vlb")


@pytest.mark.parametrize("loss", ["non-saturating", "relativistic"])
def test_games(loss: str) -> None:
    options = kind_of("digits", "game")(loss=loss, channels=8, augment=0.5, r2=1.0)
    recipe = build_game(options)  # type: ignore[arg-type]
    x_0 = recipe.dataset.encode(recipe.dataset.train[:11])
    players: list[Callable[[Tensor], Tensor]] = [
        DiscriminatorLoss(recipe.game, recipe.rules),
        GeneratorLoss(recipe.game, recipe.rules),
    ]
    for player in players:

        def value(rows: range, player: Callable[[Tensor], Tensor] = player) -> Tensor:
            return player(x_0[rows.start : rows.stop]).detach()

        whole, cut = pieces(CUTS[0], value), pieces(CUTS[2], value)
        torch.testing.assert_close(cut, whole, rtol=2e-5, atol=1e-5)


def test_the_mean_over_a_cut_batch_has_its_gradient() -> None:
    net = nn.Linear(3, 2).double()
    x = torch.randn(11, 3, dtype=torch.float64)

    def gradient(cuts: list[int]) -> Tensor:
        net.zero_grad()

        def loss(rows: range) -> Tensor:
            noise = by_row(len(rows), lambda n, g: torch.randn(n, 3, generator=g))
            value: Tensor = net(x[rows.start : rows.stop] + noise).square().sum(1) / 11
            value.sum().backward()
            return value.detach()

        pieces(cuts, loss)
        assert net.weight.grad is not None
        return net.weight.grad.clone()

    torch.testing.assert_close(gradient(CUTS[2]), gradient(CUTS[0]), rtol=1e-12, atol=1e-14)
