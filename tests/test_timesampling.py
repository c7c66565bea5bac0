"""Second-moment sampling of terms: the published rule, unbiased, and part of a run's state."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import GaussianData, assert_mean, exact_model, expected_bound, noise_points
from tiny import command, silent
from torch import Tensor

from nelbo import checkpoint, timesampling
from nelbo.errors import InputRefused
from nelbo.objectives import Vlb
from nelbo.reverse import Reverse
from nelbo.schedules import LogSNRLinear
from nelbo.timesampling import SecondMoment, ladder, place
from nelbo.trainer import Trainer
from nelbo.variances import Posterior

SCHEDULE = LogSNRLinear(5.0, -1.0)
TIMES = SCHEDULE.grid(6)
DATA = GaussianData([0.5, -0.2], [[0.49, 0.3], [0.3, 1.7]])
CORNERS = torch.tensor([[2.0, -1.0], [0.5, 0.0], [-2.0, 3.0], [1.0, 1.0]], dtype=torch.float64)


def model() -> Reverse:
    return exact_model(DATA, SCHEDULE, Posterior())


class Slow:
    """The rule written as the paper tells it: a list of the last ten values for every index."""

    def __init__(self, count: int) -> None:
        self.last: list[list[float]] = [[] for _ in range(count)]

    def remember(self, index: Tensor, terms: Tensor) -> None:
        for i, value in zip(index.tolist(), terms.tolist(), strict=True):
            self.last[i] = [*self.last[i], value][-10:]

    def probabilities(self) -> list[float]:
        n = len(self.last)
        if any(len(values) < 10 for values in self.last):
            return [1 / n] * n
        root = [math.sqrt(sum(v * v for v in values) / 10) for values in self.last]
        return [0.999 * r / sum(root) + 0.001 / n for r in root]


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_probabilities_are_those_of_the_paper(batch: int) -> None:
    """Batches that hold an index not at all, once, and more than ten times."""
    generator = torch.Generator().manual_seed(batch)
    fast, slow = SecondMoment(5), Slow(5)
    seen = set()
    for _ in range(900 // batch + 3):
        index = torch.multinomial(
            torch.tensor([1.0, 2, 3, 4, 9]), batch, True, generator=generator
        )
        terms = torch.randn(batch, dtype=torch.float64, generator=generator) * (1 + index) ** 2
        fast.remember(index, terms)
        slow.remember(index, terms)
        expected = torch.tensor(slow.probabilities(), dtype=torch.float64)
        torch.testing.assert_close(fast.probabilities(), expected, rtol=1e-13, atol=0)
        seen.add(fast.warm)
    assert seen == {True, False} if batch < 200 else seen == {True}
    assert float(fast.probabilities().max()) > 0.3


def test_terms_without_any_size_are_drawn_evenly() -> None:
    history = SecondMoment(3)
    history.remember(torch.arange(3).repeat(10), torch.zeros(30))
    assert history.warm and history.probabilities().tolist() == [1 / 3] * 3


def test_place_inverts_the_distribution_function() -> None:
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    index, fraction = place(
        p, torch.tensor([0.0, 0.1, 0.2, 0.45, 0.73, 0.85], dtype=torch.float64)
    )
    assert index.tolist() == [0, 0, 1, 1, 2, 2]
    assert fraction.tolist() == pytest.approx([0, 0.5, 0, 0.5, 0.1, 0.5], abs=1e-12)
    torch.manual_seed(0)
    u = ladder(8).sort().values
    torch.testing.assert_close(u.diff(), torch.full((7,), 1 / 8).double())


# --- unbiased while it adapts --------------------------------------------------------------------


def means(peeking: bool = False) -> Tensor:
    """Batch means of the objective while the history adapts to the very batches it weighs."""
    objective, exact = Vlb(TIMES), model()
    objective.history = SecondMoment(len(TIMES))
    torch.manual_seed(2)
    found = []
    for k in range(1200):
        found.append(objective(exact, CORNERS.repeat(8, 1)).mean())
        assert k < 60 or objective.history.warm
        if peeking:  # as if p were refitted on the draw that it weighs
            found[-1] = found[-1] * objective.history.probabilities().max() * len(TIMES)
    return torch.stack(found)


def truth() -> float:
    exact = model()
    each = [float(expected_bound(exact, noise_points(x), TIMES).total) for x in CORNERS]
    return sum(each) / 4


def test_the_objective_stays_unbiased() -> None:
    """1200 batches of 32; the means of neighbouring batches share a history, but no bias."""
    assert_mean(means(), truth(), what="second moment")
    with pytest.raises(AssertionError):
        assert_mean(means(peeking=True), truth(), what="second moment")


def test_independent_times_are_unbiased_and_vary_more() -> None:
    objective, even, exact = Vlb(TIMES), Vlb(TIMES), model()
    objective.independent = True
    torch.manual_seed(1)
    alone = torch.stack([objective(exact, CORNERS.repeat(8, 1)).mean() for _ in range(800)])
    together = torch.stack([even(exact, CORNERS.repeat(8, 1)).mean() for _ in range(800)])
    assert_mean(alone, truth(), what="independent")
    assert float(together.var()) < 0.7 * float(alone.var())


def test_it_lowers_the_variance() -> None:
    """Of independent draws, where a few terms are large: at least by a quarter."""
    steep = LogSNRLinear(9.0, -9.0)
    times = steep.grid(12)
    exact = exact_model(DATA, steep, Posterior())
    found = {}
    for kind in ("uniform", "second moment"):
        objective = Vlb(times)
        objective.independent = True
        if kind != "uniform":
            objective.history = SecondMoment(12)
        torch.manual_seed(0)
        for _ in range(80):
            objective(exact, CORNERS.repeat(8, 1))
        found[kind] = float(torch.cat([objective(exact, CORNERS) for _ in range(1500)]).var())
    assert found["second moment"] < 0.75 * found["uniform"]


# --- state ---------------------------------------------------------------------------------------


def test_ranks_remember_the_values_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gather giving two shares in the order of ranks, each rank has the history of one."""
    index, terms = torch.arange(4).repeat(6), torch.arange(24).double()
    alone = SecondMoment(4)
    alone.remember(index, terms)
    shares = {
        torch.int64: [index[:9], index[9:]],
        torch.float64: [terms[:9], terms[9:]],
    }
    monkeypatch.setattr(timesampling, "gather", lambda mine: shares[mine.dtype])
    for rank in range(2):
        each = SecondMoment(4)
        part = slice(0, 9) if rank == 0 else slice(9, None)
        each.remember(index[part], terms[part])
        assert torch.equal(each.values, alone.values) and torch.equal(each.counts, alone.counts)


def test_a_history_that_cannot_be_is_refused() -> None:
    good = SecondMoment(3).state_dict()
    for bad, message in (
        (SecondMoment(4).state_dict(), "has 3 terms"),
        ({**good, "counts": good["counts"] - 1}, "negative counts"),
        ({**good, "values": good["values"] / 0}, "not numbers"),
    ):
        with pytest.raises(InputRefused, match=message):
            SecondMoment(3).load_state_dict(bad)


MOMENT = ("--times", "second-moment", "--steps", "60", "--save-every", "29")
PLAIN = ("--validate-every", "0", "--samples", "1", "--quiet")


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of every file of tensors of the newest checkpoint."""
    _, newest = checkpoint.steps(run / "checkpoints")[-1]
    files = sorted(newest.glob("*.safetensors"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    code, _, err = silent(command(out, *MOMENT, *PLAIN))
    assert code == 0, err
    return out


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Trainer.update

    def update(trainer: Trainer) -> Any:
        if trainer.step == step:
            raise KeyboardInterrupt
        return right(trainer)

    monkeypatch.setattr(Trainer, "update", update)


def test_a_resumed_run_is_the_straight_one(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 updates, or killed in the 41st, continued from 29 and 31 more: every byte is the same."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        killed_at(40, patch)
        assert silent(command(out, *MOMENT, *PLAIN))[0] == 130
    assert [step for step, _ in checkpoint.steps(out / "checkpoints")] == [29]
    code, _, err = silent(command(out, *MOMENT, *PLAIN, "--resume"))
    assert code == 0, err
    assert digests(out) == digests(straight)
    assert "objective.safetensors" in digests(out)


def test_the_history_is_there_and_used(straight: Path) -> None:
    _, loaded, _ = checkpoint.newest_valid(straight / "checkpoints")
    state = loaded.tensors["objective"]
    assert state["values"].shape == (20, 10) and state["values"].dtype == torch.float64
    assert int(state["counts"].sum()) == 60 * 16 and int(state["counts"].min()) >= 10


def test_a_lost_history_does_not_continue_as_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(Vlb, "state_dict", lambda objective: {})
    with monkeypatch.context() as patch:
        killed_at(30, patch)
        silent(command(out, *MOMENT, *PLAIN))
    monkeypatch.undo()
    code, _, err = silent(command(out, *MOMENT, *PLAIN, "--resume"))
    assert code == 3 and "'values' is missing" in err


def test_a_run_without_state_has_no_group(finished_run: Path) -> None:
    _, loaded, _ = checkpoint.newest_valid(finished_run / "checkpoints")
    assert sorted(loaded.tensors) == ["model", "model-ema", "model-optimizer"]


@pytest.mark.parametrize("recipe", ["swissroll", "heartbeat"])
def test_every_family_can(recipe: str, tmp_path: Path) -> None:
    few = {"swissroll": ("--examples", "200", "--calls", "4"), "heartbeat": ("--calls", "4")}
    code, _, err = silent(
        [
            *("train", recipe, *few[recipe], "--times", "second-moment", "--steps", "8"),
            *("--latents", "6", "--batch", "16", "--width", "16", "--samples", "4", "--quiet"),
            *("--validate-every", "0", "--out", str(tmp_path / "run")),
        ]
    )
    assert code == 0, err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--times", "second-moment", "--focus", "1", "2"), "take one of them"),
        (("--times", "often"), "low-discrepancy"),
    ],
)
def test_what_makes_no_sense_is_refused(
    more: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    code, out, err = silent(command(tmp_path / "run", *more))
    assert code == 2 and message in out + err
