"""Losses on probabilities, voxels weighted. Shapes: logits and targets (B, C, z, y, x), weight (B, 1, z, y, x)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

#: Keeps the Dice of an absent class defined.
SMOOTH = 1e-5


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of -sum_c q_c log p_c of each sample, averaged; 0 for one where no voxel has weight."""
    each = -(target * F.log_softmax(logits, 1)).sum(1, keepdim=True)
    axes = (1, 2, 3, 4)
    return ((each * weight).sum(axes) / weight.sum(axes).clamp(min=1.0)).mean()


def dice_loss(probabilities: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over samples and classes (background too) of 1 - (2 Σ w p q + s) / (Σ w p² + Σ w q² + s), as in
    SemiSAM-O1. Each sample by itself: the loss of a batch does not depend on how it is shared by processes.
    """
    axes = (2, 3, 4)
    overlap = (weight * probabilities * target).sum(axes)
    size = (weight * probabilities.square()).sum(axes) + (weight * target.square()).sum(axes)
    return (1 - (2 * overlap + SMOOTH) / (size + SMOOTH)).mean()


def supervised_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """½ (cross-entropy + Dice): L_sup and L_pseudo of the method."""
    return 0.5 * (cross_entropy(logits, target, weight) + dice_loss(F.softmax(logits, 1), target, weight))


def consistency_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two probability maps."""
    return F.mse_loss(student, teacher)
