"""MIND-SSC descriptors as a generalist: nothing to download, nothing learned."""

from __future__ import annotations

import numpy as np
import torch

from ...volume import Volume
from ..propagation.descriptors import describe
from .base import Card, FeatureMap

CARD = Card(licence="own code")


class MindFeatures:
    """The registration's pooled descriptors as features: 12 channels in cells of two working voxels."""

    def __init__(self, spacing: float, device: torch.device) -> None:
        """
        Args:
            spacing: isotropic working spacing, mm (see `working_spacing`); cells are twice as wide.
            device: where the descriptors are computed.
        """
        self.spacing = spacing
        self.device = device

    @property
    def key(self) -> str:
        return f"mind-ssc 1 spacing {self.spacing:.6f} {self.device.type}"

    def features(self, volume: Volume) -> FeatureMap:
        found = describe(volume, self.spacing, self.device, finest=False).coarse
        channels = found.values.float().cpu().numpy()
        # descriptors lie in (0, 1]: without their mean a cosine would hardly tell them apart
        channels = channels - channels.mean(0, keepdims=True)
        return FeatureMap(found.geometry, channels.astype(np.float16), found.weight.float().cpu().numpy())
