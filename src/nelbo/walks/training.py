"""What a family of models brings to a training run; the run itself is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from nelbo.data.base import Dataset
from nelbo.recipes.families import Run
from nelbo.trainer import Trainer
from nelbo.walks.session import Session
from nelbo.walks.watch import Watch


class Training(ABC):
    """A recipe of one family on its way to a run."""

    name: str
    options: Run
    dataset: Dataset

    @abstractmethod
    def model(self) -> dict[str, Any]:
        """What recipe.json says of the model."""

    @abstractmethod
    def trainer(self, device: str) -> Trainer:
        """Players on a device; batches and noise are functions of (seed, step)."""

    @abstractmethod
    def watch(self, trainer: Trainer) -> Watch:
        """What is said while it trains."""

    @abstractmethod
    def finish(self, session: Session, device: str) -> None:
        """Measure, sample, report, print."""
