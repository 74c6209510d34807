"""Mean teacher (Tarvainen and Valpola 2017) on pseudo-labels: method, section 1.3.

L = L_sup + λ(t) · L_cons + w(t) · L_pseudo
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from ..specialists import make_specialist
from .base import Batch, Learner, make_optimizer
from .losses import consistency_loss, supervised_loss
from .schedules import consistency_ramp, ema_decay, poly, pseudo_ramp

#: The teacher sees the image plus noise of this deviation, clamped to twice of it.
TEACHER_NOISE = 0.1


class MeanTeacher(Learner):
    """A student learns from labels and pseudo-labels; its running average, the teacher, keeps it consistent."""

    def setup(self, fabric: Fabric) -> None:
        self.fabric = fabric
        network = make_specialist(self.config.specialist, self.plan)
        optimizer = make_optimizer(network, self.config)
        self.teacher = fabric.to_device(copy.deepcopy(network)).requires_grad_(False)
        self.student, self.optimizer = fabric.setup(network, optimizer)
        self.steps = 0

    def step(self, batch: Batch, progress: float, generator: torch.Generator) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * poly(progress)
        labelled, pseudo = batch.labelled, batch.pseudo
        count = len(labelled.image)
        logits = self.student(torch.cat([labelled.image, pseudo.image])).float()
        with torch.no_grad(), self.fabric.autocast():
            wanted = F.softmax(self.teacher(with_noise(pseudo.image, generator)).float(), 1)
        losses = {
            "supervised": supervised_loss(logits[:count], labelled.target, labelled.weight),
            "pseudo": supervised_loss(logits[count:], pseudo.target, pseudo.weight),
            "consistency": consistency_loss(F.softmax(logits[count:], 1), wanted),
        }
        total = (
            losses["supervised"]
            + self.config.consistency * consistency_ramp(progress) * losses["consistency"]
            + pseudo_ramp(progress, self.config.pseudo_ramp) * losses["pseudo"]
        )
        self.optimizer.zero_grad()
        self.fabric.backward(total)
        self.fabric.clip_gradients(self.student, self.optimizer, max_norm=12.0, error_if_nonfinite=False)
        self.optimizer.step()
        update_average(self.teacher, self.student, ema_decay(self.steps, self._largest_decay()))
        self.steps += 1
        return {"total": float(total.detach()), **{name: float(loss.detach()) for name, loss in losses.items()}}

    def _largest_decay(self) -> float:
        """The published decay, but an average over no more than a tenth of a round."""
        return min(self.config.ema_decay, 1 - 1 / (0.1 * self.config.iterations + 1))

    def inference_model(self) -> nn.Module:
        return self.teacher

    def state_dict(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


def with_noise(image: Tensor, generator: torch.Generator) -> Tensor:
    """The image plus clamp(0.1 · N(0, 1), ±0.2)."""
    noise = torch.randn(image.shape, generator=generator).to(image.device) * TEACHER_NOISE
    return image + noise.clamp(-2 * TEACHER_NOISE, 2 * TEACHER_NOISE)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 - decay) · model for parameters; buffers are copied."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)
