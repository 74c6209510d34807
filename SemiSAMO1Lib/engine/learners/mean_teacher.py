"""Mean teacher (Tarvainen and Valpola 2017) and its uncertainty-aware form (Yu et al. 2019), as in SemiSAM-O1.

L = L_sup + λ(t) · L_cons + w(t) · L_pseudo
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .averaged import AveragedLearner, Outputs, Term
from .base import Batch
from .generators import Generators
from .losses import consistency_loss
from .schedules import consistency_ramp, sigmoid_ramp

#: The teacher sees the image plus noise of this deviation, clamped to twice of it.
TEACHER_NOISE = 0.1


class MeanTeacher(AveragedLearner):
    """The student learns from labels and pseudo-labels, and from what its running average says of another view."""

    def terms(self, batch: Batch, outputs: Outputs, progress: float, generators: Generators) -> dict[str, Term]:
        factor = self.config.consistency * self.consistency_ramp(progress)
        said = F.softmax(outputs.pseudo, 1)
        value = self.consistency(said, batch, progress, generators)
        return {**self.learned(batch, outputs, progress), "consistency": Term(factor, value)}

    def consistency(self, said: Tensor, batch: Batch, progress: float, generators: Generators) -> Tensor:
        """L_cons between the student's probabilities and the teacher's on a noisy view."""
        del progress
        view = with_noise(batch.pseudo.image, generators.of_pseudo.views)
        return batch.pseudo_share * consistency_loss(said, self.taught(view, generators))

    def consistency_ramp(self, progress: float) -> float:
        """λ(t) / λ_max."""
        return consistency_ramp(progress)


class UncertaintyMeanTeacher(MeanTeacher):
    """Only voxels of which the teacher is sure over T stochastic passes (noise and dropout) have to agree."""

    def consistency(self, said: Tensor, batch: Batch, progress: float, generators: Generators) -> Tensor:
        passes = self.config.uncertainty_passes
        views = torch.cat([with_noise(batch.pseudo.image, generators.of_pseudo.views) for _ in range(passes + 1)])
        wanted, *others = self.taught(views, generators).chunk(passes + 1)
        mean = torch.stack(others).mean(0)
        entropy = -(mean * (mean + 1e-6).log()).sum(1, keepdim=True)
        limit = (0.75 + 0.25 * sigmoid_ramp(progress)) * math.log(said.shape[1])
        sure = entropy < limit
        return masked_consistency(said, wanted, sure, self.share_of_total(sure.sum()))


def masked_consistency(said: Tensor, wanted: Tensor, sure: Tensor, count: Tensor) -> Tensor:
    """Squared difference of probabilities (B, C, ...) where `sure` (B, 1, ...), over C · the number of sure voxels."""
    squared = (said - wanted).square() * sure
    return squared.sum() / (said.shape[1] * count).clamp(min=1)


def with_noise(image: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """The image (B, 1, z, y, x) plus clamp(0.1 · N(0, 1), ±0.2), each sample by its own generator."""
    pairs = zip(image, generators, strict=True)
    drawn = [torch.randn(one.shape, generator=generator, device=generator.device) for one, generator in pairs]
    noise = torch.stack(drawn).to(image.device) * TEACHER_NOISE
    return image + noise.clamp(-2 * TEACHER_NOISE, 2 * TEACHER_NOISE)
