"""What is seen of a training while it goes on: a note, lines of figures, and a validation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from nelbo.design import enough
from nelbo.estimate import NATS
from nelbo.fewcalls import Plan
from nelbo.recipes.recipe import Recipe
from nelbo.trainer import Record, Trainer
from nelbo.walks.measuring import Request, measure, plan_of
from nelbo.walks.stored import PLAYER


class Validation(NamedTuple):
    """One look at the validation part."""

    kept: dict[str, Any]
    """Goes into the checkpoint; its "mean" is the lower the better."""
    row: dict[str, Any]
    """Goes into metrics.jsonl."""
    text: str
    """For people."""


class Watch(ABC):
    """What a session says of the run that it trains."""

    @abstractmethod
    def note(self, record: Record) -> str:
        """Take notice of an update; what to show beside the progress."""

    @abstractmethod
    def row(self) -> Mapping[str, Any]:
        """Figures of the updates since the last call, for metrics.jsonl."""

    @abstractmethod
    def validate(self) -> Validation | None:
        """A look at the validation part; None if it is too small."""


class BoundWatch(Watch):
    """Diffusion: the loss, and the bound of the averaged model.

    Arguments:
        recipe, trainer: of the run.
    """

    def __init__(self, recipe: Recipe, trainer: Trainer) -> None:
        self.recipe = recipe
        self.trainer = trainer
        self.losses: list[Record] = []
        self.shown = math.nan
        self.plan: Plan | None = None  # the devices of the validation, once they were made

    def note(self, record: Record) -> str:
        self.losses.append(record)
        # what a device has not computed yet is shown with a later update
        known = [r for r in self.losses if r.losses.known]
        if known:
            decay = 0.0 if math.isnan(self.shown) else 0.98
            value = self._loss(known)
            self.shown = value if not decay else decay * self.shown + (1 - decay) * value
        return f"loss {self._shown()}"

    def row(self) -> Mapping[str, Any]:
        norm = self.losses[-1].grad_norms[PLAYER] / self.recipe.dataset.dims
        loss = self._loss(self.losses)
        self.losses.clear()
        return {"loss": loss, "grad_norm": norm}

    def validate(self) -> Validation | None:
        """The bound of the averaged model on the validation part; the same draws every time."""
        if len(self.recipe.dataset.validation) < 2:
            return None
        calls = enough(len(self.recipe.dataset.validation), self.recipe.options.validate_calls)
        request = Request("validation", calls, seed=0, quiet=True)
        # controls must know the schedule of the very model that is measured: it may be learned
        model: Any = self.trainer.averages[PLAYER].whole()
        subject = replace(self.recipe, model=model)
        if self.plan is None:  # the same data every time: what is fitted to them is kept
            self.plan = plan_of(subject, request)
        (result,) = measure(subject, [model], request, plan=self.plan)
        estimate = result.estimates()["total"].bits_per_dim(self.recipe.dataset.dims)
        kept = estimate.as_json()
        text = f"validation bound {estimate}, loss {self._shown()}"
        return Validation(kept, {"validation": kept}, text)

    def _loss(self, records: list[Record]) -> float:
        """Mean loss of updates: bits/dim of the bound, else as the objective has it."""
        mean = math.fsum(r.losses[PLAYER] for r in records) / len(records)
        if self.recipe.objective.unit != NATS:
            return mean
        return (mean + self.recipe.dataset.offset()) / (self.recipe.dataset.dims * math.log(2))

    def _shown(self) -> str:
        unit = " bits/dim" if self.recipe.objective.unit == NATS else ""
        return f"{self.shown:.3f}{unit}"
