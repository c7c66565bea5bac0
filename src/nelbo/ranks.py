"""The processes that torchrun started: how they meet, and how they part.

A rank that fails says why in the store that all share, and leaves; the collective that the others
wait in then fails, or gives up after the timeout, and they end with the same exit code.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous as meet

from nelbo.errors import RankLost, UsageError, exit_code

TIMEOUT = 600.0
GRACE = 3.0
"""Seconds in which a rank that failed can say so."""
_store: Store | None = None
_timeout = TIMEOUT


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def init(timeout: float = TIMEOUT, rendezvous: str = "env://", device: str = "auto") -> None:
    """Join the processes that torchrun started; do nothing when it started none.

    Collectives of CPU tensors go by gloo, of CUDA tensors by nccl.

    Arguments:
        timeout: seconds after which a collective gives up on a rank that does not come.
        rendezvous: where the processes meet, by default what torchrun says.
        device: what --device says; "cpu" leaves the CUDA devices alone.
    Raises:
        UsageError: more ranks than CUDA devices.
    """
    global _store, _timeout
    if not launched():
        return
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        _take_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    wait, _timeout = timedelta(seconds=timeout), timeout
    place, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, place, world = next(meet(rendezvous, place, world, timeout=wait))
    _store = PrefixStore("nelbo", store)
    dist.init_process_group(backend, store=store, rank=place, world_size=world, timeout=wait)


def _take_device(local: int) -> None:
    count = torch.cuda.device_count()
    if local >= count:
        raise UsageError(
            f"{local + 1} ranks or more on a machine with {count} CUDA devices: start torchrun "
            f"with --nproc-per-node {count}, or take --device cpu"
        )
    torch.cuda.set_device(local)


def shutdown() -> None:
    """Leave the group that `init` joined, if it joined one."""
    global _store
    _store = None
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(timeout: float = TIMEOUT, device: str = "auto") -> Iterator[None]:
    """Work together with the processes that torchrun started; what fails is told to all."""
    init(timeout, device=device)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, GeneratorExit):
            _tell(error)
        raise
    finally:
        shutdown()


def rank() -> int:
    """Number of this process, 0 to world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def backend() -> str | None:
    """By what the processes talk: gloo, or gloo and nccl; None for a single one."""
    return dist.get_backend_config() if dist.is_initialized() else None


def is_main() -> bool:
    """Whether this process prints and saves."""
    return rank() == 0


@contextmanager
def answered() -> Iterator[None]:
    """A collective; its failure becomes a sentence.

    Raises:
        RankLost: another rank failed, died, or is too slow.
    """
    start = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        waited = time.monotonic() - start
        told = _heard()
        if told is not None:
            text = f"rank {told['rank']} failed: {told['text']}"
            raise RankLost(text, told["code"], told=True) from error
        raise RankLost(
            f"a rank is gone, or did not answer within {_timeout:g} s (this one waited "
            f"{waited:.0f} s): see what its own log says, and continue with --resume; a rank "
            "that is only slow needs a longer --dist-timeout"
        ) from error


def _heard() -> dict[str, Any] | None:
    """What the first rank that failed has said, if it did."""
    global _store
    deadline = time.monotonic() + GRACE
    while _store is not None and time.monotonic() < deadline:
        try:
            if _store.check(["failed"]):
                said: dict[str, Any] = json.loads(_store.get("failed"))
                return said
        except RuntimeError:
            _store = None  # gone with the rank that kept it
        time.sleep(0.05)
    return None


def _tell(error: BaseException) -> None:
    """Say why this rank fails, if it is the first."""
    if _store is None or world_size() == 1 or getattr(error, "told", False):
        return
    with suppress(RuntimeError):
        if _store.add("failures", 1) == 1:
            text = str(error) or type(error).__name__
            said = {"rank": rank(), "code": exit_code(error), "text": text}
            _store.set("failed", json.dumps(said))
            _linger()
        elif (first := _heard()) is not None:
            if first["text"] == str(error):
                error.told = True  # type: ignore[attr-defined]  # the same sentence is said once
            if _store is not None:
                _store.add("heard", 1)


def _linger() -> None:
    """Let ranks that fail for the same reason hear it: what is said goes with the first rank."""
    deadline = time.monotonic() + GRACE
    while rank() == 0 and _store is not None and time.monotonic() < deadline:
        if _store.add("heard", 0) >= world_size() - 1:
            return
        time.sleep(0.02)
