"""The 3D U-Net of the published code, parameter for parameter, so that published weights load (SemiSAM-O1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..planning import Plan, require_patch

#: Channels of the five levels.
CHANNELS = (16, 32, 64, 128, 256)


class UNet3D(nn.Module):
    """(B, 1, z, y, x) -> (B, C, z, y, x) logits; sides must be multiples of 16, one at least 32 (instance norm)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        a, b, c, d, e = CHANNELS
        self.conv1 = TwoConvolutions(1, a)
        self.conv2 = TwoConvolutions(a, b)
        self.conv3 = TwoConvolutions(b, c)
        self.conv4 = TwoConvolutions(c, d)
        self.center = TwoConvolutions(d, e)
        self.up_concat4 = UpAndJoin(d, e)
        self.up_concat3 = UpAndJoin(c, d)
        self.up_concat2 = UpAndJoin(b, c)
        self.up_concat1 = UpAndJoin(a, b)
        self.final = nn.Conv3d(a, classes, 1)
        self.dropout = nn.Dropout(0.3)

    def decoded(self, image: Tensor) -> Tensor:
        """Features (B, 16, z, y, x) before the head."""
        one = self.conv1(image)
        two = self.conv2(F.max_pool3d(one, 2))
        three = self.conv3(F.max_pool3d(two, 2))
        four = self.conv4(F.max_pool3d(three, 2))
        up = self.dropout(self.center(F.max_pool3d(four, 2)))
        for join, skipped in (
            (self.up_concat4, four),
            (self.up_concat3, three),
            (self.up_concat2, two),
            (self.up_concat1, one),
        ):
            up = join(skipped, up)
        features: Tensor = self.dropout(up)
        return features

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.final(self.decoded(image))
        return logits


class UNet3DWithDistance(UNet3D):
    """The same with a second head for signed distances: -> (distance map in (-1, 1), logits), each (B, C, z, y, x).

    Channel 0 of the distance map is not used; it is there because the published weights have it.
    """

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.final2 = nn.Conv3d(CHANNELS[0], classes, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        features = self.decoded(image)
        return torch.tanh(self.final2(features)), self.final(features)


class TwoConvolutions(nn.Module):
    """Twice: 3³ convolution, instance norm without parameters, ReLU."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv3d(before, after, 3, padding=1), nn.InstanceNorm3d(after), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv3d(after, after, 3, padding=1), nn.InstanceNorm3d(after), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x))
        return out


class UpAndJoin(nn.Module):
    """Trilinear upsampling by 2, joined with the features of the way down."""

    def __init__(self, fine: int, coarse: int) -> None:
        super().__init__()
        self.conv = TwoConvolutions(fine + coarse, fine)

    def forward(self, skipped: Tensor, coarse: Tensor) -> Tensor:
        if coarse.device.type == "cpu":  # eight times faster there (measured); elsewhere it was not measured
            coarse = coarse.contiguous(memory_format=torch.channels_last_3d)
        grown = F.interpolate(coarse, scale_factor=2, mode="trilinear", align_corners=False).contiguous()
        out: Tensor = self.conv(torch.cat([skipped, grown], 1))
        return out


def unet_3d(plan: Plan) -> nn.Module:
    """The published network of all learners but dual_task."""
    require_patch("unet_3d", plan)
    return UNet3D(plan.classes)


def unet_3d_sdf(plan: Plan) -> nn.Module:
    """The published network of dual_task."""
    require_patch("unet_3d", plan)
    return UNet3DWithDistance(plan.classes)
