"""Arrays from one grid in patient space to another: which grids the method works on, and sampling between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from ...volume import Geometry, Volume, copy_on_lattice

#: Points from which on it pays that all threads of a CPU share them.
SHARED_FROM = 5_000


def canonical(geometry: Geometry) -> Geometry:
    """The same voxels with array axes (z, y, x) running nearest to superior, posterior, left (LPS), no resampling."""
    direction = np.reshape(geometry.direction, (3, 3))
    order = max(itertools.permutations(range(3)), key=lambda p: sum(abs(direction[row, p[row]]) for row in range(3)))
    flips = [1.0 if direction[row, order[row]] >= 0 else -1.0 for row in range(3)]
    shape_xyz, spacing_xyz = geometry.shape[::-1], geometry.spacing[::-1]
    index = [0.0, 0.0, 0.0, 1.0]
    for row in range(3):
        if flips[row] < 0:
            index[order[row]] = shape_xyz[order[row]] - 1
    origin = (geometry.index_to_space @ np.array(index))[:3]
    turned = np.stack([direction[:, order[row]] * flips[row] for row in range(3)], axis=1)
    return Geometry(
        shape=_three_ints([shape_xyz[order[2 - axis]] for axis in range(3)]),
        spacing=_three([spacing_xyz[order[2 - axis]] for axis in range(3)]),
        origin=_three(origin),
        direction=tuple(float(v) for v in turned.ravel()),
    )


def with_spacing(geometry: Geometry, spacing: Sequence[float]) -> Geometry:
    """The same field of view with another spacing (z, y, x), mm; the number of voxels is rounded, the centre kept."""
    shape = [
        max(1, round(n * old / new)) for n, old, new in zip(geometry.shape, geometry.spacing, spacing, strict=True)
    ]
    same = np.allclose(spacing, geometry.spacing, rtol=1e-4)
    if same:
        return geometry
    return _round_centre(geometry.centre, shape, spacing, np.reshape(geometry.direction, (3, 3)))


def patient_aligned(geometry: Geometry, spacing: float) -> Geometry:
    """An isotropic grid along the patient's axes that covers the field of view of `geometry`.

    Where the volume lies along the patient's axes and has this spacing, the grid's points are its voxel centres.
    """
    matrix = geometry.index_to_space
    edges = []
    for ends in itertools.product(*((-0.5, n - 0.5) for n in geometry.shape[::-1])):
        edges.append((matrix @ np.array([*ends, 1.0]))[:3])
    low, high = np.min(edges, axis=0), np.max(edges, axis=0)
    shape = [max(1, int(np.floor((b - a) / spacing + 0.01))) for a, b in zip(low[::-1], high[::-1], strict=True)]
    return _round_centre((low + high) / 2, shape, [spacing] * 3, np.eye(3))


def pooled(geometry: Geometry, stride: int) -> Geometry:
    """The grid of a `stride`³ average pooling whose array was padded at its end to a multiple of the stride."""
    shape = _three_ints([-(-n // stride) for n in geometry.shape])
    origin = geometry.index_to_space @ np.array([(stride - 1) / 2] * 3 + [1.0])
    return Geometry(shape, _three([s * stride for s in geometry.spacing]), _three(origin[:3]), geometry.direction)


def index_grid(geometry: Geometry, device: torch.device | str = "cpu") -> Tensor:
    """Indices (x, y, z) of every voxel: float32 (3, z, y, x)."""
    z, y, x = (torch.arange(n, dtype=torch.float32, device=device) for n in geometry.shape)
    grid = torch.meshgrid(z, y, x, indexing="ij")
    return torch.stack(grid[::-1])


def space_points(geometry: Geometry, device: torch.device | str = "cpu") -> Tensor:
    """Places (x, y, z) of every voxel centre in mm, relative to patient space: float32 (3, z, y, x)."""
    return transform_points(index_grid(geometry, device), geometry.index_to_space)


def transform_points(points: Tensor, matrix: NDArray[np.floating[Any]]) -> Tensor:
    """Apply a 4×4 matrix to points (3, ...)."""
    m = _beside(points, matrix)
    flat = points.reshape(3, -1)
    return torch.addmm(m[:3, 3:], m[:3, :3], flat).reshape(points.shape)


def sample(
    channels: Tensor, geometry: Geometry, points: Tensor, mode: str = "bilinear", padding: str = "border"
) -> Tensor:
    """Values of `channels` (c, z, y, x) on `geometry` at `points` (3, Z, Y, X), (x, y, z) in mm.

    Args:
        channels: float tensor.
        geometry: grid of the channels.
        points: where to sample, patient space.
        mode: 'bilinear' (trilinear for volumes) or 'nearest'.
        padding: 'border' repeats the edge, 'zeros' gives 0 outside the field of view.

    Returns:
        (c, Z, Y, X); half precision is read, but computed and returned in float32: places need more than 11 bits.
    """
    if channels.dtype == torch.float16:
        channels = channels.float()
    # index -> normalised coordinates of grid_sample (align_corners=False): (2 i + 1) / n - 1
    n = np.array(geometry.shape[::-1], dtype=float)
    scale = np.diag([*(2 / n), 1.0])
    scale[:3, 3] = 1 / n - 1
    where = transform_points(points, scale @ np.linalg.inv(geometry.index_to_space))
    grid = where.permute(1, 2, 3, 0).to(channels.dtype)
    if channels.device.type == "cpu" and math.prod(points.shape[1:]) >= SHARED_FROM:
        return _sampled_by_all(channels, grid, mode, padding)
    return F.grid_sample(channels[None], grid[None], mode=mode, padding_mode=padding, align_corners=False)[0]


def _sampled_by_all(channels: Tensor, grid: Tensor, mode: str, padding: str) -> Tensor:
    """`grid_sample` by all threads: on CPUs it gives a volume of the batch to each, so the points are made a batch."""
    shares, flat = torch.get_num_threads(), grid.reshape(-1, 3)
    each = -(-len(flat) // shares)
    padded = F.pad(flat, (0, 0, 0, shares * each - len(flat))).reshape(shares, each, 1, 1, 3)
    same = channels.expand(shares, *channels.shape)
    found = F.grid_sample(same, padded, mode=mode, padding_mode=padding, align_corners=False)[..., 0, 0]
    return found.transpose(0, 1).reshape(len(channels), -1)[:, : len(flat)].reshape(-1, *grid.shape[:3])


def inside(geometry: Geometry, points: Tensor) -> Tensor:
    """True where points (3, ...) in mm lie inside the field of view, voxel edges included."""
    index = transform_points(points, np.linalg.inv(geometry.index_to_space))
    limits = _beside(points, np.array(geometry.shape[::-1])).reshape(3, *[1] * 3)
    return ((index >= -0.5) & (index <= limits - 0.5)).all(0)


def _beside(points: Tensor, values: NDArray[Any]) -> Tensor:
    """A few numbers where the points are; a GPU is not waited for."""
    return torch.as_tensor(values, dtype=points.dtype).to(points.device, non_blocking=True)


def resample_image(volume: Volume, target: Geometry) -> NDArray[np.float32]:
    """A scan on another grid, float32 (z, y, x): copied on one lattice, else smoothed and trilinear."""
    copied = copy_on_lattice(volume, target) if _covers(volume.geometry, target) else None
    if copied is not None:
        return copied.array.astype(np.float32)
    array = volume.array.astype(np.float32)
    ratio = _spacing_along(target, volume.geometry) / np.array(volume.geometry.spacing)
    sigma = 0.42 * np.sqrt(np.maximum(ratio**2 - 1, 0))
    if sigma.any():
        array = ndimage.gaussian_filter(array, sigma, mode="nearest", truncate=3.0)
    return sample(torch.from_numpy(array)[None], volume.geometry, space_points(target))[0].numpy()


def resample_labels(volume: Volume, target: Geometry) -> NDArray[Any]:
    """A label map on another grid: copied on one lattice, else the label with the largest trilinear share."""
    copied = copy_on_lattice(volume, target)
    if copied is not None:
        return copied.array
    points, array = space_points(target), volume.array
    best = np.zeros(target.shape, array.dtype)
    share = np.full(target.shape, -1.0, np.float32)
    for value in np.unique(array):
        one = torch.from_numpy((array == value).astype(np.float32))[None]
        here = sample(one, volume.geometry, points, padding="zeros")[0].numpy()
        better = here > share
        best[better], share[better] = value, here[better]
    return best


def _covers(source: Geometry, target: Geometry) -> bool:
    index = np.linalg.inv(source.index_to_space) @ np.c_[target.corners(), np.ones(8)].T
    limit = np.array(source.shape[::-1])[:, None]
    return bool(((index[:3] > -0.02) & (index[:3] < limit - 0.98)).all())


def _spacing_along(target: Geometry, source: Geometry) -> NDArray[np.float64]:
    """The target's sample distance along the source's array axes (z, y, x), mm."""
    turn = np.abs(np.reshape(source.direction, (3, 3)).T @ np.reshape(target.direction, (3, 3)))
    along = turn**2 @ np.array(target.spacing[::-1])
    return np.asarray(along[::-1])


def _round_centre(
    centre: NDArray[np.float64], shape: Sequence[int], spacing: Sequence[float], direction: NDArray[np.float64]
) -> Geometry:
    middle = np.array([(n - 1) / 2 * s for n, s in zip(shape[::-1], list(spacing)[::-1], strict=True)])
    origin = centre - direction @ middle
    return Geometry(_three_ints(shape), _three(spacing), _three(origin), tuple(float(v) for v in direction.ravel()))


def _three(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float, float]:
    a, b, c = (float(v) for v in values)
    return a, b, c


def _three_ints(values: Sequence[int]) -> tuple[int, int, int]:
    a, b, c = (int(v) for v in values)
    return a, b, c
