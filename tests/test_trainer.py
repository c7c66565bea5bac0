"""The trainer: resumed is straight bit for bit, rates are exact, failures stop in time."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nelbo import checkpoint
from nelbo.averages import EMA, Warming
from nelbo.data.loading import batch_indices
from nelbo.errors import InputRefused, NumericalFailure
from nelbo.rates import Rate
from nelbo.trainer import Player, Record, Trainer

State = dict[str, dict[str, Tensor]]
DATA = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """With dropout, a buffer that changes, and a parameter without gradient."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.SiLU(), nn.Linear(8, 3))
        self.idle = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        out: Tensor = self.layers(x)
        return out


def trainer(steps: int = 12, accumulation: int = 2, seed: int = 0) -> Trainer:
    """Batches of 4 out of 10 straddle epochs; the loss draws noise; the EMA is warming up."""
    torch.manual_seed(1)
    net = Net()

    def loss(x: Tensor) -> Tensor:
        return ((net(x + torch.randn_like(x)) - x) ** 2).sum(1)

    optimizer = torch.optim.AdamW(net.parameters(), lr=1.0, fused=True)
    return Trainer(
        [Player("net", net, optimizer, loss)],
        lambda step: DATA[batch_indices(10, 4, 0, step)],
        Rate(0.01, 12, warmup=5),
        steps=steps,
        seed=seed,
        ema=Warming(0.999),
        clip=1.0,
        accumulation=accumulation,
    )


def walked(to: int, **more: int) -> Trainer:
    made = trainer(to, **more)
    for _ in made:
        pass
    return made


def assert_equal(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for group in a:
        assert a[group].keys() == b[group].keys()
        for name in a[group]:
            assert torch.equal(a[group][name], b[group][name]), f"{group}: {name}"


def through_disk(state: State, path: Path) -> State:
    checkpoint.save(path, state, {})
    return checkpoint.load(path).tensors


# --- resumed is straight -------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [[5], [1, 7], [4, 5, 11]])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_resumed_is_straight(stops: list[int], accumulation: int, tmp_path: Path) -> None:
    straight = walked(12, accumulation=accumulation)
    state: State = {}
    for before, to in zip([0, *stops], [*stops, 12], strict=True):
        torch.manual_seed(before + 99)  # whatever the process has drawn before
        part = trainer(to, accumulation)
        if before:
            part.load_state_dict(through_disk(state, tmp_path / f"step-{before}"), before)
        assert [record.step for record in part] == list(range(before + 1, to + 1))
        state = part.state_dict()
    assert_equal(straight.state_dict(), state)


def check_seeded() -> None:
    """Losses of the same steps are the same, and those of another seed are not."""
    first, second, other = ([r.losses["net"] for r in trainer(seed=s)] for s in (0, 0, 1))
    assert first == second and not set(first) & set(other)
    assert len(set(first)) == len(first), "every step has noise of its own"


def test_losses_are_a_function_of_the_seed() -> None:
    check_seeded()


def test_the_records() -> None:
    records = list(trainer(3))
    assert [type(r) for r in records] == [Record] * 3
    assert [r.step for r in records] == [1, 2, 3] and records[0].examples == 4
    assert [r.rate for r in records] == [Rate(0.01, 12, warmup=5)(k) for k in range(3)]


def test_a_finished_trainer_does_nothing() -> None:
    done = walked(4)
    before = {k: v.clone() for k, v in done.state_dict()["net"].items()}
    assert list(done) == []
    assert all(torch.equal(v, before[k]) for k, v in done.state_dict()["net"].items())


def test_the_state_holds_weights_averages_and_moments() -> None:
    state = walked(2).state_dict()
    assert list(state) == ["net", "net-ema", "net-optimizer"]
    assert state["net"].keys() == state["net-ema"].keys() and "seen" in state["net"]
    moments = {name.split(".", 1)[1] for name in state["net-optimizer"]}
    assert moments == {"step", "exp_avg", "exp_avg_sq"}


def test_loading_does_not_share_memory() -> None:
    first, second = walked(3), trainer(6)
    state = first.state_dict()
    copy = {g: {k: v.clone() for k, v in t.items()} for g, t in state.items()}
    second.load_state_dict(state, 3)
    list(second)
    assert_equal(copy, first.state_dict())


def test_a_state_of_another_model_is_refused() -> None:
    state = walked(2).state_dict()
    del state["net"]["idle"]
    with pytest.raises(RuntimeError, match="idle"):
        trainer().load_state_dict(state, 2)


# --- gradients -----------------------------------------------------------------------------------


def plain(accumulation: int = 1, clip: float | None = None, batch: int = 7) -> Trainer:
    """A deterministic loss in float64, plain gradient descent with rate 1."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    data = torch.randn(batch, 3, dtype=torch.float64)
    return Trainer(
        [
            Player(
                "net", net, torch.optim.SGD(net.parameters(), 1.0), lambda x: (net(x) ** 2).sum(1)
            )
        ],
        lambda step: data,
        Rate(1.0, 1, decay="constant"),
        steps=1,
        seed=0,
        ema=Warming(0.0),
        clip=clip,
        accumulation=accumulation,
    )


@pytest.mark.parametrize("accumulation", [2, 3, 7, 50])
def test_accumulation_is_the_gradient_of_the_whole_batch(accumulation: int) -> None:
    """7 examples in parts of different sizes."""
    whole, parts = plain(), plain(accumulation)
    a, b = next(iter(whole)), next(iter(parts))
    assert b.losses["net"] == pytest.approx(a.losses["net"], rel=1e-12)
    assert b.grad_norms["net"] == pytest.approx(a.grad_norms["net"], rel=1e-12)
    for one, other in zip(
        whole.players[0].module.parameters(), parts.players[0].module.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_clipping() -> None:
    """The norm is reported before clipping; the step has the length of the limit."""
    free, clipped = plain(), plain(clip=0.25)
    before = [p.detach().clone() for p in clipped.players[0].module.parameters()]
    norm = next(iter(free)).grad_norms["net"]
    assert next(iter(clipped)).grad_norms["net"] == pytest.approx(norm) and norm > 0.25
    after = clipped.players[0].module.parameters()
    square = sum(float(((a.detach() - b) ** 2).sum()) for a, b in zip(after, before, strict=True))
    assert math.sqrt(square) == pytest.approx(0.25, rel=1e-5)


def failing(at: int, how: Callable[[Tensor], Tensor]) -> Trainer:
    made = trainer(8)
    player, count = made.players[0], 0
    right = player.loss

    def loss(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        # two parts per update
        return how(right(x)) if count == 2 * at else right(x)

    made.players[0] = player._replace(loss=loss)
    return made


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (lambda v: v * math.nan, "the loss of net is nan"),
        (lambda v: v + math.inf, "the loss of net is inf"),
        (lambda v: v + 0 * (v - v.detach()).sqrt(), "the gradient norm of net is nan"),
    ],
)
def test_what_is_not_finite_stops_before_the_weights_change(
    how: Callable[[Tensor], Tensor], what: str
) -> None:
    made = failing(4, how)
    with pytest.raises(NumericalFailure, match=f"{what} at update 4; the weights of update 3"):
        list(made)
    assert made.step == 3
    good = walked(3).state_dict()
    bad = made.state_dict()
    for group in ("net", "net-ema", "net-optimizer"):
        names = [n for n in good[group] if n != "seen"]
        assert all(torch.equal(good[group][n], bad[group][n]) for n in names)


# --- rates ---------------------------------------------------------------------------------------


def test_rates() -> None:
    cosine = [Rate(2.0, 10, warmup=4)(k) for k in range(11)]
    half = [2 * 0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(7)]
    assert cosine == pytest.approx([0.5, 1.0, 1.5, 2.0, *half], abs=1e-15)
    assert cosine[7] == pytest.approx(1.0, abs=1e-15)
    constant = [Rate(2.0, 10, 2, "constant")(k) for k in range(5)]
    assert constant == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert Rate(1.0, 5)(0) == 1.0 and Rate(1.0, 5)(99) == pytest.approx(0)
    assert [Rate(1.0, 3, warmup=10)(k) for k in range(3)] == [0.1, 0.2, 0.3]


def test_the_optimiser_takes_the_rate_of_the_step() -> None:
    made = trainer(4)
    for k, record in enumerate(made):
        assert made.players[0].optimizer.param_groups[0]["lr"] == record.rate == 0.01 * (k + 1) / 5


# --- averages ------------------------------------------------------------------------------------


def test_the_average_warms_up() -> None:
    """Decay min(d, (1 + k)/(10 + k)) at update k, to rounding."""
    module = nn.Linear(1, 1, bias=False).double()
    average = EMA(module, Warming(0.3))
    expected = float(module.weight.detach())
    for k in range(6):
        nn.init.constant_(module.weight, float(k))
        average.update(module, k)
        decay = min(0.3, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * k
        assert float(average.module.weight) == pytest.approx(expected, rel=1e-14)


def test_a_bf16_model_has_a_float32_average_that_moves() -> None:
    """1 → 1.0078125 with decay .999: the first move, 7.8e-6, is far below bf16's resolution."""
    module = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(module.weight, 1.0)
    average = EMA(module, Warming(0.999))
    nn.init.constant_(module.weight, 1.0078125)
    average.update(module, 10**6)
    weight = average.module.weight
    assert weight.dtype == torch.float32 and module.weight.dtype == torch.bfloat16
    assert float(weight) == pytest.approx(1 + 0.001 * 0.0078125, abs=6e-8)
    assert float(weight.bfloat16()) == 1.0


def check_average() -> None:
    """After some updates the average lies between the first weights and the last."""
    made = walked(12)
    first = dict(trainer().players[0].module.named_parameters())
    last = dict(made.players[0].module.named_parameters())
    for name, value in made.averages["net"].module.named_parameters():
        if name != "idle":
            assert not torch.equal(value, last[name]), f"{name} is the raw weight"
            assert not torch.equal(value, first[name]), f"{name} never moved"


def test_the_average_is_neither_raw_nor_frozen() -> None:
    check_average()


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_check_finds_an_average_that_is_off(
    decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(average: EMA, module: nn.Module, step: int) -> None:
        if decay == 0:
            average.module.load_state_dict(module.state_dict())

    monkeypatch.setattr(EMA, "update", update)
    with pytest.raises(AssertionError, match="raw|never moved"):
        check_average()


def test_the_average_is_a_module_for_evaluation() -> None:
    made = walked(3)
    average = made.averages["net"].module
    assert not average.training and not any(p.requires_grad for p in average.parameters())
    assert made.players[0].module.training
    assert torch.equal(average.seen, made.players[0].module.seen), "buffers are copied"


# --- games, autocast -----------------------------------------------------------------------------


def test_players_move_in_turn_and_each_its_own_weights() -> None:
    torch.manual_seed(0)
    left, right = nn.Linear(1, 1), nn.Linear(1, 1)
    order: list[str] = []

    def player(name: str, mine: nn.Module, other: nn.Module) -> Player:
        def loss(x: Tensor) -> Tensor:
            order.append(name)
            value: Tensor = (mine(x) - other(x).detach()).square().sum(1)
            return value

        return Player(name, mine, torch.optim.SGD(mine.parameters(), 0.1), loss)

    made = Trainer(
        [player("left", left, right), player("right", right, left)],
        lambda step: torch.ones(2, 1),
        Rate(0.1, 3, decay="constant"),
        steps=3,
        seed=0,
        ema=Warming(0.9),
    )
    records = list(made)
    assert order == ["left", "right"] * 3
    assert records[-1].losses["right"] < records[0].losses["left"]
    assert set(made.state_dict()) == {
        f"{n}{s}" for n in ("left", "right") for s in ("", "-ema", "-optimizer")
    }


def test_autocast_is_around_the_loss_alone() -> None:
    seen: list[torch.dtype] = []
    net = nn.Linear(2, 2)

    def loss(x: Tensor) -> Tensor:
        out: Tensor = net(x)
        seen.append(out.dtype)
        return out.float().square().sum(1)

    def context() -> AbstractContextManager[None]:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    made = Trainer(
        [Player("net", net, torch.optim.SGD(net.parameters(), 0.1), loss)],
        lambda step: torch.ones(2, 2),
        Rate(0.1, 1),
        steps=1,
        seed=0,
        ema=Warming(0.9),
        autocast=context,
    )
    list(made)
    assert seen == [torch.bfloat16] and net.weight.dtype == torch.float32


def test_fewer_examples_than_a_batch() -> None:
    with pytest.raises(InputRefused, match="fewer than a batch of 11"):
        batch_indices(10, 11, 0, 0)
