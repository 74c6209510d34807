"""SemiSAM (arXiv 2312.06316) and SemiSAM+ (arXiv 2502.20749): frozen promptable models teach on unlabelled patches.

The student's own prediction gives the prompts, the generalists answer with masks, the masks teach the student. No label
of an unlabelled scan is ever asked for.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import AssistanceConfig, TrainingConfig
from ..generalists.base import Promptable, Prompts
from ..generalists.registry import promptable_named
from ..generalists.sam_med3d.checkpoint import find
from ..generalists.sam_med3d.generalist import RANDOM
from ..observer import Observer
from .averaged import Outputs, Term
from .base import Batch
from .generators import Generators
from .mean_teacher import MeanTeacher, UncertaintyMeanTeacher
from .schedules import ramp_down, sigmoid_ramp, steep_ramp

#: Logits of a mask prompt stay within this.
LARGEST_LOGIT = 10.0

#: A place whose probability is below this may be pointed at as outside.
SURELY_OUTSIDE = 0.1


class SemiSam(MeanTeacher):
    """Mean teacher beside λ_s(t) · MSE(student, mask of the generalist), λ_s falling (SemiSAM)."""

    asks_generalists = True

    @cached_property
    def assistants(self) -> list[Promptable]:
        """Who is asked; loaded when first asked: a trained student predicts without them."""
        return assistants_of(self.config, self.fabric.device)

    @classmethod
    def require_files(cls, config: TrainingConfig) -> None:
        if "sam-med3d" in config.assistance.generalists and config.generalists.checkpoint != RANDOM:
            find(config.generalists.checkpoint)

    @classmethod
    def load_or_refuse(cls, config: TrainingConfig, device: torch.device, observer: Observer) -> None:
        assistants_of(config, device, observer)

    def terms(self, batch: Batch, outputs: Outputs, progress: float, generators: Generators) -> dict[str, Term]:
        said = F.softmax(outputs.pseudo, 1)
        factor = self.config.assistance.weight * ramp_down(progress)
        value = self.assisted(said, batch.pseudo.image, generators)
        return {**super().terms(batch, outputs, progress, generators), "assisted": Term(factor, value)}

    def consistency_ramp(self, progress: float) -> float:
        return steep_ramp(progress)

    def assisted(self, said: Tensor, image: Tensor, generators: Generators) -> Tensor:
        """Mean squared difference between the student's probabilities and the generalists' masks."""
        errors = [(p - mean).square().mean() for p, mean, _ in self.answers(said, image, generators)]
        return self.mean_answer(errors, said)

    def mean_answer(self, values: list[Tensor], said: Tensor) -> Tensor:
        """Mean over the answers of all processes; 0 where nothing was asked."""
        count = self.share_of_total(torch.tensor(len(values), device=said.device))
        return torch.stack(values).sum() / count if values else said.new_zeros(())

    def answers(self, said: Tensor, image: Tensor, generators: Generators) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What the generalists say of every foreground class that the student sees.

        Args:
            said: (B, C, z, y, x) the student's probabilities.
            image: (B, 1, z, y, x).
            generators: draw the points.

        Returns:
            for each patch and class: the student's probability (z, y, x), with gradient; mean and entropy (nats) of the
            generalists' answers, without.
        """
        found = []
        for patch, probabilities, generator in zip(image, said, generators.of_pseudo.noise, strict=True):
            asked = [
                (value, questions)
                for value in range(1, len(probabilities))
                if (questions := self.questions(probabilities[value].detach(), generator))
            ]
            if not asked:
                continue
            everything = [question for _, questions in asked for question in questions]
            with torch.no_grad():  # whatever a generalist does itself
                answers = torch.stack([one.segment(patch[None], everything)[:, 0] for one in self.assistants])
            start = 0
            for value, questions in asked:
                mean = answers[:, start : start + len(questions)].mean((0, 1))
                start += len(questions)
                found.append((probabilities[value], mean, binary_entropy(mean)))
        return found

    def questions(self, probability: Tensor, generator: torch.Generator) -> list[Prompts]:
        """The prompts for one class: none where the student sees nothing of it."""
        return questions_of(probability, self.config.assistance, 1, generator)


class SemiSamUncertainty(SemiSam, UncertaintyMeanTeacher):
    """SemiSAM on the uncertainty-aware mean teacher."""


class SemiSamPlus(SemiSam):
    """Several answers of one or more generalists; where they disagree they count less (SemiSAM+)."""

    def terms(self, batch: Batch, outputs: Outputs, progress: float, generators: Generators) -> dict[str, Term]:
        terms = super().terms(batch, outputs, progress, generators)
        factor = self.config.assistance.weight * sigmoid_ramp(1 - progress)
        return {**terms, "assisted": Term(factor, terms["assisted"].value)}

    def consistency_ramp(self, progress: float) -> float:
        return sigmoid_ramp(progress)

    def assisted(self, said: Tensor, image: Tensor, generators: Generators) -> Tensor:
        losses = [confident_difference(p, mean, doubt) for p, mean, doubt in self.answers(said, image, generators)]
        return self.mean_answer(losses, said)

    def questions(self, probability: Tensor, generator: torch.Generator) -> list[Prompts]:
        return questions_of(probability, self.config.assistance, self.config.assistance.answers, generator)


def confident_difference(said: Tensor, mean: Tensor, doubt: Tensor) -> Tensor:
    """Σ (p - p_gen)² exp(-U) / Σ exp(-U) + mean(U): voxels of which the generalists are sure count more."""
    trust = (-doubt).exp()
    return ((said - mean).square() * trust).sum() / trust.sum() + doubt.mean()


def binary_entropy(probability: Tensor) -> Tensor:
    """Entropy in nats, 0 to ln 2."""
    p = probability.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def assistants_of(config: TrainingConfig, device: torch.device, observer: Observer | None = None) -> list[Promptable]:
    """The configured promptable generalists; their weights are loaded once in a process.

    Raises:
        ValueError: an unknown one, or no checkpoint.
    """
    names = config.assistance.generalists
    return [promptable_named(name, config.generalists, device, observer) for name in names]


def questions_of(
    probability: Tensor, settings: AssistanceConfig, count: int, generator: torch.Generator
) -> list[Prompts]:
    """`count` sets of points from the student's confident places, and the student's mask where it is asked for.

    Args:
        probability: (z, y, x) of one class, without gradient.
        settings: kinds of prompts, number of points.
        count: how many sets of points are drawn.
        generator: draws them.

    Returns:
        nothing where no voxel is more probable than not.
    """
    if not bool((probability > 0.5).any()):
        return []
    mask = None
    if settings.prompts in ("mask", "both"):
        mask = torch.logit(probability.clamp(1e-6, 1 - 1e-6)).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)[None, None]
    if settings.prompts == "mask":
        return [Prompts(probability.new_zeros(0, 3), probability.new_zeros(0, dtype=torch.bool), mask)]
    inside, outside = confident_places(probability)
    return [_drawn(inside, outside, settings.points, mask, generator) for _ in range(count)]


def confident_places(probability: Tensor) -> tuple[Tensor, Tensor]:
    """Voxels (n, 3) that surely belong to a class, and such that surely do not but lie near it.

    Inside: the more probable half of those above 0.5. Outside: below 0.1, within the box of the class grown by a
    quarter, or anywhere when there are none.
    """
    above = probability[probability > 0.5]
    inside = torch.nonzero(probability >= above.median())
    low, high = inside.amin(0), inside.amax(0)
    margin = ((high - low + 1) / 4).ceil().long()
    shape = torch.tensor(probability.shape, device=probability.device)
    start, stop = (low - margin).clamp(min=0), torch.minimum(high + margin + 1, shape)
    box = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
    outside = torch.nonzero(probability[box] < SURELY_OUTSIDE) + start
    return inside, outside if len(outside) else torch.nonzero(probability < SURELY_OUTSIDE)


def _drawn(inside: Tensor, outside: Tensor, count: int, mask: Tensor | None, generator: torch.Generator) -> Prompts:
    points = [_choice(places, count, generator) for places in (inside, outside)]
    kinds = torch.tensor([True] * len(points[0]) + [False] * len(points[1]))
    return Prompts(torch.cat(points), kinds, mask)


def _choice(places: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if not len(places):
        return places
    return places[torch.randint(len(places), (count,), generator=generator).to(places.device)]
