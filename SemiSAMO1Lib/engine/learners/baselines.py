"""What the learners are measured against: learning from the label alone, and from pseudo-labels without more."""

from __future__ import annotations

from .averaged import AveragedLearner, Outputs, Term
from .base import Batch
from .generators import Generators


class SupervisedOnly(AveragedLearner):
    """L = L_sup: the pseudo-labelled patches are not even looked at."""

    reads_pseudo_labels = False

    def outputs(self, batch: Batch) -> Outputs:
        logits = self.student(batch.labelled.image).float()
        return Outputs(logits, logits[:0])

    def terms(self, batch: Batch, outputs: Outputs, progress: float, generators: Generators) -> dict[str, Term]:
        del progress, generators
        return {"supervised": Term(1.0, self.supervised(batch, outputs))}

    def seen_generators(self, generators: Generators) -> Generators:
        return generators.of_labelled

    def pseudo_samples(self, batch: Batch) -> int:
        del batch
        return 0


class PseudoOnly(AveragedLearner):
    """L = L_sup + w(t) · L_pseudo, without any consistency."""

    def terms(self, batch: Batch, outputs: Outputs, progress: float, generators: Generators) -> dict[str, Term]:
        del generators
        return self.learned(batch, outputs, progress)
