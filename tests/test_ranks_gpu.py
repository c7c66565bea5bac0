"""Ranks on GPUs: the same run as one process, by nccl where there are two, else two on one GPU.

Two ranks on one device talk by gloo (nccl refuses a device that two share), so the sums are the
same code on CUDA tensors; `--device cpu` is what a user of such a machine is told to take, and
these tests put both on the first GPU by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rankserver import Ranks, logs

from nelbo import distributed
from nelbo import ranks as meeting
from nelbo.recipes.build import build
from nelbo.recipes.families import kind_of
from nelbo.trainer import Trainer
from nelbo.walks import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CLOSE = 1e-5
"""Relative: on a GPU sums of float32 are taken in other orders for other batches."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    made = Ranks(cuda=True)
    yield made
    made.close()


def joined(rank: int) -> None:
    """Meet: nccl if every rank has a device of its own."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if torch.cuda.device_count() > 1:
        distributed.init(60.0)
        return
    available = torch.cuda.is_available
    meeting.torch.cuda.is_available = lambda: False
    distributed.init(60.0)
    meeting.torch.cuda.is_available = available
    assert distributed.rank() == rank


def diffusion(**more: Any) -> Trainer:
    """An uneven batch, dropout, low-discrepancy times, clipping."""
    shape = {"channels": 16, "multipliers": (1,), "layers": 1, "attention": (), "kernels": "plain"}
    run = {"steps": 6, "batch": 7, "latents": 20, "warmup": 2, "clip": 0.5}
    options = kind_of("digits", "diffusion")(**{**shape, **run, **more})
    return train.trainer_of(build(options), "cuda")  # type: ignore[arg-type]


def trained(rank: int, folder: str) -> int:
    """Losses and norms, plain, and in shards where nccl is."""
    joined(rank)
    found = {}
    for name, more in {"plain": {}, "bf16": {"bf16": True}, "shard": {"shard": True}}.items():
        if name == "shard" and "nccl" not in str(distributed.backend()):
            continue
        records = list(diffusion(**more))
        found[name] = [r.losses["model"] for r in records]
        found[f"{name}, norms"] = [r.grad_norms["model"] for r in records]
    distributed.shutdown()
    Path(folder, f"trained{rank}.json").write_text(json.dumps(found))
    return 0


def off(one: list[float], other: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def test_two_ranks_make_the_run_of_one(ranks: Ranks, tmp_path: Path) -> None:
    """Float32 to the order of sums, bfloat16 to its rounding; every rank sees the same numbers."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert ranks.run(trained, 2, tmp_path) == [0, 0], logs(tmp_path)
    first, second = (json.loads((tmp_path / f"trained{r}.json").read_text()) for r in (0, 1))
    assert first == second
    alone = list(diffusion())
    assert off([r.losses["model"] for r in alone], first["plain"]) < CLOSE
    assert off([r.grad_norms["model"] for r in alone], first["plain, norms"]) < 10 * CLOSE
    half = [r.losses["model"] for r in diffusion(bf16=True)]
    assert off(half, first["bf16"]) < 2e-2
    if "shard" in first:
        assert off(first["plain"], first["shard"]) < CLOSE


def summed(rank: int, folder: str) -> int:
    """Sums and gathers of CUDA tensors, in buckets, uneven shares, several dtypes."""
    joined(rank)
    distributed.BUCKET = 1000
    tensors = [torch.full((n,), float(rank + 1), device="cuda") for n in (3, 999, 2000, 1)]
    distributed.total_of(tensors)
    sums = [sorted(set(t.tolist())) for t in tensors]
    shares = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        mine = torch.full((rank + 1, 2), rank + 1, dtype=dtype, device="cuda")
        shares[str(dtype)] = torch.cat(distributed.gather(mine)).tolist()
    # work still under way on the device is waited for
    slow = torch.ones(2000, 2000, device="cuda")
    for _ in range(20):
        slow = slow @ slow / 2000
    total = float(distributed.total(slow.sum().reshape(1)))
    distributed.shutdown()
    Path(folder, f"summed{rank}.json").write_text(json.dumps([sums, shares, total]))
    return 0


def test_collectives_of_cuda_tensors(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(summed, 2, tmp_path) == [0, 0], logs(tmp_path)
    for rank in range(2):
        sums, shares, total = json.loads((tmp_path / f"summed{rank}.json").read_text())
        assert sums == [[3.0]] * 4
        assert all(found == [[1, 1], [2, 2], [2, 2]] for found in shares.values())
        assert total == pytest.approx(2 * 4e6, rel=1e-3)


def drew(rank: int, folder: str) -> int:
    """After an update, on which devices this process holds memory."""
    joined(rank)
    diffusion().update()
    own = torch.cuda.current_device()
    held = [i for i in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(i) > 0]
    Path(folder, f"drew{rank}.json").write_text(json.dumps([own, held]))
    distributed.shutdown()
    return 0


def test_a_rank_touches_its_own_device_only(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(drew, 2, tmp_path) == [0, 0], logs(tmp_path)
    for rank in range(2):
        own, held = json.loads((tmp_path / f"drew{rank}.json").read_text())
        assert held == [own] and own == (rank if torch.cuda.device_count() > 1 else 0)
