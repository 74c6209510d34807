"""What every learner is: the training loop knows no learner by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from lightning_fabric import Fabric
from torch import nn

from ..config import TrainingConfig
from ..data.patches import Patches
from ..observer import Observer
from ..planning import Plan


@dataclass
class Batch:
    """What one step of one process sees: patches with a person's label, and patches with a pseudo-label.

    Attributes:
        places: of the samples in the global batch, labelled ones first; None: this is the global batch.
        labelled_share, pseudo_share: what a mean over the samples here counts, so that the average over the processes
            is the mean over the global batch.
    """

    labelled: Patches
    pseudo: Patches
    places: Sequence[int] | None = None
    labelled_share: float = 1.0
    pseudo_share: float = 1.0

    def to(self, device: torch.device) -> Batch:
        return replace(self, labelled=self.labelled.to(device), pseudo=self.pseudo.to(device))


class Learner(ABC):
    """One way of learning from few labels and many pseudo-labels."""

    #: It learns from the pseudo-labels too.
    reads_pseudo_labels: ClassVar[bool] = True

    #: It needs signed distance maps of the labelled cases, and its student gives one too.
    with_distance: ClassVar[bool] = False

    #: A generalist tells it about unlabelled scans too.
    asks_generalists: ClassVar[bool] = False

    def __init__(self, plan: Plan, config: TrainingConfig) -> None:
        self.plan = plan
        self.config = config

    @classmethod
    def require_files(cls, config: TrainingConfig) -> None:
        """Before a job is made: raise ValueError when a file that this learner needs is not there. Loads nothing."""
        del config

    @classmethod
    def load_or_refuse(cls, config: TrainingConfig, device: torch.device, observer: Observer) -> None:
        """At the start of a run, before any work: load what this learner asks on the device, or raise ValueError."""
        del config, device, observer

    @abstractmethod
    def setup(self, fabric: Fabric) -> None:
        """Build networks and optimizers on the fabric's device."""

    @abstractmethod
    def step(self, batch: Batch, progress: float, generator: torch.Generator) -> dict[str, float]:
        """One update. `progress` is t / t_max in [0, 1); the generator is for noise. Returns the losses by name."""

    @abstractmethod
    def inference_model(self) -> nn.Module:
        """The network to predict with: (B, 1, z, y, x) -> (B, C, z, y, x) logits."""

    @abstractmethod
    def shift_logits(self, shift: Sequence[float]) -> None:
        """What the network to predict with adds to its logits from now on, a number for each class."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Networks and optimizers, as tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The configured optimizer; SGD with the published momentum and decay, or AdamW, which short rounds need."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
