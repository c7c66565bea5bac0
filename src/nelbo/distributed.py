"""Several processes, or one: the same code runs with and without torchrun.

Everything between processes is one of two collectives. `gather` brings uneven shares together in
the order of ranks, byte for byte; `agree_any` is true everywhere if it is true anywhere, which is
how all ranks stop at the same step when one of them was told to. Without torchrun the world has
size one and both are the identity.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def init(timeout: float = 600.0, rendezvous: str = "env://") -> None:
    """Join the processes that torchrun started; do nothing when it started none.

    Collectives of CPU tensors go by gloo, of CUDA tensors by nccl.

    Arguments:
        timeout: seconds after which a collective gives up on a rank that does not come.
        rendezvous: where the processes meet, by default what torchrun says.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        init_method=rendezvous,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout),
    )


def shutdown() -> None:
    """Leave the group that `init` joined, if it joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 to world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process prints and saves."""
    return rank() == 0


def gather(tensor: Tensor) -> list[Tensor]:
    """Bring the shares of all ranks to every rank.

    Arguments:
        tensor: (n_r, ...) with any n_r >= 0; other dimensions, dtype and device kind equal.
    Returns:
        the shares in the order of ranks.
    """
    assert tensor.dim() >= 1, "shares are stacked along their first dimension"
    if world_size() == 1:
        return [tensor]
    rows = torch.tensor([len(tensor)], device=tensor.device)
    all_rows = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(all_rows, rows)
    counts = [int(count) for count in all_rows]
    # As bytes: gloo does not take every dtype.
    payload = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    width = tensor.shape[1:].numel() * tensor.element_size()
    padded = payload.new_zeros(max(counts) * width)
    padded[: payload.numel()] = payload
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [
        part[: count * width].view(tensor.dtype).reshape(count, *tensor.shape[1:])
        for part, count in zip(parts, counts, strict=True)
    ]


def agree_any(flag: bool) -> bool:
    """Whether the flag is set on any rank; the same answer on every rank."""
    if world_size() == 1:
        return flag
    seen = torch.tensor([int(flag)])
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return bool(seen.item())


def barrier() -> None:
    """Wait until every rank has come here."""
    agree_any(False)
