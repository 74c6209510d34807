"""Training patches straight from whole scans: position, rotation, scale and bending in one interpolation.

Every patch is drawn from a generator keyed by (seed, round, iteration, sample), never from global state, so that a
resumed run sees the same patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..config import AugmentationConfig
from .intensity_augmentation import change_intensities
from .store import SavedArray

#: Voxels remembered per class as possible patch centres.
CENTRES_PER_CLASS = 500


@dataclass(frozen=True)
class TrainingCase:
    """One scan on its training grid.

    Attributes:
        image: (z, y, x) float16 or float32, scaled intensities; may lie on disk, as all of these.
        target: (z, y, x) class indices, or (C, z, y, x) probabilities (soft pseudo-labels).
        weight: (z, y, x) in [0, 1]; 0 where the label is unknown.
        centres: class -> (n, 3) voxel indices (z, y, x) of that class, for patch centres.
        chance: how often the case is drawn beside others, relative.
        distances: (C - 1, z, y, x) signed distance maps of the foreground classes, for learners that need them.
    """

    image: NDArray[Any] | SavedArray
    target: NDArray[Any] | SavedArray
    weight: NDArray[Any] | SavedArray
    centres: dict[int, NDArray[np.intp]]
    chance: float = 1.0
    distances: NDArray[Any] | SavedArray | None = None


@dataclass
class Patches:
    """A batch: image (B, 1, z, y, x), target (B, C, z, y, x) probabilities, weight (B, 1, z, y, x); float32.

    `distance`: (B, C - 1, z, y, x) signed distances of the foreground classes, NaN for a class that the case lacks.
    """

    image: Tensor
    target: Tensor
    weight: Tensor
    distance: Tensor | None = None

    def to(self, device: torch.device) -> Patches:
        image, target, weight = (one.to(device, non_blocking=True) for one in (self.image, self.target, self.weight))
        distance = None if self.distance is None else self.distance.to(device, non_blocking=True)
        return Patches(image, target, weight, distance)


def find_centres(label: NDArray[Any], classes: int, generator: np.random.Generator) -> dict[int, NDArray[np.intp]]:
    """Up to 500 voxels of every foreground class that is there, drawn once per case."""
    centres = {}
    for value in range(1, classes):
        voxels = np.flatnonzero(label == value)
        if len(voxels):
            drawn = generator.choice(voxels, min(CENTRES_PER_CLASS, len(voxels)), replace=False)
            centres[value] = np.stack(np.unravel_index(np.sort(drawn), label.shape), axis=1)
    return centres


def draw_case(cases: Sequence[TrainingCase], generator: np.random.Generator) -> TrainingCase:
    """One of the cases, by their chances."""
    chances = np.array([case.chance for case in cases])
    return cases[int(generator.choice(len(cases), p=chances / chances.sum()))]


def draw_patch(
    case: TrainingCase,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    classes: int,
    settings: AugmentationConfig,
    generator: np.random.Generator,
    foreground: int | None,
) -> Patches:
    """One patch (B = 1) of a case.

    Args:
        case: where it comes from.
        shape: (z, y, x) voxels.
        spacing: of the training grid, (z, y, x) mm.
        classes: number of classes.
        settings: what is varied, and how much.
        generator: the only source of randomness.
        foreground: class whose voxel is to be the centre; None: anywhere.
    """
    size = np.array(case.image.shape)
    centre = _centre(case, np.array(shape), generator, foreground)
    index = _positions(shape, np.array(spacing), settings, generator) + centre.reshape(3, 1, 1, 1)
    low = np.clip(np.floor(index.reshape(3, -1).min(1)).astype(int) - 1, 0, size - 1)
    high = np.clip(np.ceil(index.reshape(3, -1).max(1)).astype(int) + 2, low + 1, size)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    grid = torch.from_numpy(_normalised(index - low.reshape(3, 1, 1, 1), high - low))
    image = _sample(case.image[box][None], grid, "bilinear", "border")
    target = _target(case.target, box, grid, classes)
    weight = _sample(np.asarray(case.weight[box], np.float32)[None], grid, "nearest", "zeros")
    distance = None if case.distances is None else _sample(case.distances[:, *box], grid, "bilinear", "border")[None]
    if settings.intensity:
        image = change_intensities(image, generator)
    return Patches(image[None], target[None], weight[None], distance)


def collate(patches: Sequence[Patches]) -> Patches:
    """Single patches as one batch."""
    return Patches(
        torch.cat([p.image for p in patches]),
        torch.cat([p.target for p in patches]),
        torch.cat([p.weight for p in patches]),
        torch.cat([p.distance for p in patches if p.distance is not None]) if patches[0].distance is not None else None,
    )


def _centre(
    case: TrainingCase, shape: NDArray[np.intp], generator: np.random.Generator, foreground: int | None
) -> NDArray[np.float64]:
    """Centre of the patch as an index (z, y, x); along axes that the patch covers it stays near the middle."""
    size = np.array(case.image.shape)
    if foreground is not None and case.centres:
        after = [value for value in sorted(case.centres) if value >= foreground]
        voxels = case.centres[after[0] if after else min(case.centres)]  # a class that is absent here: the next one
        centre = voxels[generator.integers(len(voxels))].astype(float)
        centre += generator.uniform(-0.25, 0.25, 3) * shape
    else:
        centre = generator.uniform(0, 1, 3) * (size - 1)
    middle, slack = (size - 1) / 2, np.maximum((size - shape) / 2, 0) + 0.05 * shape
    first = np.rint(np.clip(centre, middle - slack, middle + slack) - (shape - 1) / 2)
    return first + (shape - 1) / 2  # voxel on voxel: without augmentation nothing is interpolated


def _positions(
    shape: tuple[int, int, int],
    spacing: NDArray[np.float64],
    settings: AugmentationConfig,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Where each voxel of the patch looks, relative to the centre, in voxels: (3, z, y, x)."""
    axes = [np.arange(n) - (n - 1) / 2 for n in shape]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1) * spacing[:, None]
    offsets = _turn(settings, generator) @ offsets
    offsets = offsets.reshape(3, *shape)
    if settings.elastic_mm > 0:
        nodes = torch.from_numpy(generator.uniform(-settings.elastic_mm, settings.elastic_mm, (1, 3, 4, 4, 4)))
        offsets = offsets + F.interpolate(nodes, size=shape, mode="trilinear", align_corners=True)[0].numpy()
    offsets = offsets / spacing.reshape(3, 1, 1, 1)
    if settings.mirror:  # of the slices' own axes, as published: up and down stay
        offsets[1:] *= generator.choice([-1.0, 1.0], 2).reshape(2, 1, 1, 1)
    if settings.quarter_turns and shape[1] == shape[2]:
        turns = int(generator.integers(4))
        offsets = np.rot90(offsets, turns, (2, 3)).copy()
    return np.asarray(offsets)


def _turn(settings: AugmentationConfig, generator: np.random.Generator) -> NDArray[np.float64]:
    """A random rotation times a random scale along each axis."""
    a, b, c = np.radians(generator.uniform(-1, 1, 3) * settings.rotation_degrees)
    about_z = np.array([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    about_y = np.array([[math.cos(b), 0, -math.sin(b)], [0, 1, 0], [math.sin(b), 0, math.cos(b)]])
    about_x = np.array([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    scale = 1 + generator.uniform(-settings.scale, settings.scale) + generator.uniform(-0.3, 0.3, 3) * settings.scale
    return np.asarray(about_z @ about_y @ about_x @ np.diag(scale))


def _normalised(index: NDArray[np.float64], size: NDArray[np.intp]) -> NDArray[np.float32]:
    """Indices (3, z, y, x) as grid_sample wants them: (1, z, y, x, 3), x first, align_corners=False."""
    grid = (2 * index + 1) / size.reshape(3, 1, 1, 1) - 1
    return grid[::-1].transpose(1, 2, 3, 0)[None].astype(np.float32)


def _sample(array: NDArray[Any], grid: Tensor, mode: str, padding: str) -> Tensor:
    channels = torch.from_numpy(np.ascontiguousarray(array, np.float32))[None]
    return F.grid_sample(channels, grid, mode=mode, padding_mode=padding, align_corners=False)[0]


def _target(target: NDArray[Any] | SavedArray, box: tuple[slice, ...], grid: Tensor, classes: int) -> Tensor:
    if target.ndim == 4:
        return _sample(target[:, *box], grid, "bilinear", "border")
    nearest = _sample(target[box][None], grid, "nearest", "border")[0].long()
    return F.one_hot(nearest, classes).permute(3, 0, 1, 2).float()
