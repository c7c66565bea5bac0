"""One process and several give the same answers: gloo on the CPU, meeting through a file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing as mp

from nelbo import distributed

_WORLD = 2
_JOIN_SECONDS = 60.0
_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    distributed.init()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    share = torch.arange(3)
    assert [torch.equal(part, share) for part in distributed.gather(share)] == [True]
    assert distributed.agree_any(True) is True and distributed.agree_any(False) is False
    distributed.barrier()
    distributed.shutdown()


def _share(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(rows * 6).reshape(rows, 2, 3) + 5 * rank
    return values.to(dtype)


def _gathered(rank: int) -> list[bool]:
    """Uneven, equal, empty, and with a transposed or one-dimensional share."""
    verdicts = []
    for dtype in _DTYPES:
        for rows in ([3, 1], [2, 2], [0, 4], [0, 0]):
            parts = distributed.gather(_share(rank, rows[rank], dtype))
            wanted = [_share(r, rows[r], dtype) for r in range(_WORLD)]
            verdicts.append(
                all(
                    p.dtype == w.dtype and torch.equal(p, w)
                    for p, w in zip(parts, wanted, strict=True)
                )
            )
    across = distributed.gather((torch.arange(6.0).reshape(2, 3) + rank).T)
    wanted = [(torch.arange(6.0).reshape(2, 3) + r).T for r in range(_WORLD)]
    verdicts.append(all(torch.equal(p, w) for p, w in zip(across, wanted, strict=True)))
    flat = distributed.gather(torch.full((rank + 1,), float(rank)))
    return [*verdicts, torch.equal(torch.cat(flat), torch.tensor([0.0, 1.0, 1.0]))]


def _join(rank: int, folder: str, timeout: float) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(_WORLD), "LOCAL_RANK": str(rank)}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo alone: nccl would want a device per rank
    torch.set_num_threads(1)
    distributed.init(timeout, rendezvous=f"file://{folder}/rendezvous")


def _together(rank: int, folder: str) -> None:
    _join(rank, folder, 30.0)
    found: dict[str, Any] = {
        "place": [distributed.rank(), distributed.world_size(), distributed.is_main()],
        "gathered": _gathered(rank),
        "flags": [distributed.agree_any(flag) for flag in (False, True, rank == 0, rank == 1)],
    }
    if rank == 0:
        time.sleep(0.5)
        (Path(folder) / "late").touch()
    distributed.barrier()
    found["waited"] = (Path(folder) / "late").exists()
    distributed.shutdown()
    found["after"] = distributed.world_size()
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))


def _one_dies(rank: int, folder: str) -> None:
    _join(rank, folder, 5.0)
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    try:
        distributed.agree_any(False)
    except RuntimeError:
        (Path(folder) / "noticed").write_text(str(time.monotonic() - start))


def _spawn(body: Any, folder: Path) -> None:
    context = mp.get_context("spawn")
    children = [context.Process(target=body, args=(r, str(folder))) for r in range(_WORLD)]
    for child in children:
        child.start()
    deadline = time.monotonic() + _JOIN_SECONDS
    try:
        for child in children:
            child.join(max(0.0, deadline - time.monotonic()))
        assert [child.exitcode for child in children] == [0] * _WORLD
    finally:
        for child in children:
            child.kill()


def test_two_processes(tmp_path: Path) -> None:
    _spawn(_together, tmp_path)
    for rank in range(_WORLD):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["place"] == [rank, _WORLD, rank == 0]
        assert found["gathered"] == [True] * (4 * len(_DTYPES) + 2)
        assert found["flags"] == [False, True, True, True], "the same answer on every rank"
        assert found["waited"] and found["after"] == 1


def test_a_rank_that_dies_is_noticed(tmp_path: Path) -> None:
    _spawn(_one_dies, tmp_path)
    assert float((tmp_path / "noticed").read_text()) < 15.0
