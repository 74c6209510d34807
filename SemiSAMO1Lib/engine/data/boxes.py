"""Parts of a grid: cut out of a scan, found again on another grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ...volume import Geometry, StoredVolume, Volume


@dataclass(frozen=True)
class Box:
    """A part of a grid.

    Attributes:
        start, stop: its voxels along (z, y, x), as slices have them: `stop` is outside.
    """

    start: tuple[int, int, int]
    stop: tuple[int, int, int]

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return z, y, x

    @property
    def voxels(self) -> int:
        return math.prod(b - a for a, b in zip(self.start, self.stop, strict=True))

    def grid(self, whole: Geometry) -> Geometry:
        """Its voxels, where they are."""
        z, y, x = (b - a for a, b in zip(self.start, self.stop, strict=True))
        x_mm, y_mm, z_mm = (whole.index_to_space @ np.array([*self.start[::-1], 1.0]))[:3].tolist()
        return replace(whole, shape=(z, y, x), origin=(x_mm, y_mm, z_mm))

    def of(self, volume: Volume) -> Volume:
        """That part of a volume, the rest of which is not kept in memory."""

        def part() -> NDArray[Any]:
            return volume.array[self.slices].copy()

        grid = self.grid(volume.geometry)
        return StoredVolume(grid, part) if isinstance(volume, StoredVolume) else Volume(part(), grid)

    def placed(self, part: Volume, whole: Geometry, outside: int = 0) -> Volume:
        """What `of` cut out, where it was, and one value elsewhere."""
        array = np.full(whole.shape, outside, part.array.dtype)
        array[self.slices] = part.array
        return Volume(array, whole)

    def cuts_off(self, part: NDArray[Any], whole: Geometry) -> bool:
        """Whether a label map (z, y, x) of it has foreground at a face behind which the grid goes on."""
        ends = zip(range(3), self.start, self.stop, whole.shape, strict=True)
        faces = [(axis, end) for axis, a, b, n in ends for end, more in ((0, a > 0), (-1, b < n)) if more]
        return any(part.take(end, axis).any() for axis, end in faces)

    def joined(self, other: Box) -> Box:
        """The smallest one that has both in it."""
        stop = np.maximum(self.stop, other.stop)
        return box_within(np.minimum(self.start, other.start), stop, stop.tolist())


def box_within(start: NDArray[Any], stop: NDArray[Any], shape: Sequence[int]) -> Box:
    """A box within a grid, rounded outwards; at least one voxel."""
    start = np.clip(np.floor(start + 1e-6), 0, np.array(shape) - 1).astype(int)
    stop = np.clip(np.ceil(stop - 1e-6), start + 1, shape).astype(int)
    a, b = ([int(one) for one in ends] for ends in (start, stop))
    return Box((a[0], a[1], a[2]), (b[0], b[1], b[2]))


def box_around(label: NDArray[Any]) -> Box | None:
    """The smallest box with all foreground voxels of a label map (z, y, x) in it; None where there is none."""
    found = ndimage.find_objects((label > 0).astype(np.uint8))
    if not found:
        return None
    ends = np.array([(along.start, along.stop) for along in found[0]])
    return box_within(ends[:, 0], ends[:, 1], label.shape)


def grown(box: Box, whole: Geometry, mm: float) -> Box:
    """A box of a grid, larger by `mm` on each side as far as the grid goes."""
    margin = mm / np.array(whole.spacing)
    return box_within(np.array(box.start) - margin, np.array(box.stop) + margin, whole.shape)


def on_grid(box: Box, grid: Geometry, other: Geometry) -> Box:
    """The smallest box of another grid in which a box of a grid lies, as far as the other grid goes."""
    z, y, x = ((a - 0.5, b - 0.5) for a, b in zip(box.start, box.stop, strict=True))
    corners = np.array([(i, j, k, 1.0) for k in z for j in y for i in x])
    there = corners @ (np.linalg.inv(other.index_to_space) @ grid.index_to_space).T
    places = there[:, 2::-1] + 0.5
    return box_within(places.min(0), places.max(0), other.shape)


def size_of(box: Box, whole: Geometry) -> float:
    """The cube root of a box' volume, mm."""
    return float((box.voxels * math.prod(whole.spacing)) ** (1 / 3))
