"""Several processes, or one: the same code runs with and without torchrun.

Everything between processes is one of a few collectives. `gather` brings uneven shares together in
the order of ranks, byte for byte; `total` adds; `agree` takes the largest number anywhere, which
is how all ranks stop at the same step when one of them was told to; `on_main` does a thing once,
and gives what came of it, or its error, to all. Without torchrun the world has size one and all of
them are the identity.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nelbo.errors import InputRefused, NumericalFailure, ResourceExhausted, UsageError
from nelbo.ranks import (
    answered,
    backend,
    init,
    is_main,
    joined,
    rank,
    shutdown,
    world_size,
)

__all__ = ["backend", "init", "is_main", "joined", "rank", "shutdown", "world_size"]

T = TypeVar("T")
BUCKET = 1 << 24
"""Elements that are added up in one collective, about."""
_KINDS = (UsageError, InputRefused, NumericalFailure, ResourceExhausted)


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
    with answered():
        dist.all_gather(all_rows, rows)
    counts = [int(count) for count in all_rows]
    # As bytes: gloo does not take every dtype.
    payload = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    width = tensor.shape[1:].numel() * tensor.element_size()
    padded = payload.new_zeros(max(counts) * width)
    padded[: payload.numel()] = payload
    parts = [torch.empty_like(padded) for _ in counts]
    with answered():
        dist.all_gather(parts, padded)
    return [
        part[: count * width].view(tensor.dtype).reshape(count, *tensor.shape[1:])
        for part, count in zip(parts, counts, strict=True)
    ]


def agree(number: int) -> int:
    """The largest number on any rank; the same answer on every rank."""
    if world_size() == 1:
        return number
    seen = torch.tensor([number])
    with answered():
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return int(seen)


def agree_any(flag: bool) -> bool:
    """Whether the flag is set on any rank; the same answer on every rank."""
    return bool(agree(int(flag)))


def barrier() -> None:
    """Wait until every rank has come here."""
    agree(0)


def total(values: Tensor) -> Tensor:
    """The sum over all ranks, on every rank, in place; shapes are equal everywhere."""
    if world_size() > 1:
        with answered():
            dist.all_reduce(values)
    return values


def total_of(tensors: Iterable[Tensor]) -> None:
    """Add up tensors over all ranks, in place, a few large collectives for many of them."""
    if world_size() == 1:
        return
    for bucket in _buckets(tensors):
        flat = total(torch.cat([tensor.reshape(-1) for tensor in bucket]))
        parts = flat.split([tensor.numel() for tensor in bucket])
        pairs = zip(parts, bucket, strict=True)
        torch._foreach_copy_(bucket, [part.view(tensor.shape) for part, tensor in pairs])


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one kind and device, up to a size; the order is the same on every rank."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        full = sum(t.numel() for t in bucket) + tensor.numel() > BUCKET
        if bucket and (full or kind != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def same(tensors: Iterable[Tensor]) -> None:
    """Give all ranks the tensors of rank 0, in place."""
    if world_size() == 1:
        return
    for tensor in tensors:
        dense = tensor.detach().contiguous()
        with answered():
            dist.broadcast(dense, 0)
        tensor.detach().copy_(dense)


def on_main(work: Callable[[], T]) -> T:
    """Do a thing on rank 0 alone, and give all ranks what it returned or raised.

    Arguments:
        work: returns a JSON value.
    """
    if world_size() == 1:
        return work()
    found: dict[str, Any] = {}
    failed: BaseException | None = None
    if is_main():
        try:
            found = {"value": work()}
        except _KINDS as error:
            failed, found = error, {"kind": type(error).__name__, "text": str(error)}
    # what is no user's affair leaves rank 0 as it is, and the others lose it
    said = torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)
    heard = json.loads(bytes(gather(said if is_main() else said[:0])[0].tolist()))
    if failed is not None:
        raise failed
    if "kind" in heard:
        theirs = {kind.__name__: kind for kind in _KINDS}[heard["kind"]](heard["text"])
        theirs.told = True  # rank 0 says it
        raise theirs
    value: T = heard["value"]
    return value


def spans(whole: int, parts: int = 1) -> list[range]:
    """The rows of this rank in a batch: of each part, one after the other, a contiguous share.

    Arguments:
        whole: rows of the batch, on all ranks together. parts: into which it is cut first.
    Raises:
        UsageError: a share is empty.
    """
    size, world, mine = -(-whole // parts), world_size(), rank()
    found = []
    for low in range(0, whole, size):
        rows = min(size, whole - low)
        if rows < world:
            cut = f" in {parts} parts" if parts > 1 else ""
            raise UsageError(
                f"a batch of {whole}{cut} leaves some of {world} ranks without an example: take "
                "a larger --batch, or fewer ranks"
            )
        found.append(range(low + rows * mine // world, low + rows * (mine + 1) // world))
    return found


def rows_of(whole: int, parts: int = 1) -> Tensor:
    """The places (n_r,) of `spans`, one after the other."""
    return torch.cat([torch.arange(span.start, span.stop) for span in spans(whole, parts)])


def in_order(mine: Tensor, lengths: list[int]) -> Tensor:
    """Rows of items that were dealt to the ranks in turn, on every rank in the order of the items.

    Arguments:
        mine: (n_r, ...) rows of this rank's items, those with number % world_size() == rank().
        lengths: rows of each item.
    """
    world = world_size()
    if world == 1:
        return mine
    shares = [s.split(lengths[r::world]) for r, s in enumerate(gather(mine))]
    return torch.cat([shares[k % world][k // world] for k in range(len(lengths))])
