"""Registration against convexAdam 0.2.0 with its defaults: both get the same prepared pair, float32, same threads.

    python -m pip install --no-deps convexAdam==0.2.0 nibabel scikit-learn
    python Testing/benchmarks/registration.py hippocampus left_atrium --cases 20

Pairs: the first scan of a cohort is the template. A pair is both scans on one isotropic grid of the case (left atrium
at 1.25 mm, hippocampus at 1 mm), the template placed with its centre on the case's centre. Rows: convexAdam; ours with
one start; ours with all starts and fusion; convexAdam after our affine step. Times are of registration with its
descriptors, both directions for ours; Dice is on the pair's grid.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import keep, machine, pool_of, reference_of
from numpy.typing import NDArray

from SemiSAMO1Lib.engine.cases import LabelledCase
from SemiSAMO1Lib.engine.data.grids import patient_aligned, resample_image, resample_labels, sample, space_points
from SemiSAMO1Lib.engine.propagation.deformable import Settings, register
from SemiSAMO1Lib.engine.propagation.descriptors import describe
from SemiSAMO1Lib.engine.propagation.registration import FINEST_BELOW, RegistrationPropagator
from SemiSAMO1Lib.engine.propagation.starts import affines, translations
from SemiSAMO1Lib.image_io import read_volume
from SemiSAMO1Lib.volume import Geometry, Volume

SPACING = {"hippocampus": 1.0, "left_atrium": 1.25}
CPU = torch.device("cpu")


def prepared_pair(
    template: Path, case: Path, spacing: float, whole: bool = False
) -> tuple[Volume, Volume, Volume, Volume]:
    """(template, its label, case, its label), all on the case's isotropic grid; centres of the scans coincide.

    `whole`: the grid is made as large as the template where that is larger.
    """
    fixed, moving = read_volume(case), read_volume(template)
    grid = patient_aligned(fixed.geometry, spacing)
    if whole:
        grid = _as_large_as(grid, patient_aligned(moving.geometry, spacing).shape)
    shift = moving.geometry.centre - fixed.geometry.centre
    x, y, z = (float(v) for v in np.array(grid.origin) + shift)
    there = Geometry(grid.shape, grid.spacing, (x, y, z), grid.direction)
    pair = [Volume(resample_image(moving, there), grid), Volume(_labels(template, there), grid)]
    pair += [Volume(resample_image(fixed, grid), grid), Volume(_labels(case, grid), grid)]
    return pair[0], pair[1], pair[2], pair[3]


def _as_large_as(grid: Geometry, shape: tuple[int, int, int]) -> Geometry:
    """The grid with as many voxels more on both sides of each axis as it needs."""
    z, y, x = (max(0, -(-(there - here) // 2)) for here, there in zip(grid.shape, shape, strict=True))
    larger = (grid.shape[0] + 2 * z, grid.shape[1] + 2 * y, grid.shape[2] + 2 * x)
    corner = grid.index_to_space @ np.array([-x, -y, -z, 1.0])
    return Geometry(larger, grid.spacing, (float(corner[0]), float(corner[1]), float(corner[2])), grid.direction)


def _labels(scan: Path, grid: Geometry) -> NDArray[Any]:
    return np.asarray(resample_labels(read_volume(reference_of(scan)), grid))


def mean_dice(prediction: NDArray[Any], reference: NDArray[Any]) -> float:
    values = [v for v in np.unique(reference) if v]
    return float(
        np.mean(
            [
                2 * ((prediction == v) & (reference == v)).sum() / ((prediction == v).sum() + (reference == v).sum())
                for v in values
            ]
        )
    )


def by_convex_adam(fixed: Volume, moving: NDArray[Any]) -> NDArray[Any]:
    """convexAdam's displacement, with its defaults; both arrays on one grid."""
    from convexAdam.convex_adam_MIND import convex_adam_pt

    with contextlib.redirect_stdout(io.StringIO()):
        found: NDArray[Any] = convex_adam_pt(fixed.array, moving, dtype=torch.float32, device=CPU)
    return found


def convex_adam(fixed: Volume, moving: NDArray[Any], label: NDArray[Any], classes: int) -> tuple[NDArray[Any], float]:
    from convexAdam.apply_convex import apply_convex

    began = time.perf_counter()
    displacement = by_convex_adam(fixed, moving)
    seconds = time.perf_counter() - began
    warped = [apply_convex(displacement, (label == c).astype(np.float32)) for c in range(classes)]
    return np.stack(warped).argmax(0), seconds


def ours_one_start(fixed: Volume, moving: Volume, label: Volume, classes: int) -> tuple[NDArray[Any], float]:
    began = time.perf_counter()
    with torch.no_grad():
        spacing = fixed.geometry.spacing[0]
        finest = fixed.geometry.voxels < FINEST_BELOW
        case, template = (describe(v, spacing, CPU, finest) for v in (fixed, moving))
        found = register(case, template, np.eye(4), Settings())
    seconds = time.perf_counter() - began
    one_hot = torch.from_numpy(np.stack([label.array == c for c in range(classes)])).float()
    points = found.to_template(space_points(fixed.geometry))
    return sample(one_hot, label.geometry, points).argmax(0).numpy(), seconds


def ours_all_starts(fixed: Volume, moving: Volume, label: Volume, classes: int) -> tuple[NDArray[Any], float]:
    began = time.perf_counter()
    propagator = RegistrationPropagator(fixed.geometry.spacing[0], classes, CPU)
    prepared = propagator.prepare([LabelledCase("template", moving, label)])
    found = propagator.propagate(prepared, fixed, fixed.geometry)
    return found.probabilities.argmax(0).numpy(), time.perf_counter() - began


def convex_adam_after_affine(fixed: Volume, moving: Volume, label: Volume, classes: int) -> tuple[NDArray[Any], float]:
    began = time.perf_counter()
    case, template = (describe(v, fixed.geometry.spacing[0], CPU, False) for v in (fixed, moving))
    found = affines(case, template, translations(case, template)[:1], 0)
    points = space_points(fixed.geometry)
    if found:
        matrix = torch.from_numpy(found[0].matrix).float()
        points = (matrix[:3, :3] @ points.reshape(3, -1) + matrix[:3, 3:]).reshape(points.shape)
    image = sample(torch.from_numpy(moving.array)[None], moving.geometry, points)[0].numpy()
    one_hot = torch.from_numpy(np.stack([label.array == c for c in range(classes)])).float()
    moved_label = sample(one_hot, label.geometry, points).argmax(0).numpy()
    spent = time.perf_counter() - began
    prediction, seconds = convex_adam(fixed, image, moved_label, classes)
    return prediction, spent + seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohorts", nargs="+", choices=sorted(SPACING))
    parser.add_argument("--cases", type=int, default=20, help="scans of the pool after the template")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for cohort in options.cohorts:
        template, *others = pool_of(cohort)
        others = others[:: max(1, len(others) // options.cases)][: options.cases]
        figures: dict[str, list[tuple[float, float]]] = {}
        for case in others:
            moving, label, fixed, truth = prepared_pair(template, case, SPACING[cohort])
            classes = int(label.array.max()) + 1
            for name, (prediction, seconds) in (
                ("convexAdam 0.2.0", convex_adam(fixed, moving.array, label.array, classes)),
                ("ours, one start", ours_one_start(fixed, moving, label, classes)),
                ("ours, all starts, fused", ours_all_starts(fixed, moving, label, classes)),
                ("convexAdam after our affine", convex_adam_after_affine(fixed, moving, label, classes)),
            ):
                figures.setdefault(name, []).append((mean_dice(prediction, truth.array), seconds))
        base = float(np.median([s for _, s in figures["convexAdam 0.2.0"]]))
        for name, values in figures.items():
            dice, seconds = np.array(values).T
            keep(
                {
                    "benchmark": "registration",
                    "cohort": cohort,
                    "method": name,
                    "cases": len(values),
                    "mean_dice": round(float(dice.mean()), 4),
                    "worst_dice": round(float(dice.min()), 4),
                    "median_s": round(float(np.median(seconds)), 3),
                    "times_faster": round(base / float(np.median(seconds)), 2),
                    **machine(),
                },
                options.rows,
            )


if __name__ == "__main__":
    main()
