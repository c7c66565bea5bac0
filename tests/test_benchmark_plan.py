"""The arithmetic of the plan, against what nelbo really holds, writes and sends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import costs  # noqa: E402
import plan  # noqa: E402
from marked import between  # noqa: E402

from nelbo import distributed  # noqa: E402
from nelbo.checkpoint import load, save  # noqa: E402
from nelbo.recipes.build import build  # noqa: E402
from nelbo.recipes.families import kind_of  # noqa: E402
from nelbo.trainer import Trainer  # noqa: E402
from nelbo.walks import train  # noqa: E402


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    """After an update, so that the optimiser has its moments."""
    shape = {"channels": 16, "multipliers": (1,), "layers": 1, "attention": (), "batch": 4}
    options = kind_of("digits", "diffusion")(**shape, steps=9, latents=5, threads=1)
    made = train.trainer_of(build(options), "cpu")  # type: ignore[arg-type]
    made.update()
    return made


def test_a_checkpoint_is_as_large_as_it_says(trainer: Trainer, tmp_path: Path) -> None:
    parameters = list(trainer.players[0].module.parameters())
    count = sum(p.numel() for p in parameters)
    save(tmp_path / "c", trainer.state_dict(), {})
    tensors = load(tmp_path / "c").tensors
    written = sum(t.numel() * t.element_size() for g in tensors.values() for t in g.values())
    assert written == costs.checkpoint_bytes(count, len(parameters))
    on_disk = sum(f.stat().st_size for f in (tmp_path / "c").iterdir())
    headers = on_disk - written
    assert 0 < headers < 1000 * 4 * len(parameters)


def test_a_rank_holds_what_it_says(trainer: Trainer) -> None:
    parameters = list(trainer.players[0].module.parameters())
    average = list(trainer.averages["model"].module.parameters())
    moments = [
        t
        for entry in trainer.players[0].optimizer.state.values()
        for t in entry.values()
        if t.ndim
    ]
    gradients = [p.grad for p in parameters if p.grad is not None]
    held = [*parameters, *average, *moments, *gradients]
    count = sum(p.numel() for p in parameters)
    assert sum(t.numel() * t.element_size() for t in held) == costs.state_bytes(count)


@pytest.mark.parametrize("bucket", [1000, 10_000, 1 << 24])
def test_collectives_are_those_of_the_sum(
    trainer: Trainer, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `total_of` gives to the ring, of which each of n ranks sends 2(n-1)/n."""
    sent: list[int] = []

    def total(flat: torch.Tensor) -> torch.Tensor:
        sent.append(flat.numel() * flat.element_size())
        return flat

    for module in (distributed, costs):
        monkeypatch.setattr(module, "BUCKET", bucket)
    monkeypatch.setattr(distributed, "world_size", lambda: 64)
    monkeypatch.setattr(distributed, "total", total)
    gradients = [torch.zeros_like(p) for p in trainer.players[0].module.parameters()]
    distributed.total_of(gradients)
    sizes = [g.numel() for g in gradients]
    assert len(sent) == costs.buckets(sizes)
    assert 2 * 63 / 64 * sum(sent) == costs.summed_bytes(sum(sizes), 64)


def test_what_is_counted_on_a_network_without_numbers() -> None:
    """A 1x1 convolution of 3 channels on 4 x 4: 2 * 9 * 16 operations, its input is kept."""

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, device="meta")

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
            return self.conv(x).relu()

    found = costs.counted("tiny", Tiny(), 4, 2)
    assert (found.parameters, found.tensors, found.flops) == (12, 2, 2 * 9 * 16)
    assert found.kept == 2 * 4 * 3 * 16  # the input, and the output of which relu keeps the sign


def test_the_networks_of_the_plan() -> None:
    small, larger, large = plan.plans()
    assert small.parameters == larger.parameters == 35_746_307
    assert large.parameters == 463_481_603


def test_ranks_cost_and_larger_batches_hide_it() -> None:
    small, larger, _ = plan.plans()
    alone = costs.Cost(small, costs.Cluster(nodes=1, gpus=1), small)
    assert alone.sum_seconds == alone.agreement == 0
    assert alone.together == pytest.approx(costs.Cluster.rate)
    share = [c.update / c.whole for c in (costs.Cost(p, costs.Cluster(), small)
                                          for p in (small, larger))]  # fmt: skip
    assert share[0] < share[1] < 1


def test_evaluation_deals_whole_batches() -> None:
    """10,000 images are 20 batches: 64 ranks need as long as 20, and 3 ranks 7 of them."""
    small = plan.plans()[0]
    one = 512 * 1000 / costs.Cluster.forward
    for nodes, gpus, batches in ((8, 8, 1), (5, 4, 1), (1, 3, 7)):
        cost = costs.Cost(small, costs.Cluster(nodes=nodes, gpus=gpus), small)
        assert cost.evaluation(10_000, 1000) == pytest.approx(batches * one)
    alone = costs.Cost(small, costs.Cluster(nodes=1, gpus=1), small)
    assert alone.evaluation(10_000, 1000) == pytest.approx(1e7 / costs.Cluster.forward)


def test_the_page_holds_the_table_that_is_computed() -> None:
    text = plan.PAGE.read_text()
    assert between(text, "plan", plan.table(costs.Cluster(), plan.plans())) == text
    with pytest.raises(ValueError, match="needs the marks"):
        between("no marks", "plan", "")
