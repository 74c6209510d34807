"""What several engine tests need: small grids, plans, configurations, observers, transforms."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from SemiSAMO1Lib.engine.config import AugmentationConfig, TrainingConfig
from SemiSAMO1Lib.engine.data.intensities import IntensityPlan
from SemiSAMO1Lib.engine.data.patches import Patches
from SemiSAMO1Lib.engine.learners import Batch
from SemiSAMO1Lib.engine.learners.generators import Generators, generators_of
from SemiSAMO1Lib.engine.planning import Plan
from SemiSAMO1Lib.engine.propagation.deformable import Deformation
from SemiSAMO1Lib.volume import Geometry, Volume

UNCHANGED = AugmentationConfig(rotation_degrees=0, scale=0, elastic_mm=0, mirror=False, intensity=False)


def turned(angles=(20.0, -15.0, 10.0)) -> tuple[float, ...]:
    """A direction matrix that is oblique."""
    return tuple(float(v) for v in Rotation.from_euler("zyx", angles, degrees=True).as_matrix().ravel())


def all_axis_directions() -> list[tuple[float, ...]]:
    """The 48 directions that run along the patient's axes, left-handed ones included."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            matrix = np.zeros((3, 3))
            for column, row in enumerate(order):
                matrix[row, column] = signs[column]
            found.append(tuple(float(v) for v in matrix.ravel()))
    return found


def flipped(volume: Volume, axes: tuple[int, ...]) -> Volume:
    """The same scan with array axes (0 = z, 1 = y, 2 = x) stored backwards: every voxel keeps its place in mm."""
    geometry = volume.geometry
    direction = np.reshape(geometry.direction, (3, 3)).copy()
    index = np.zeros(4)
    index[3] = 1
    for axis in axes:
        index[2 - axis] = geometry.shape[axis] - 1
        direction[:, 2 - axis] *= -1
    origin = tuple(float(v) for v in (geometry.index_to_space @ index)[:3])
    where = Geometry(geometry.shape, geometry.spacing, origin, tuple(float(v) for v in direction.ravel()))
    return Volume(np.flip(volume.array, axes).copy(), where)


def cropped(volume: Volume, low: tuple[int, int, int], high: tuple[int, int, int]) -> Volume:
    """Voxels low..high-1 (z, y, x) of a volume, at their place."""
    geometry = volume.geometry
    origin = tuple(float(v) for v in (geometry.index_to_space @ np.array([*low[::-1], 1.0]))[:3])
    shape = tuple(b - a for a, b in zip(low, high, strict=True))
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return Volume(volume.array[box].copy(), Geometry(shape, geometry.spacing, origin, geometry.direction))


def smooth_noise(shape: tuple[int, int, int], seed: int, sigma: float = 1.5) -> np.ndarray:
    """Smooth random grey values, standard deviation 1."""
    array = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return (array / array.std()).astype(np.float32)


def dice(a: np.ndarray, b: np.ndarray, value: int) -> float:
    return 2 * float(((a == value) & (b == value)).sum()) / float((a == value).sum() + (b == value).sum())


def tiny_plan(classes: int = 3, patch: tuple[int, int, int] = (8, 8, 8), batch: int = 1, **changes: Any) -> Plan:
    """A plan whose network has three levels and four channels."""
    values = {
        "classes": classes,
        "spacing": (1.0, 1.0, 1.0),
        "registration_spacing": 1.0,
        "patch": patch,
        "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
        "kernels": ((3, 3, 3),) * 3,
        "filters": (4, 8, 8),
        "batch": batch,
        "intensity": IntensityPlan(scheme="per_case", low=0.5, high=99.5),
        "precision": "32-true",
        "reasons": (),
    }
    return Plan(**{**values, **changes})


def tiny_config(**changes: Any) -> TrainingConfig:
    values = {"rounds": 1, "iterations": 6, "filters": 4, "patch_voxels": 4096, "device": "cpu", "precision": "32-true"}
    return TrainingConfig(**{**values, "threads": 1, "test_time_passes": 1, **changes})


def random_patches(count: int, classes: int, seed: int, side: int = 8) -> Patches:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn((count, 1, side, side, side), generator=generator)
    label = torch.randint(0, classes, (count, side, side, side), generator=generator)
    target = torch.nn.functional.one_hot(label, classes).permute(0, 4, 1, 2, 3).float()
    return Patches(image, target, torch.ones(count, 1, side, side, side))


def random_batch(iteration: int, rank: int = 0, classes: int = 3) -> Batch:
    seed = 100 * iteration + rank
    return Batch(random_patches(1, classes, seed), random_patches(1, classes, seed + 50))


def pseudo_generators(count: int, seed: int = 0) -> Generators:
    """Sources of noise of a batch of pseudo-labelled samples alone."""
    return generators_of(torch.Generator().manual_seed(seed), range(count), 0, torch.device("cpu"))


def identity_deformation(geometry: Geometry, **changes: Any) -> Deformation:
    zero = torch.zeros(3, *geometry.shape)
    values = {
        "geometry": geometry,
        "start": np.eye(4),
        "forward": zero,
        "backward": zero.clone(),
        "residual": 0.1,
        "round_trip": torch.zeros(geometry.shape),
        "folded": 0.0,
        "overlap": 1.0,
    }
    return Deformation(**{**values, **changes})


class Recorder:
    """An observer that remembers events, and asks to stop after it was asked `stop_after` times."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.stop_after = stop_after
        self.asked = 0

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def should_stop(self) -> bool:
        self.asked += 1
        return self.stop_after is not None and self.asked >= self.stop_after
