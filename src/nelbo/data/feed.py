"""Batches on the device, prepared ahead of the training step that wants them.

The order is known in advance, so a thread can prepare the next batches while the network works:
read the rows, put them on the model's scale, move them. What it gives for move k is what would
have been made for move k without it, bit for bit. Training data that take little of a device's
memory are kept there.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from nelbo.data.base import Dataset
from nelbo.data.part import Part, some
from nelbo.transfer import sent

SHARE = 0.25
"""Of the free memory of a device that training data may take."""
PATIENCE = 0.1
"""Seconds after which a thread looks whether it should end."""
Made = tuple[Tensor, "torch.cuda.Event | None"]


class Feed:
    """Batches by the number of the move; a callable, and a context that ends its thread.

    Arguments:
        dataset: its training part is read.
        order: move -> (B,) numbers of training examples.
        device: where the batches are wanted.
        ahead: batches that are prepared before they are asked for; 0: none, and no thread.
        moves: number of moves; none is prepared beyond.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Callable[[int], Tensor],
        device: str,
        ahead: int = 2,
        moves: int | None = None,
    ) -> None:
        self._make = _maker(dataset, order, torch.device(device))
        self._ahead = ahead
        self._moves = moves
        self._next: int | None = None
        self._ready: queue.Queue[Made | BaseException] = queue.Queue(max(1, ahead))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._stop.set)

    def __call__(self, move: int) -> Tensor:
        """The batch of a move, (B, *shape) on the model's scale.

        Raises:
            InputRefused: the data cannot be read; whatever its thread met is raised here.
        """
        if self._ahead == 0 or (self._moves is not None and move >= self._moves):
            return _arrived(self._make(move))
        if move != self._next or self._thread is None:
            self.close()
            self._start(move)
        self._next = move + 1
        found = self._ready.get()
        if isinstance(found, BaseException):
            self.close()
            raise found
        return _arrived(found)

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *why: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; a later call starts another one."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = self._next = None

    def _start(self, move: int) -> None:
        self._stop = threading.Event()
        weakref.finalize(self, self._stop.set)
        self._ready = queue.Queue(self._ahead)
        stop, last = self._stop, self._moves
        self._thread = threading.Thread(
            target=_prepare,
            args=(self._make, self._ready, stop, move, last),
            name="nelbo-feed",
            daemon=True,
        )
        self._thread.start()


def _prepare(
    make: Callable[[int], Made],
    ready: queue.Queue[Made | BaseException],
    stop: threading.Event,
    move: int,
    last: int | None,
) -> None:
    """The thread: batches one after the other until it is stopped, or one cannot be made."""
    while not stop.is_set() and (last is None or move < last):
        made: Made | BaseException
        try:
            made = make(move)
        except BaseException as error:  # raised again by whoever asks for this batch
            made = error
        _put(ready, made, stop)
        if isinstance(made, BaseException):
            return
        move += 1


def _put(
    ready: queue.Queue[Made | BaseException], made: Made | BaseException, stop: threading.Event
) -> None:
    while not stop.is_set():
        try:
            return ready.put(made, timeout=PATIENCE)
        except queue.Full:
            continue


def _arrived(made: Made) -> Tensor:
    """The batch, which the current stream waits for."""
    x_0, event = made
    if event is not None:
        stream = torch.cuda.current_stream(x_0.device)
        stream.wait_event(event)
        x_0.record_stream(stream)
    return x_0


def _maker(
    dataset: Dataset, order: Callable[[int], Tensor], device: torch.device
) -> Callable[[int], Made]:
    """How a batch is made on this device."""
    if device.type != "cuda":
        return lambda move: (dataset.encode(some(dataset.train, order(move))).to(device), None)
    resident = on_device(dataset.train, device)
    stream = torch.cuda.Stream(device)

    def make(move: int) -> Made:
        rows = order(move)
        with torch.cuda.stream(stream):
            if resident is not None:
                y = resident[sent(rows, device)]
            else:
                # levels are moved, a quarter of the bytes of what the network sees
                y = sent(some(dataset.train, rows), device)
            x_0 = dataset.encode(y)
            event = torch.cuda.Event()
            event.record(stream)
        return x_0, event

    return make


def on_device(train: Part, device: torch.device) -> Tensor | None:
    """The training part on a device, if it is in memory and takes little of what is free there."""
    if not isinstance(train, Tensor):
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return train.to(device) if train.nbytes <= SHARE * free else None
