r"""Networks of which every rank holds a part: weights, gradients and moments, 1/W of each.

`shard` cuts every parameter of a network along its first dimension among W ranks (FSDP2). A block
is brought together when it computes and given back afterwards, and its gradient is summed where
its part lives. `whole` and `part_of` are the two directions between a part and the tensor that a
checkpoint holds: checkpoints hold whole tensors, so that they load at any number of ranks.

References:
    Zhao et al. 2023, PyTorch FSDP: experiences on scaling fully sharded data parallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nelbo.errors import UsageError
from nelbo.ranks import world_size

BLOCK = 100_000
"""Parameters from which on a block of a network is brought together by itself."""


def shard(network: nn.Module, device: str) -> None:
    """Deal the parameters of a network to all ranks, in place.

    Raises:
        UsageError: there is one process alone.
    """
    if world_size() == 1:
        raise UsageError("--shard deals a network to several ranks: start it with torchrun")
    # imported where it is needed: it takes half a second, and few runs are dealt out
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    blocks: list[nn.Module] = []
    _collect(network, blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def _collect(module: nn.Module, found: list[nn.Module]) -> None:
    """The smallest blocks with many parameters, that are called as modules."""
    for child in module.children():
        if sum(p.numel() for p in child.parameters()) < BLOCK:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            _collect(child, found)
        else:
            found.append(child)


def is_part(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor that a part is of; all ranks come here. What is no part stays as it is."""
    found: Tensor = tensor.full_tensor() if is_part(tensor) else tensor  # type: ignore[attr-defined]
    return found


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks hold, dealt as `like` is."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    there: Any = like
    mesh, how = there.device_mesh, there.placements
    return distribute_tensor(tensor.to(like.device), mesh, how, src_data_rank=None)


def load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module, dealt or not; names and shapes must match exactly."""
    own = module.state_dict()
    known = {n: part_of(t, own[n]) if n in own else t for n, t in state.items()}
    module.load_state_dict(known)


def copy_into(target: nn.Module, source: nn.Module) -> None:
    """Give a whole module the tensors of one that is dealt; all ranks come here."""
    target.load_state_dict({name: whole(t) for name, t in source.state_dict().items()})


def plain(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those that are no parts."""
    return [tensor for tensor in tensors if not is_part(tensor)]
