"""What the learners are measured against: learning from the label alone, and from pseudo-labels without more."""

from __future__ import annotations

import torch

from .averaged import AveragedLearner, Outputs, Term
from .base import Batch
from .losses import supervised_loss


class SupervisedOnly(AveragedLearner):
    """L = L_sup: the pseudo-labelled patches are not even looked at."""

    def outputs(self, batch: Batch) -> Outputs:
        logits = self.student(batch.labelled.image).float()
        return Outputs(logits, logits[:0])

    def terms(self, batch: Batch, outputs: Outputs, progress: float, generator: torch.Generator) -> dict[str, Term]:
        del progress, generator
        labelled = batch.labelled
        return {"supervised": Term(1.0, supervised_loss(outputs.labelled, labelled.target, labelled.weight))}


class PseudoOnly(AveragedLearner):
    """L = L_sup + w(t) · L_pseudo, without any consistency."""

    def terms(self, batch: Batch, outputs: Outputs, progress: float, generator: torch.Generator) -> dict[str, Term]:
        del generator
        return self.learned(batch, outputs, progress)
