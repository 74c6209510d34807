"""Scans as scanners give them: does it matter that the left atrium's files are cropped around their label?

    python Testing/benchmarks/whole_scan.py --folder FOLDER --cases 20

Each scan is put into a larger field of view: turned by up to 15°, scaled by up to 10 %, somewhere in a box that is 1.3
to 1.7 times as large along each axis, each scan by another draw. Around it its own texture goes on: the smooth part of
its border, and noise with the spectrum of its fine structure. Template and cases are treated alike; both cohorts are
segmented by the same preset, and scored on their own grids; the difference is paired by case.
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from cohorts import wait
from common import keep, machine, measured_once, reference_of, scans
from numpy.typing import NDArray
from one_label import Scores, by_case, name_of, new_project, scored
from scipy import ndimage
from scipy.spatial.transform import Rotation

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.evaluation.paired import paired_difference
from SemiSAMO1Lib.image_io import read_volume, write_volume
from SemiSAMO1Lib.job import start
from SemiSAMO1Lib.project.training import request_training
from SemiSAMO1Lib.volume import Geometry, Volume

#: Voxels over which the border of a scan is smoothed before it goes on.
SMOOTH = 6.0

#: Largest loss of mean Dice that is asked for.
ALLOWED = 0.03


def texture(array: NDArray[np.float32], shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.float32]:
    """Noise with the spectrum of a scan's fine structure, of another shape."""
    fine = array - ndimage.gaussian_filter(array, SMOOTH)
    grown = np.zeros(shape, np.float32)
    grown[tuple(slice(0, n) for n in fine.shape)] = fine
    spectrum = np.abs(np.fft.rfftn(grown)) * np.sqrt(np.prod(shape) / fine.size)
    phases = np.fft.rfftn(generator.normal(size=shape))
    made = np.fft.irfftn(spectrum * phases / np.maximum(np.abs(phases), 1e-9), s=shape, axes=(0, 1, 2))
    return np.asarray(made, np.float32)


def embedded(image: Volume, label: Volume, generator: np.random.Generator) -> tuple[Volume, Volume]:
    """A scan and its label in a larger field of view; label values are kept."""
    z, y, x = (int(n * generator.uniform(1.3, 1.7)) for n in image.array.shape)
    shape = (z, y, x)
    spacing = np.array(image.geometry.spacing)
    turn = Rotation.from_euler("zyx", generator.uniform(-15, 15, 3), degrees=True).as_matrix()
    matrix = turn / generator.uniform(0.9, 1.1)  # from the large box to the scan, (z, y, x) mm
    index = np.diag(1 / spacing) @ matrix @ np.diag(spacing)
    room = (np.array(shape) - np.array(image.array.shape)) / 2
    centre = (np.array(shape) - 1) / 2 + generator.uniform(-0.8, 0.8, 3) * room
    offset = (np.array(image.array.shape) - 1) / 2 - index @ centre
    array = image.array.astype(np.float32)

    def moved(values: NDArray[Any], order: Literal[0, 1], mode: Literal["nearest", "constant"]) -> NDArray[Any]:
        found: NDArray[Any] = ndimage.affine_transform(values, index, offset, shape, order=order, mode=mode)
        return found

    there = moved(np.ones_like(array), 1, "constant")
    around = moved(ndimage.gaussian_filter(array, SMOOTH, mode="nearest"), 1, "nearest")
    around = around + texture(array, shape, generator)
    whole = there * moved(array, 1, "nearest") + (1 - there) * around
    grid = Geometry(shape, image.geometry.spacing)
    values = moved(label.array.astype(np.uint8), 0, "constant")
    return Volume(np.clip(whole, array.min(), array.max()).astype(np.float32), grid), Volume(values, grid)


def segmented(place: Path, images: Path, labels: dict[str, Path], template: str, preset: str) -> dict[str, Scores]:
    """The main job: `scores` of its cases."""
    project = new_project(place / "project", images)
    project.add_label(template, labels[template])
    job = request_training(project, {"preset": preset, "seed": 0})
    start(job)
    wait(job)
    rows = files.read_json(job.index)["cases"]
    made = {row["case"]: job.results / row["prediction"] for row in rows}
    return {"scores": scored(made, {case: labels[case] for case in made})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=20, help="scans, the template included: the first by name")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    chosen = scans("left_atrium", options.cases)
    scores, commits = {}, {}
    for kind in ("cropped", "whole"):
        place = options.folder / kind
        labels = {name_of(scan): reference_of(scan) for scan in chosen}
        for number, scan in enumerate(chosen):
            (place / "images").mkdir(parents=True, exist_ok=True)
            target = place / "images" / f"{name_of(scan)}.nrrd"
            if kind == "cropped":
                target = target.with_suffix("").with_suffix(".nii.gz")
                if not target.exists():
                    shutil.copyfile(scan, target)
                continue
            labels[name_of(scan)] = place / "labels" / target.name
            if not target.exists():
                pair = read_volume(scan), read_volume(reference_of(scan))
                image, label = embedded(*pair, np.random.default_rng([0, number]))
                write_volume(labels[name_of(scan)], label)
                write_volume(target, image)
        given = (place, place / "images", labels, name_of(chosen[0]), options.preset)
        settings = {"preset": options.preset, "cases": options.cases}
        found = measured_once(place / "scores.json", settings, partial(segmented, *given))
        scores[kind], commits[kind] = found["scores"], found["commit"]
    if len(set(commits.values())) > 1:
        print(f"the halves are of different code: {commits}", flush=True)
    lost = paired_difference(by_case(scores["cropped"]), by_case(scores["whole"]))
    keep(
        {
            "benchmark": "whole_scan",
            "commits": commits,
            "preset": options.preset,
            "cases": lost.cases,
            **{kind: round(float(np.mean(list(by_case(one).values()))), 4) for kind, one in scores.items()},
            "lost": [round(value, 4) for value in (lost.mean, lost.low, lost.high)],
            "asked_for": ALLOWED,
            **machine(),
        },
        options.rows,
    )


if __name__ == "__main__":
    main()
