"""The side-by-side benchmark: turns, ratios, and who is absent, without any peer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from peers import improved, ours  # noqa: E402
from peers.contest import SHIPPED, SMALL, Absent, Contestant, Setting, Tuning  # noqa: E402
from peers.measuring import Ceiling, Measured, flops, rounds  # noqa: E402
from peers.tables import ratios, text  # noqa: E402

TINY = Setting("tiny", 8, 32, (1, 2), 1, 4, batch=4, calls=2, draws=4)


def contestant(project: str) -> Contestant:
    network = nn.Conv2d(3, 3, 1)
    x = torch.zeros(2, 3, 4, 4)
    call = lambda: network(x)  # noqa: E731
    return Contestant(project, SHIPPED, network, call, call, call)


def test_ratios_are_of_the_same_round() -> None:
    one = Measured("training", contestant("nelbo"), [10.0, 40.0, 90.0], [1.0, 1.0, 1.0])
    two = Measured("training", contestant("peer"), [10.0, 20.0, 30.0], [2.0, 2.0, 2.0])
    (row,) = ratios([one, two])
    assert row["rates"] == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert row["processor"] == {"median": 0.5, "least": 0.5, "most": 0.5}
    document = {"rows": [m.json({m.one.name: 1.0}, Ceiling(1, "")) for m in (one, two)]}
    assert "2.00 (1.00-3.00)" in text(document | {"ratios": [row]})


def test_a_contestant_that_fails_is_named_and_the_others_go_on() -> None:
    def fails() -> Any:
        raise RuntimeError("no such kernel\nand more")

    good, bad = contestant("nelbo"), contestant("peer")
    first, second = rounds(
        "training", {good: (good.update, 2.0), bad: (fails, 2.0)}, "cpu", 2, 0.01
    )
    assert first.failed is None and len(first.rates) == 2 and min(first.rates) > 0
    assert second.failed == "RuntimeError: no such kernel" and not second.rates


def test_operations_are_counted() -> None:
    """A 1x1 convolution of 3 channels on 2 x 4 x 4 pixels: 2 * 9 each."""
    assert flops(contestant("peer")) == 2 * 9 * 32


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
    assert one.evaluate is not None and one.evaluate(None) == one.evaluate(2) == 4.0


def test_tunings_prepare_a_network() -> None:
    network = nn.Conv2d(3, 8, 3)
    Tuning("channels-last", channels_last=True).prepare(network)
    assert network.weight.is_contiguous(memory_format=torch.channels_last)
