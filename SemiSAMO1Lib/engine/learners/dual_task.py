"""DTC, dual-task consistency (Luo et al. 2021), for several classes, as SemiSAM-O1 has it.

The network gives logits and, for each foreground class c, a signed distance map d_c; sigmoid(-1500 d_c) is a second
opinion on where the class is. The released code's faults are not copied: the true distances count, each class has its
own map.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .averaged import AveragedLearner, Outputs, Term
from .base import Batch
from .generators import Generators
from .losses import dice_loss
from .schedules import consistency_ramp

#: Steepness with which a distance becomes a mask.
STEEPNESS = 1500.0

#: Factor of the squared error of the distances.
DISTANCE_FACTOR = 0.3


class DualTask(AveragedLearner):
    """The student segments and measures distances; both have to say the same, on labelled and unlabelled patches."""

    with_distance: ClassVar[bool] = True

    def terms(self, batch: Batch, outputs: Outputs, progress: float, generators: Generators) -> dict[str, Term]:
        del generators
        labelled = batch.labelled
        assert outputs.labelled_distance is not None and outputs.pseudo_distance is not None, "with_distance is set"
        assert labelled.distance is not None, "labelled cases come with distance maps when with_distance is set"
        share = batch.labelled_share
        near, far = outputs.labelled_distance[:, 1:], outputs.pseudo_distance[:, 1:]
        agreement = self.of_all(
            batch,
            *(
                F.mse_loss(as_mask(distance), F.softmax(logits, 1)[:, 1:])
                for distance, logits in ((near, outputs.labelled), (far, outputs.pseudo))
            ),
        )
        return {
            **self.learned(batch, outputs, progress),
            "distance_mask": Term(1.0, share * dice_loss(as_mask(near), labelled.target[:, 1:], labelled.weight)),
            "distance": Term(DISTANCE_FACTOR, share * distance_loss(near, labelled.distance, labelled.weight)),
            "consistency": Term(self.config.consistency * consistency_ramp(progress), agreement),
        }


def as_mask(distance: Tensor) -> Tensor:
    """sigmoid(-1500 d): 1 inside, ½ on the boundary, 0 outside."""
    return torch.sigmoid(-STEEPNESS * distance)


def distance_loss(distance: Tensor, true: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean squared error of distances (B, C - 1, ...) of each sample, averaged; NaN in `true`: a class that
    the case lacks, no term."""
    there = ~true.isnan() * weight
    axes = (1, 2, 3, 4)
    return (((distance - true.nan_to_num()).square() * there).sum(axes) / there.sum(axes).clamp(min=1)).mean()
