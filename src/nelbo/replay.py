"""A function of tensors that works in place, recorded once as a CUDA graph and then replayed.

A graph is a list of kernels with the addresses that they read and write. So inputs of fixed shapes
are copied to a place of their own before each call, and whatever the function has changed lies
where it did before. Draws from torch's own generator are not recorded but made anew, from the seed
and the offset that it has when the graph is replayed.

The first calls are made as they are: they choose algorithms and compile what is to be compiled,
which a graph cannot hold. Recording calls nothing; a call that records replays once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from nelbo.errors import InputRefused

WARM = 3
"""Calls before the one that records."""


class Recorder(Protocol):
    """What can call, and record for replay."""

    def call(self, work: Callable[[], None]) -> None:
        """Do the work as it is, where it would be recorded."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does the same again; the work itself is not done."""


class CudaGraph:
    """Records on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def call(self, work: Callable[[], None]) -> None:
        """Do the work on the stream, between what was asked before and what is asked after."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """A graph of the work.

        Raises:
            InputRefused: the work asks something that cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads go on meanwhile: the one that prepares batches must not spoil it
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            raise InputRefused(
                f"an update cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}): "
                "give --graphs network, or --graphs none"
            ) from error
        return graph.replay


class Replay:
    """Call it with tensors of the same shapes every time.

    Arguments:
        function: changes tensors in place, and keeps their addresses.
        recorder: a `CudaGraph`.
        warm: calls before the one that records.
    """

    def __init__(
        self, function: Callable[..., None], recorder: Recorder, warm: int = WARM
    ) -> None:
        self._function = function
        self._recorder = recorder
        self._left = warm
        self._inputs: tuple[Tensor, ...] = ()
        self._again: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor) -> None:
        """The function of these inputs.

        Raises:
            InputRefused: the function cannot be recorded.
        """
        if not self._inputs:
            self._inputs = tuple(x.clone() for x in inputs)
        for mine, given in zip(self._inputs, inputs, strict=True):
            assert mine.shape == given.shape, "a graph is of one shape"
            mine.copy_(given, non_blocking=True)
        if self._again is None and self._left > 0:
            self._left -= 1
            self._recorder.call(self._work)
            return
        if self._again is None:
            self._again = self._recorder.record(self._work)
        self._again()

    def _work(self) -> None:
        self._function(*self._inputs)
