"""Updates that nobody waits for: the same weights, and failures that are named one later."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nelbo.averages import EMA, Halving, Warming
from nelbo.decoders import Density
from nelbo.deferred import Deferred, Halved, recorded
from nelbo.errors import NumericalFailure, UsageError
from nelbo.losses import ModelLoss
from nelbo.objectives import Vlb
from nelbo.parameterizations import Epsilon
from nelbo.processes.gaussian import Gaussian
from nelbo.rates import Rate
from nelbo.recipes.groups import Options
from nelbo.replay import Replay
from nelbo.reverse import Reverse
from nelbo.schedules import Linear
from nelbo.stepping import Immediate, Player, Rules, Stepping
from nelbo.trainer import Trainer
from nelbo.walks.pace import chosen

Way = Callable[[Rules, list[Player]], Stepping]
STEPS = 20
DATA = torch.randn(STEPS + 4, 16, 6, generator=torch.Generator().manual_seed(0))


class Rehearsal:
    """Records nothing: what it was given to record is done again as it is."""

    recorded = 0

    def __init__(self, device: torch.device) -> None:
        self.calls = 0

    def call(self, work: Callable[[], None]) -> None:
        self.calls += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        Rehearsal.recorded += 1
        return work


def rehearsed(rules: Rules, players: list[Player]) -> Stepping:
    """`recorded` with inputs in places of their own and no CUDA graph."""
    return Deferred(rules, players, Rehearsal)


class Net(nn.Module):
    """With dropout, a buffer, and a parameter that has no gradient."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 16), nn.Dropout(0.2), nn.SiLU(), nn.Linear(16, 6))
        self.idle = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> Tensor:
        self.seen += 1
        out: Tensor = self.layers(torch.cat([x_t, t.expand(len(x_t))[:, None].to(x_t)], 1))
        return out


def made(way: Way, steps: int = STEPS, bad: int | None = None, device: str = "cpu") -> Trainer:
    """Batches of a bound; the data of update `bad` (from 1) hold a number that is none."""
    torch.manual_seed(1)
    schedule = Linear(50)
    model = Reverse(Gaussian(schedule), Net(), Epsilon(), Density()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.01, fused=True)
    data = DATA.clone()
    if bad is not None:
        data[bad - 1, 3, 2] = math.nan
    data = data.to(device)
    loss = ModelLoss(Vlb(schedule.grid()), model)
    return Trainer(
        [Player("model", model, optimizer, loss)],
        lambda move: data[move],
        Rate(0.01, STEPS, warmup=5),
        steps=steps,
        seed=0,
        ema=Warming(0.999),
        clip=3.0,
        whole=16,
        stepping=way,
    )


def close(one: Trainer, other: Trainer, far: float = 1e-5) -> None:
    """All tensors of two states; AdamW magnifies a rounding where a gradient is near 0."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for group in a:
        assert a[group].keys() == b[group].keys()
        for name in a[group]:
            torch.testing.assert_close(
                a[group][name].cpu(), b[group][name].cpu(), rtol=far, atol=far,
                msg=lambda text, name=name: f"{name}: {text}",
            )  # fmt: skip


WAYS = [Deferred, rehearsed]


@pytest.mark.parametrize("way", WAYS, ids=["deferred", "rehearsed"])
def test_the_same_weights_as_at_once(way: Way) -> None:
    """20 updates with dropout, clipping, warm-up, weight decay and averages."""
    right, found = made(Immediate), made(way)
    records = list(found)
    for expected, record in zip(right, records, strict=True):
        assert record.step == expected.step and record.rate == expected.rate
        assert record.losses["model"] == pytest.approx(expected.losses["model"], rel=1e-5)
        norm = expected.grad_norms["model"]
        assert record.grad_norms["model"] == pytest.approx(norm, rel=1e-4)
        assert record.losses.known and dict(record.losses).keys() == {"model"}
    close(right, found)


def test_the_comparison_finds_another_rate() -> None:
    """A rate that is off by a thousandth is seen."""
    other = made(Deferred)
    other.rate = Rate(0.01001, STEPS, warmup=5)
    right = made(Immediate)
    list(other), list(right)
    with pytest.raises(AssertionError):
        close(right, other)


@pytest.mark.parametrize("way", WAYS, ids=["deferred", "rehearsed"])
@pytest.mark.parametrize("bad", [1, 2, 7, STEPS])
def test_what_is_not_finite_changes_nothing(way: Way, bad: int) -> None:
    """It is named when the next update has been asked for, with the weights of before."""
    found, seen = made(way, bad=bad), []
    with pytest.raises(
        NumericalFailure, match=f"is nan at update {bad}; the weights of update {bad - 1} "
    ):  # noqa: E501
        for record in found:
            seen.append(record.step)
    assert found.step == bad - 1 and seen == list(range(1, bad + 1))
    right = made(Immediate, steps=bad - 1)
    list(right)
    a, b = right.state_dict(), found.state_dict()
    for group in ("model", "model-ema", "model-optimizer"):
        for name in a[group].keys() - {"network.seen"}:
            torch.testing.assert_close(a[group][name], b[group][name], rtol=1e-5, atol=1e-5)
    weights = [v for n, v in b["model"].items() if v.is_floating_point()]
    assert all(bool(v.isfinite().all()) for v in weights)


@pytest.mark.parametrize("way", WAYS, ids=["deferred", "rehearsed"])
def test_a_state_is_never_saved_after_a_failure(way: Way) -> None:
    """Asked for its state right after the update, the trainer looks at it first."""
    found = made(way, bad=3)
    for _ in range(3):
        found.update()
    with pytest.raises(NumericalFailure, match="at update 3"):
        found.state_dict()
    assert found.step == 2
    with pytest.raises(NumericalFailure, match="at update 3"):
        found.update()
        found.settle()


@pytest.mark.parametrize("way", WAYS, ids=["deferred", "rehearsed"])
@pytest.mark.parametrize("stop", [2, 9])
def test_resumed_is_straight(way: Way, stop: int) -> None:
    """Bit for bit on a CPU, through a state."""
    straight, first, second = made(way), made(way, steps=stop), made(way)
    list(straight), list(first)
    state = {g: {n: v.clone() for n, v in t.items()} for g, t in first.state_dict().items()}
    second.update()  # what was prepared before a state is loaded is forgotten
    second.load_state_dict(state, stop)
    assert [r.step for r in second] == list(range(stop + 1, STEPS + 1))
    a, b = straight.state_dict(), second.state_dict()
    for group in a:
        for name in a[group]:
            assert torch.equal(a[group][name], b[group][name]), f"{group}: {name}"


def test_a_replay_has_inputs_of_its_own() -> None:
    """Three calls as they are, one recording, the same places every time."""
    places, sums, total = set(), [], torch.zeros(())

    def work(x: Tensor) -> None:
        places.add(x.data_ptr())
        total.add_(x.sum())
        sums.append(float(x.sum()))

    recorder, before = Rehearsal(torch.device("cpu")), Rehearsal.recorded
    replay = Replay(work, recorder)
    for k in range(6):
        replay(torch.full((2,), float(k)))
    assert len(places) == 1 and sums == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0] and float(total) == 30
    assert recorder.calls == 3 and Rehearsal.recorded == before + 1
    with pytest.raises(AssertionError, match="one shape"):
        replay(torch.zeros(3))


def test_what_cannot_be_deferred_is_refused() -> None:
    net = nn.Linear(1, 1)
    plain = Player("net", net, torch.optim.SGD(net.parameters(), 0.1), lambda x: net(x)[:, 0])
    good = plain._replace(optimizer=torch.optim.AdamW(net.parameters(), fused=True))

    def trainer(players: list[Player], **more: Any) -> Trainer:
        return Trainer(
            players, lambda move: torch.ones(2, 1), Rate(0.1, 3), steps=3, seed=0,
            ema=Warming(0.9), stepping=Deferred, **more,
        )  # fmt: skip

    assert [r.step for r in trainer([good])] == [1, 2, 3]
    for players, more in (([good], {"accumulation": 2}), ([good, good], {}),
                          ([good._replace(moves=2)], {})):  # fmt: skip
        with pytest.raises(UsageError, match="one player, one process, whole batches"):
            trainer(players, **more)
    with pytest.raises(UsageError, match="fused=True"):
        trainer([plain])


@pytest.mark.parametrize("decay", [Warming(0.9), Halving(100.0, 10)])
def test_an_average_follows_by_a_tensor(decay: Any) -> None:
    torch.manual_seed(0)
    net = Net()
    one, other = EMA(net, decay), EMA(net, decay)
    for k in range(5):
        for p in net.parameters():
            nn.init.normal_(p)
        net.seen += 1
        one.update(net, k)
        other.follow(net, torch.tensor(1 - decay(k)))
        other.follow(net, torch.tensor(0.0))
    for a, b in zip(
        one.module.state_dict().values(), other.module.state_dict().values(), strict=True
    ):  # noqa: E501
        torch.testing.assert_close(a, b, rtol=1e-6, atol=5e-7)


def test_a_models_loss_has_two_halves() -> None:
    """What is drawn on the host is an input; the rest gives the same loss twice from one seed."""
    loss = made(Immediate).players[0].loss
    assert isinstance(loss, Halved) and isinstance(loss, ModelLoss) and loss.fixed
    torch.manual_seed(3)
    whole = loss(DATA[0])
    torch.manual_seed(3)
    inputs = loss.inputs(DATA[0])
    assert [tuple(x.shape) for x in inputs] == [(16, 6), (16,), (16,), (16,)]
    assert torch.equal(loss.given(*inputs), whole)


# --- on a GPU ------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@gpu
@needs_gpu
@pytest.mark.parametrize("way", [Deferred, recorded], ids=["deferred", "recorded"])
def test_on_a_gpu_the_same_weights(way: Way) -> None:
    """Draws of a graph follow the seed of each update: noise and dropout are the same."""
    right, found = made(Immediate, device="cuda"), made(way, device="cuda")
    losses = [r.losses["model"] for r in right]
    assert [r.losses["model"] for r in found] == pytest.approx(losses, rel=1e-4)
    close(right, found, 1e-4)


@gpu
@needs_gpu
@pytest.mark.parametrize("way", [Deferred, recorded], ids=["deferred", "recorded"])
@pytest.mark.parametrize("bad", [2, 7])
def test_on_a_gpu_what_is_not_finite_changes_nothing(way: Way, bad: int) -> None:
    found = made(way, bad=bad, device="cuda")
    with pytest.raises(NumericalFailure, match=f"is nan at update {bad};"):
        list(found)
    assert found.step == bad - 1
    right = made(Immediate, steps=bad - 1, device="cuda")
    list(right)
    a, b = right.state_dict(), found.state_dict()
    for group in ("model", "model-ema", "model-optimizer"):
        for name in a[group].keys() - {"network.seen"}:
            torch.testing.assert_close(a[group][name], b[group][name], rtol=1e-4, atol=1e-4)


@gpu
@needs_gpu
@pytest.mark.parametrize("way", [Deferred, recorded], ids=["deferred", "recorded"])
def test_on_a_gpu_nobody_waits(way: Way) -> None:
    """After the first updates nothing synchronises, until somebody reads a number."""
    found = made(way, device="cuda")
    for _ in range(6):
        found.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            found.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found.settle()


@gpu
@needs_gpu
def test_on_a_gpu_resumed_is_close(way: Way = recorded) -> None:
    straight, first, second = (made(way, steps=n, device="cuda") for n in (STEPS, 9, STEPS))
    list(straight), list(first)
    second.load_state_dict(first.state_dict(), 9)
    list(second)
    close(straight, second, 1e-4)


# --- which way a run takes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "device", "ranks", "fixed", "expected"),
    [
        ({}, "cpu", 1, True, (Immediate, True)),
        ({"compile": True}, "cpu", 1, True, (Immediate, True)),
        ({}, "cuda", 1, True, (Deferred, True)),
        ({"compile": True}, "cuda", 1, True, (recorded, False)),
        ({"compile": True}, "cuda", 1, False, (Deferred, True)),
        ({"compile": True}, "cuda", 2, True, (Immediate, False)),
        ({"compile": True, "batch": 1024}, "cuda", 1, True, (Deferred, True)),
        ({"compile": True, "accumulation": 2}, "cuda", 1, True, (Immediate, False)),
        ({"compile": True, "graphs": "network"}, "cuda", 1, True, (Deferred, True)),
        ({"compile": True, "graphs": "none"}, "cuda", 1, True, (Deferred, False)),
        ({"graphs": "update"}, "cuda", 1, True, (recorded, False)),
    ],
)
def test_the_way_of_a_run(
    more: dict[str, Any], device: str, ranks: int, fixed: bool, expected: tuple[object, bool]
) -> None:
    way = chosen(Options(**more), device, ranks, fixed)
    assert (way.stepping, way.network) == expected


def test_a_graph_that_was_asked_for_is_not_left_out_in_silence() -> None:
    asked = Options(graphs="update")
    with pytest.raises(UsageError, match="--graphs update: a CUDA graph needs a GPU"):
        chosen(asked, "cpu", 1, True)
    with pytest.raises(UsageError, match="--graphs update: ranks add up"):
        chosen(asked, "cuda", 2, True)
    said = chosen(Options(compile=True, accumulation=2), "cuda", 1, True).said
    assert said == "updates: one after the other (one graph: a batch is computed in parts)"
