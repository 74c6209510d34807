"""MIND-SSC self-similarity descriptors: what a place looks like, free of the scanner's grey scale.

Heinrich et al., "Towards Realtime Multimodal Fusion for Image-Guided Interventions Using Self-Similarities",
MICCAI 2013: each voxel is described by the distances between small patches round its six neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Number of descriptor channels.
CHANNELS = 12

#: The six face neighbours of a voxel, as (z, y, x) offsets.
_NEIGHBOURS = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1))

#: The 12 pairs of neighbours that lie sqrt(2) apart: the edges of the self-similarity context.
PAIRS = tuple(
    (a, b)
    for i, a in enumerate(_NEIGHBOURS)
    for b in _NEIGHBOURS[i + 1 :]
    if sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) == 2
)


def mind_ssc(volume: Tensor, radius: int = 1, dilation: int = 2, mask: Tensor | None = None) -> Tensor:
    """Describe every voxel by 12 self-similarities in (0, 1].

    Args:
        volume: (z, y, x) intensities of any scale; NaN is not allowed.
        radius: half the side of the compared patches, in voxels (side = 2 * radius + 1).
        dilation: distance of the compared neighbours from the voxel, in voxels.
        mask: (z, y, x) bool, True where the scan has data; the noise level is estimated there. None: everywhere.

    Returns:
        (12, z, y, x) float tensor of `volume`'s type; 1 means "these two patches are the most alike here".
    """
    padded = F.pad(volume[None, None], [dilation] * 6, mode="replicate")[0, 0]

    def shifted(offset: tuple[int, int, int]) -> Tensor:
        z, y, x = (dilation * (1 + o) for o in offset)
        return padded[z : z + volume.shape[0], y : y + volume.shape[1], x : x + volume.shape[2]]

    distances = torch.stack([(shifted(a) - shifted(b)).square_() for a, b in PAIRS])
    distances = box_mean(distances, radius)
    distances -= distances.amin(0, keepdim=True)
    variance = distances.mean(0, keepdim=True)
    typical = float(variance[0][mask].mean() if mask is not None and bool(mask.any()) else variance.mean())
    variance = variance.clamp(min=max(typical * 1e-3, 1e-12), max=max(typical * 1e3, 1e-9))
    return torch.exp(-distances.div_(variance))


def box_mean(channels: Tensor, radius: int) -> Tensor:
    """Mean over a (2 * radius + 1)³ box of every channel of (c, z, y, x); borders are replicated."""
    if radius == 1:
        return box_mean_3(channels)
    side = 2 * radius + 1
    padded = F.pad(channels[None], [radius] * 6, mode="replicate")
    return F.avg_pool3d(padded, side, stride=1)[0]


def box_mean_3(channels: Tensor) -> Tensor:
    """Mean over 3³ voxels of (c, z, y, x), borders replicated; sums along lines, much faster than a 3D pooling."""
    source, target = channels, torch.empty_like(channels)
    spare = torch.empty_like(channels)
    for axis in (1, 2, 3):
        _sum_of_three(source, axis, target)
        source, target = target, spare if source is channels else source
    return source.div_(27)


def _sum_of_three(source: Tensor, axis: int, target: Tensor) -> None:
    """target = every voxel plus its two neighbours along an axis, borders replicated."""
    n = source.shape[axis]
    if n == 1:
        torch.mul(source, 3, out=target)
        return
    torch.add(source.narrow(axis, 0, n - 1), source.narrow(axis, 1, n - 1), out=target.narrow(axis, 0, n - 1))
    torch.mul(source.narrow(axis, n - 1, 1), 2, out=target.narrow(axis, n - 1, 1))
    target.narrow(axis, 1, n - 1).add_(source.narrow(axis, 0, n - 1))
    target.narrow(axis, 0, 1).add_(source.narrow(axis, 0, 1))
