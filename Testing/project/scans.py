"""Small scans and label maps with known truth, by place in mm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from SemiSAMO1Lib.image_io import write_volume
from SemiSAMO1Lib.volume import Geometry, Volume

#: A right-handed grid with three different sizes and spacings, turned about all axes.
OBLIQUE = Geometry(
    (12, 14, 17),
    (2.5, 1.5, 1.0),
    (-7.3, 11.1, -20.7),
    tuple(Rotation.from_euler("zyx", (12, -7, 9), degrees=True).as_matrix().ravel().tolist()),
)


def left_handed(geometry: Geometry) -> Geometry:
    """The same axes with x mirrored: the determinant of the direction is negative."""
    direction = np.reshape(geometry.direction, (3, 3)) * np.array([-1, 1, 1])
    return Geometry(geometry.shape, geometry.spacing, geometry.origin, tuple(direction.ravel().tolist()))


def scan(geometry: Geometry, seed: int = 0) -> Volume:
    """Noise: no two voxels alike."""
    noise = np.random.default_rng(seed).normal(300, 40, geometry.shape)
    return Volume(noise.astype(np.float32), geometry)


def write_scan(path: Path, geometry: Geometry = OBLIQUE, seed: int = 0) -> Path:
    write_volume(path, scan(geometry, seed))
    return path


def places(geometry: Geometry) -> np.ndarray[Any, Any]:
    """Centres of all voxels, (z, y, x, 3), mm."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in geometry.shape), indexing="ij")
    return (np.stack([x, y, z, np.ones_like(x)], -1) @ geometry.index_to_space.T)[..., :3]


def box(geometry: Geometry, low: tuple[float, ...], high: tuple[float, ...]) -> list[list[float]]:
    """A box of patient space in mm round the scan's centre, from offsets (x, y, z) to offsets."""
    return [(geometry.centre + np.array(low)).tolist(), (geometry.centre + np.array(high)).tolist()]


def within(geometry: Geometry, limits: list[list[float]]) -> np.ndarray[Any, Any]:
    """Which voxels of a grid lie in a box of `box`."""
    where = places(geometry)
    return ((where > np.array(limits[0])) & (where < np.array(limits[1]))).all(-1)


def two_labels(geometry: Geometry, first: int = 1, second: int = 2, kind: type = np.uint8) -> Volume:
    """A label map with two boxes apart from each other."""
    array = np.zeros(geometry.shape, kind)
    array[2:5, 2:6, 2:7] = first
    array[6:9, 7:11, 8:14] = second
    return Volume(array, geometry)
