"""A loss in two halves: what the host draws, and what a device computes from it.

The first half (`inputs`) draws numbers on the CPU and sends them to the device; the second
(`given`) asks nothing of the host, so that it can be queued, compiled or captured as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from nelbo.objectives import Objective
from nelbo.reverse import Reverse


class Augmented:
    """An objective on examples of which a share is changed; the changed ones carry a mark.

    Arguments:
        objective: any objective of this module.
        augment: x_0 -> (x_0, marks (B,)); see `nelbo.data.augmentation`.
    """

    def __init__(
        self, objective: Objective, augment: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        self.objective = objective
        self.augment = augment
        self.times = objective.times
        self.unit = objective.unit

    def __call__(self, model: Reverse, x_0: Tensor, cond: Any = None) -> Tensor:
        """(B,) losses; the marks are the condition."""
        assert cond is None, "the condition is the mark"
        return self.given(model, *self.inputs(x_0))

    def inputs(self, x_0: Tensor) -> tuple[Tensor, ...]:
        """What `given` takes after the model: changed examples, places, marks."""
        x_0, marks = self.augment(x_0)
        return *self.objective.inputs(x_0), marks

    def given(self, model: Reverse, *inputs: Tensor) -> Tensor:
        """(B,) losses; see `Objective.given`."""
        return self.objective.given(model, *inputs)

    @property
    def fixed(self) -> bool:
        """Whether `given` asks nothing of the host."""
        return self.objective.fixed

    def state_dict(self) -> dict[str, Tensor]:
        """That of the objective."""
        return self.objective.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.objective.load_state_dict(state)


class ModelLoss:
    """The loss of a model, as a player minimises it: draws first, then what the device computes.

    Arguments:
        objective: `Objective` or `Augmented`.
    """

    def __init__(self, objective: Objective | Augmented, model: Reverse) -> None:
        self.objective = objective
        self.model = model

    def __call__(self, x_0: Tensor) -> Tensor:
        """(B,) losses of a batch."""
        return self.given(*self.inputs(x_0))

    def inputs(self, x_0: Tensor) -> tuple[Tensor, ...]:
        """What `given` takes, on the device of x_0; draws from the global generators."""
        return self.objective.inputs(x_0)

    def given(self, *inputs: Tensor) -> Tensor:
        """(B,) losses of given inputs; noise is drawn on their device."""
        return self.objective.given(self.model, *inputs)

    @property
    def fixed(self) -> bool:
        """Whether `given` can be captured: no step of it depends on numbers that were computed.

        A schedule that learns is left out: what it learns from is read by the host.
        """
        learns = any(p.requires_grad for p in self.model.process.parameters())
        return self.objective.fixed and not learns
