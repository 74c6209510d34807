"""Where a registration may start from: translations that bring two scans together, an affine step on top of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray

from ...image_io import to_sitk
from ...volume import Volume
from .descriptors import Described, Features, pool

#: A start under which less than this share of the smaller scan meets the other is not considered.
SMALLEST_OVERLAP = 0.5

#: Affine transforms that stretch or shrink volume by more than this factor are thrown away as failures.
LARGEST_STRETCH = 4.0


@dataclass(frozen=True)
class Start:
    """A 4×4 transform from the case to the template, points (x, y, z) in mm."""

    name: str
    matrix: NDArray[np.float64]


def translations(case: Described, template: Described) -> list[Start]:
    """Centre of grid, centre of intensity mass and the best exhaustive translation; near equals only once."""
    centre = template.image.geometry.centre - case.image.geometry.centre
    mass = _mass_centre(template) - _mass_centre(case)
    shifts = [("centre", centre), ("mass", mass), ("search", exhaustive_translation(case, template))]
    step = case.coarse.geometry.spacing[0]
    near = 0.04 * float(np.prod(case.image.geometry.extent)) ** (1 / 3) + step
    starts: list[Start] = []
    for name, shift in shifts:
        if shift is None:
            continue
        matrix = np.eye(4)
        matrix[:3, 3] = shift
        if all(np.linalg.norm(matrix[:3, 3] - other.matrix[:3, 3]) > near for other in starts):
            starts.append(Start(name, matrix))
    return starts


def exhaustive_translation(case: Described, template: Described) -> NDArray[np.float64] | None:
    """The translation (x, y, z) mm with the smallest mean difference of coarse descriptors, all of them tried.

    Only those under which at least half of the smaller scan's data meets the other's; None when there is none.
    """
    extent = float(np.prod(case.coarse.geometry.extent)) ** (1 / 3)
    stride = max(1, round(0.05 * extent / case.coarse.geometry.spacing[0]))
    here, there = pool(case.coarse.in_float32(), stride), pool(template.coarse.in_float32(), stride)
    found = best_translation(here, there, SMALLEST_OVERLAP * min(float(here.weight.sum()), float(there.weight.sum())))
    return None if found is None else found[0]


def best_translation(
    here: Features, there: Features, enough: float = 0.0, of_most: float = 0.0
) -> tuple[NDArray[np.float64], float] | None:
    """The translation (x, y, z) mm from one grid to the other with the smallest mean difference of descriptors.

    Args:
        here, there: float32, on axis-parallel grids of the same spacing.
        enough: the sum of products of both weights that a translation must reach to be considered.
        of_most: the share that it must reach of the largest such sum.

    Returns:
        the translation and its cost (squared difference, summed over channels, mean over places); None when none
        reaches it.
    """
    shape = [a + b - 1 for a, b in zip(here.geometry.shape, there.geometry.shape, strict=True)]

    def correlate(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """sum_x a(x) b(x + d) for every d, summed over channels; index d modulo the shape."""
        spectrum = torch.fft.rfftn(a, shape, dim=(-3, -2, -1)).conj() * torch.fft.rfftn(b, shape, dim=(-3, -2, -1))
        return torch.fft.irfftn(spectrum.sum(0), shape, dim=(-3, -2, -1))

    wa, wb = here.weight[None], there.weight[None]
    overlap = correlate(wa, wb)
    energy = correlate(here.values.square().sum(0, keepdim=True) * wa, wb)
    energy += correlate(wa, there.values.square().sum(0, keepdim=True) * wb)
    energy -= 2 * correlate(here.values * wa, there.values * wb)
    enough = max(enough, of_most * float(overlap.max()), 1e-3)
    cost = torch.where(overlap >= enough, energy / overlap.clamp(min=1e-3), torch.inf)
    best = int(cost.argmin())
    least = float(cost.flatten()[best])
    if not math.isfinite(least):
        return None
    index = np.array(np.unravel_index(best, shape))
    shift = np.where(index >= there.geometry.shape, index - shape, index)
    origin = np.array(there.geometry.origin) - np.array(here.geometry.origin)
    return np.asarray(origin + shift[::-1] * here.geometry.spacing[0]), least


def affines(case: Described, template: Described, starts: Sequence[Start], seed: int) -> list[Start]:
    """Refine starts to 12 degrees of freedom by Mattes mutual information at three resolutions; those that fail are
    left out.

    Each by one thread and a seeded sample of voxels, so that the same scans give the same transforms.
    """
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # smoothing inside the method obeys this number only
    try:
        with ThreadPoolExecutor(max(1, min(len(starts), torch.get_num_threads())), "affine") as side_by_side:
            found = list(side_by_side.map(lambda start: _affine(case, template, start, seed), starts))
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    return [one for one in found if one is not None]


def _affine(case: Described, template: Described, start: Start, seed: int) -> Start | None:
    fixed, moving = _image(case.image), _image(template.image)
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricFixedMask(_mask(case))
    method.SetMetricMovingMask(_mask(template))
    method.SetMetricSamplingStrategy(method.RANDOM)
    voxels = case.image.geometry.voxels
    # seed + 1: SimpleITK takes a seed of 0 (sitkWallClock) as "another one every time"
    shrinks = [s for s in (4, 2, 1) if min(case.image.geometry.shape) >= 8 * s] or [1]
    method.SetMetricSamplingPercentagePerLevel([min(1.0, max(0.02, 12_000 * s**3 / voxels)) for s in shrinks], seed + 1)
    method.SetShrinkFactorsPerLevel(shrinks)
    method.SetSmoothingSigmasPerLevel([s / 2 for s in shrinks])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=0.02, numberOfIterations=60, relaxationFactor=0.6, gradientMagnitudeTolerance=1e-5
    )
    method.SetOptimizerScalesFromPhysicalShift()
    transform = sitk.AffineTransform(3)
    transform.SetCenter([float(v) for v in case.image.geometry.centre])
    transform.SetTranslation([float(v) for v in start.matrix[:3, 3]])
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(fixed, moving)
    except RuntimeError:  # "all samples map outside": this start has no affine version
        return None
    turn = np.reshape(transform.GetMatrix(), (3, 3))
    centre = np.array(transform.GetCenter())
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = centre + np.array(transform.GetTranslation()) - turn @ centre
    volume = float(np.linalg.det(turn))
    if not np.isfinite(matrix).all() or not 1 / LARGEST_STRETCH < volume < LARGEST_STRETCH:
        return None
    return Start(f"{start.name}+affine", matrix)


def _mass_centre(scan: Described) -> NDArray[np.float64]:
    weight = scan.weight.cpu().numpy()
    data = scan.image.array
    low = float(data[weight > 0.5].min()) if (weight > 0.5).any() else 0.0
    mass = (data - low) * weight
    total = float(mass.sum())
    if total <= 0:
        return scan.image.geometry.centre
    index = [
        float((mass.sum(tuple(a for a in range(3) if a != axis)) * np.arange(mass.shape[axis])).sum()) / total
        for axis in (2, 1, 0)
    ]
    return np.asarray((scan.image.geometry.index_to_space @ np.array([*index, 1.0]))[:3])


def _image(volume: Volume) -> sitk.Image:
    return to_sitk(Volume(volume.array.astype(np.float32), volume.geometry))


def _mask(scan: Described) -> sitk.Image:
    return to_sitk(Volume((scan.weight.cpu().numpy() > 0.5).astype(np.uint8), scan.image.geometry))
