"""Batches for the training loop: one labelled patch beside the pseudo-labelled ones, keyed by iteration and rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .config import TrainingConfig
from .data.patches import Patches, TrainingCase, collate, draw_case, draw_patch
from .learners import Batch
from .planning import Plan


class PatchSource:
    """Draws the batch of any iteration; the same arguments always give the same batch."""

    def __init__(
        self,
        labelled: Sequence[TrainingCase],
        pseudo: Sequence[TrainingCase],
        plan: Plan,
        config: TrainingConfig,
        number: int,
    ) -> None:
        self.labelled = labelled
        self.pseudo = pseudo or labelled
        self.plan = plan
        self.config = config
        self.number = number

    def __call__(self, iteration: int, rank: int) -> Batch:
        labelled = [self._draw(self.labelled, iteration, rank, 0)]
        pseudo = [self._draw(self.pseudo, iteration, rank, 1 + i) for i in range(self.plan.batch)]
        return Batch(collate(labelled), collate(pseudo))

    def _draw(self, cases: Sequence[TrainingCase], iteration: int, rank: int, position: int) -> Patches:
        generator = np.random.default_rng([self.config.seed, self.number, iteration, rank, position])
        turn = iteration + position
        foreground = None
        if turn % 2 == 0:  # in every place of the batch every other patch lies on foreground, classes in turn
            foreground = 1 + (turn // 2) % (self.plan.classes - 1)
        return draw_patch(
            draw_case(cases, generator),
            self.plan.patch,
            self.plan.spacing,
            self.plan.classes,
            self.config.augmentation,
            generator,
            foreground,
        )
