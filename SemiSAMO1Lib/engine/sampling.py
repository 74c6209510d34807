"""Batches for the training loop: labelled patches beside pseudo-labelled ones, keyed by iteration and place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from .config import TrainingConfig
from .data.patches import Patches, TrainingCase, collate, draw_case, draw_patch
from .learners import Batch
from .planning import Plan

#: Returns a process' part of the batch of an iteration, given the iteration and the rank.
Sample = Callable[[int, int], Batch]


class PatchSource:
    """Draws the batch of any iteration; the same arguments always give the same batch.

    The global batch is the same however many processes share it: a process draws the places rank, rank + ranks, ...
    """

    def __init__(
        self,
        labelled: Sequence[TrainingCase],
        pseudo: Sequence[TrainingCase],
        plan: Plan,
        config: TrainingConfig,
        number: int,
        ranks: int = 1,
    ) -> None:
        """
        Args:
            labelled, pseudo: what is drawn from.
            plan, config: size of the patches and of the batch, what is varied.
            number: of the round.
            ranks: processes that share the batch.

        Raises:
            ValueError: they are more than the batch has patches.
        """
        require_shares(plan, ranks)
        self.labelled = labelled
        self.pseudo = pseudo or labelled
        self.plan = plan
        self.config = config
        self.number = number
        self.ranks = ranks

    def __call__(self, iteration: int, rank: int) -> Batch:
        plan = self.plan
        # the first labelled patch, the pseudo-labelled ones, then the other labelled ones
        first = [0, *range(1 + plan.batch, plan.batch + plan.labelled)][rank :: self.ranks]
        others = range(1, 1 + plan.batch)[rank :: self.ranks]
        return Batch(
            collate([self._draw(self.labelled, iteration, place) for place in first]),
            collate([self._draw(self.pseudo, iteration, place) for place in others]),
            (*first, *others),
            self.ranks * len(first) / plan.labelled,
            self.ranks * len(others) / plan.batch,
        )

    def _draw(self, cases: Sequence[TrainingCase], iteration: int, position: int) -> Patches:
        generator = np.random.default_rng([self.config.seed, self.number, iteration, 0, position])
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


def drawing_threads(device: torch.device) -> int:
    """Threads that draw batches: one where the processor trains as well; beside a GPU all cores but one, up to twelve,
    as a step is over sooner than a batch is drawn."""
    return 1 if device.type == "cpu" else min(12, max(1, torch.get_num_threads() - 1))


def drawn_ahead(sample: Sample, first: int, last: int, rank: int, threads: int = 1) -> Generator[Batch, None, None]:
    """The batches of the iterations first .. last - 1; while one is learned from, threads draw the next ones.

    What the drawing raises comes out of the iteration that asked for it. Close the iterator when it is left early.
    """
    of_torch = torch.get_num_threads()
    alone = partial(torch.set_num_threads, 1) if threads > 1 else None  # many threads do not share their work as well
    try:
        with ThreadPoolExecutor(threads, "patches", alone) as drawing:
            following = deque(drawing.submit(sample, one, rank) for one in range(first, min(first + threads, last)))
            for iteration in range(first, last):
                batch = following.popleft().result()
                if iteration + threads < last:
                    following.append(drawing.submit(sample, iteration + threads, rank))
                yield batch
    finally:
        torch.set_num_threads(of_torch)


def require_shares(plan: Plan, ranks: int) -> None:
    """Raise ValueError when so many processes cannot share a batch."""
    if ranks > min(plan.labelled, plan.batch):
        raise ValueError(
            f"a batch of {plan.labelled} labelled and {plan.batch} pseudo-labelled patches cannot be shared by {ranks} "
            "processes. Go on with fewer, or start a new training with these."
        )
