"""The side-by-side benchmark: turns, ratios, and who is absent, without any peer."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import speed  # noqa: E402
from peers import improved, ours  # noqa: E402
from peers.contest import SHIPPED, SMALL, Absent, Contestant, Setting, Tuning, each  # noqa: E402
from peers.measuring import Ceiling, Measured, Turn, flops, rounds  # noqa: E402
from peers.tables import ratios, shares, text  # noqa: E402

TINY = Setting("tiny", 8, 32, (1, 2), 1, 4, batch=4, calls=2, draws=4, terms=2)
PAIR = TINY.with_batch(2)


def contestant(project: str) -> Contestant:
    network = nn.Conv2d(3, 3, 1)
    x = torch.zeros(2, 3, 4, 4)
    call = lambda: network(x)  # noqa: E731
    return Contestant(project, SHIPPED, PAIR, network, call, call, call)


def test_ratios_are_of_the_same_round() -> None:
    one = Measured("training", contestant("nelbo"), [10.0, 40.0, 90.0], [1.0, 1.0, 1.0])
    two = Measured("training", contestant("peer"), [10.0, 20.0, 30.0], [2.0, 2.0, 2.0])
    (row,) = ratios([one, two])
    assert row["rates"] == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert row["processor"] == {"median": 0.5, "least": 0.5, "most": 0.5}
    rows = [m.json({m.one.name: 1.0}, Ceiling(1, "")) for m in (one, two)]
    assert "2.00 (1.00-3.00)" in text({"pieces": [{"rows": rows, "ratios": [row]}]})


def test_a_contestant_that_fails_is_named_and_the_others_go_on() -> None:
    def fails() -> Any:
        raise RuntimeError("no such kernel\nand more")

    good, bad = contestant("nelbo"), contestant("peer")
    turns: dict[Turn, Any] = {("training", good): (good.update, 2.0)}
    first, second = rounds(turns | {("training", bad): (fails, 2.0)}, "cpu", 2, 0.01)
    assert first.failed is None and len(first.rates) == 2 and min(first.rates) > 0
    assert second.failed == "RuntimeError: no such kernel" and not second.rates


def test_operations_are_counted() -> None:
    """A 1x1 convolution of 3 channels on 4 x 4 pixels: 2 * 9 each."""
    assert flops(contestant("peer")) == 2 * 9 * 16


def test_calls_are_counted_by_who_makes_them() -> None:
    one = contestant("nelbo")
    (found,) = rounds({("full bound", one): (lambda: 12.0, None)}, "cpu", 1, 0.0)
    (fewer,) = rounds(
        {("full bound", one): (lambda: time.sleep(0.05) or 12.0, None)}, "cpu", 1, 0.0
    )
    assert 100 < fewer.rates[0] < 12 / 0.05 < found.rates[0]


def test_who_cannot_be_built_fails_at_every_work() -> None:
    def make(setting: Setting, tuning: Tuning) -> Contestant:
        if tuning.name == "bad":
            raise TypeError("no such argument")
        return contestant("peer")

    found = each("peer", TINY, [Tuning("bad", batch=2), SHIPPED], make)
    assert [one.tuning.name for one in found] == ["bad", "as shipped"]
    assert found[0].setting.batch == 2 and flops(found[0]) == 0
    first, second = rounds({("w", c): (c.update, 2.0) for c in found}, "cpu", 1, 0.01)
    assert first.failed == "TypeError: no such argument" and second.rates


def test_who_fails_later_keeps_no_rates() -> None:
    """A failure in the second round, and one who does not get ready."""
    calls = iter(range(100))

    def fails() -> Any:
        if next(calls) == 3:
            raise MemoryError("no more")

    def sleeps() -> Any:
        time.sleep(9)

    late, slow, good = contestant("peer"), contestant("slow"), contestant("nelbo")
    calls_of = {late: fails, slow: sleeps, good: good.update}
    found = rounds({("w", c): (f, 1.0) for c, f in calls_of.items()}, "cpu", 2, 0.0, wait=0.2)
    assert found[0].failed == "MemoryError: no more" and not found[0].rates
    assert found[1].failed == "TimeoutError: not ready after 0.2 s"
    assert len(found[2].rates) == 2 and found[2].ready is not None


def test_a_piece_takes_the_place_of_the_same_one() -> None:
    document: dict[str, Any] = {"pieces": []}
    for projects, value in ((["a"], 1), (["a", "b"], 2), (["a"], 3)):
        piece = {"work": "training", "setting": {}, "projects": projects, "value": value}
        speed.added(document, piece)
    assert [p["value"] for p in document["pieces"]] == [2, 3]


def test_shares_of_an_update_and_of_the_bound() -> None:
    one = contestant("nelbo")
    both = ("training", "forward and backward", "forward", "full bound")
    rates = ([90.0, 190.0], [100.0, 200.0], [300.0, 300.0], [285.0, 300.0])
    found = [Measured(w, one, r, [1.0, 2.0]) for w, r in zip(both, rates, strict=True)]
    found.append(Measured("training", contestant("peer"), failed="no"))
    update, full = shares(found)
    assert update["rates"] == pytest.approx({"median": 0.925, "least": 0.9, "most": 0.95})
    assert full["rates"] == pytest.approx({"median": 0.975, "least": 0.95, "most": 1.0})


def test_a_killed_run_leaves_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second work is interrupted: the first is in the file, and the next run adds to it."""
    path = tmp_path / "speed.json"
    monkeypatch.setattr(speed, "entered", lambda *rest: ([contestant("nelbo")], {"x": "gone"}))
    right = speed.rounds

    def rounds(turns: dict[Turn, Any], *rest: Any) -> Any:
        if any(work == "forward" for work, _ in turns):
            raise KeyboardInterrupt
        return right(turns, *rest)

    given = ["--into", str(path), "--rounds", "1", "--seconds", "0.01", "--small", "--works"]
    monkeypatch.setattr(speed, "rounds", rounds)
    with pytest.raises(KeyboardInterrupt):
        speed.main([*given, "training", "forward"])
    monkeypatch.setattr(speed, "rounds", right)
    speed.main([*given, "forward", "training"])
    found = json.loads(path.read_text())["pieces"]
    assert [p["work"] for p in found] == ["forward", "training"]
    assert all(p["absent"] == {"x": "gone"} and p["rows"][0]["median"] > 0 for p in found)


def test_absent_peers_say_why() -> None:
    with pytest.raises(Absent, match="--improved-diffusion PATH"):
        improved.contestants(SMALL, "cpu", False, None)


def test_nelbo_does_every_kind_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peers.contest.WANTED", "as shipped")
    (one,) = ours.contestants(TINY, "cpu", compiled=False)
    before = [p.detach().clone() for p in one.network.parameters()]
    assert torch.isfinite(torch.tensor(one.update()))
    assert any(not a.equal(b) for a, b in zip(before, one.network.parameters(), strict=True))
    assert one.predict().shape == one.sample().shape == (4, 3, 8, 8)
    assert one.evaluate is not None and one.evaluate(None) == 4 * (2 + 1)
    assert one.evaluate(2) > 4 * 2, "with its pilot"
    doing = speed.work("full bound", one)
    assert doing is not None and doing[1] is None and doing[0]() == 12


def test_tunings_prepare_a_network() -> None:
    network = nn.Conv2d(3, 8, 3)
    Tuning("channels-last", channels_last=True).prepare(network)
    assert network.weight.is_contiguous(memory_format=torch.channels_last)
