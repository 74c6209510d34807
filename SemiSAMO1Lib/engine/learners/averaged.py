"""What the learners share: one network, its running average, and a step that is a weighted sum of terms."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from ..specialists import make_specialist
from ..specialists.dropout import dropped_by
from ..specialists.heads import LogitsOnly, ShiftedLogits
from .base import Batch, Learner, make_optimizer
from .generators import Generators, generators_of
from .losses import supervised_loss
from .schedules import ema_decay, poly, pseudo_ramp

#: Gradients longer than this are shortened.
LONGEST_GRADIENT = 12.0


@dataclass(frozen=True)
class Outputs:
    """What the student says: logits (B, C, z, y, x) float32, and its distance maps, if it has any."""

    labelled: Tensor
    pseudo: Tensor
    labelled_distance: Tensor | None = None
    pseudo_distance: Tensor | None = None


@dataclass(frozen=True)
class Term:
    """One part of the loss: its factor at this moment, and its value."""

    factor: float
    value: Tensor


class AveragedLearner(Learner):
    """A student that learns and its running average, which predicts; some learners use the average as a teacher."""

    def setup(self, fabric: Fabric) -> None:
        self.fabric = fabric
        network = make_specialist(self.config.specialist, self.plan, self.with_distance)
        optimizer = make_optimizer(network, self.config)
        self.teacher = fabric.to_device(copy.deepcopy(network)).requires_grad_(False)
        self.student, self.optimizer = fabric.setup(network, optimizer)
        self.steps = 0
        self.shift = torch.zeros(self.plan.classes, device=fabric.device)

    @abstractmethod
    def terms(self, batch: Batch, outputs: Outputs, progress: float, generators: Generators) -> dict[str, Term]:
        """The parts of the loss by name, each so that its average over the processes is that of the global batch.

        `progress` is t / t_max, the generators are the source of all noise.
        """

    def step(self, batch: Batch, progress: float, generator: torch.Generator) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * poly(progress)
        generators = self.generators(batch, generator)
        with dropped_by(self.seen_generators(generators).dropout):
            outputs = self.outputs(batch)
        terms = self.terms(batch, outputs, progress, generators)
        total = torch.stack([term.factor * term.value for term in terms.values()]).sum()
        self.optimizer.zero_grad()
        self.fabric.backward(total)
        self.fabric.clip_gradients(self.student, self.optimizer, max_norm=LONGEST_GRADIENT, error_if_nonfinite=False)
        self.optimizer.step()
        update_average(self.teacher, self.student, ema_decay(self.steps, self._largest_decay()))
        self.steps += 1
        further = self.after_step(batch, outputs, generators)
        found = {"total": total.detach(), **{name: term.value.detach() for name, term in terms.items()}, **further}
        return dict(zip(found, self.mean_of_all(torch.stack(list(found.values()))).tolist(), strict=True))

    def generators(self, batch: Batch, generator: torch.Generator) -> Generators:
        """The sources of noise of a batch's samples."""
        labelled = len(batch.labelled.image)
        places = batch.places if batch.places is not None else range(labelled + self.pseudo_samples(batch))
        return generators_of(generator, places, labelled, self.fabric.device)

    def pseudo_samples(self, batch: Batch) -> int:
        return len(batch.pseudo.image)

    def seen_generators(self, generators: Generators) -> Generators:
        """Those of the samples that `outputs` shows to the student."""
        return generators

    def of_all(self, batch: Batch, labelled: Tensor, pseudo: Tensor) -> Tensor:
        """The mean over all samples, from those over the labelled and over the pseudo-labelled ones here."""
        here = (len(batch.labelled.image), len(batch.pseudo.image))
        of_labelled, of_pseudo = here if batch.places is None else (self.plan.labelled, self.plan.batch)
        weighted = of_labelled * batch.labelled_share * labelled + of_pseudo * batch.pseudo_share * pseudo
        return weighted / (of_labelled + of_pseudo)

    def share_of_total(self, count: Tensor) -> Tensor:
        """A number summed over all processes, divided by how many they are: sums that are divided by it have, averaged
        over the processes, the quotient of the global sums."""
        return self.mean_of_all(count.detach().float())

    def mean_of_all(self, value: Tensor) -> Tensor:
        """Mean over the processes. Gathered: Fabric's reduction lets all wait for each other before it begins."""
        if self.fabric.world_size == 1:
            return value
        found = self.fabric.all_gather(value)
        assert isinstance(found, Tensor)
        return found.mean(0)

    def outputs(self, batch: Batch) -> Outputs:
        """The student's answer to the whole batch, in one pass."""
        count = len(batch.labelled.image)
        found = self.student(torch.cat([batch.labelled.image, batch.pseudo.image]))
        if not self.with_distance:
            logits = found.float()
            return Outputs(logits[:count], logits[count:])
        distances, logits = (one.float() for one in found)
        return Outputs(logits[:count], logits[count:], distances[:count], distances[count:])

    def after_step(self, batch: Batch, outputs: Outputs, generators: Generators) -> dict[str, Tensor]:
        """What else learns in a step, after the student; returns further losses by name."""
        del batch, outputs, generators
        return {}

    def learned(self, batch: Batch, outputs: Outputs, progress: float) -> dict[str, Term]:
        """L_sup + w(t) L_pseudo of SemiSAM-O1."""
        pseudo = batch.pseudo
        factor = self.config.pseudo_weight * pseudo_ramp(progress, self.config.pseudo_ramp)
        return {
            "supervised": Term(1.0, self.supervised(batch, outputs)),
            "pseudo": Term(factor, batch.pseudo_share * supervised_loss(outputs.pseudo, pseudo.target, pseudo.weight)),
        }

    def supervised(self, batch: Batch, outputs: Outputs) -> Tensor:
        """L_sup."""
        labelled = batch.labelled
        return batch.labelled_share * supervised_loss(outputs.labelled, labelled.target, labelled.weight)

    def taught(self, image: Tensor, generators: Generators) -> Tensor:
        """Class probabilities of the running average, without gradients; its dropout stays on.

        Args:
            image: (B, 1, z, y, x): all pseudo-labelled samples, or several views of all of them, view by view.
            generators: of the batch.
        """
        dropout = generators.of_pseudo.dropout
        views = len(image) // max(len(dropout), 1)
        with torch.no_grad(), self.fabric.autocast(), dropped_by([*dropout] * views):
            found = self.teacher(image)
        logits = found[1] if self.with_distance else found
        return F.softmax(logits.float(), 1)

    def _largest_decay(self) -> float:
        """The published decay, but an average over no more than a tenth of a round."""
        return min(self.config.ema_decay, 1 - 1 / (0.1 * self.config.iterations + 1))

    def inference_model(self) -> nn.Module:
        return ShiftedLogits(LogitsOnly(self.teacher) if self.with_distance else self.teacher, self.shift)

    def shift_logits(self, shift: Sequence[float]) -> None:
        self.shift = torch.tensor(shift, dtype=torch.float32, device=self.fabric.device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "shift": self.shift,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        own = [{key: value for key, value in one.items() if key != "params"} for one in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)  # moments are taken over, the configuration is this training's
        self.steps = state["steps"]
        self.shift_logits(state["shift"].tolist() if "shift" in state else [0.0] * self.plan.classes)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 - decay) · model for parameters; buffers are copied."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)
