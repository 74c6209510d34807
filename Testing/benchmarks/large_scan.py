"""CTs of 512 × 512 × 600 voxels through the main job: import, registration, training, prediction, report, export.

    python Testing/benchmarks/large_scan.py

Phantoms made large, in HU. Peak memory is that of each job's worker (Linux); all must stay below 8 GiB. Files are
written first and not timed; the training is cut short, as its length does not change its memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from cohorts import wait
from common import keep, machine

from SemiSAMO1Lib.image_io import from_sitk, to_sitk, write_volume
from SemiSAMO1Lib.job import JobFolder, JobKind, start
from SemiSAMO1Lib.phantoms import PhantomSettings, make_phantom
from SemiSAMO1Lib.project import Project
from SemiSAMO1Lib.project.export import request_export, request_predictions
from SemiSAMO1Lib.project.training import request_training
from SemiSAMO1Lib.volume import Volume

#: Voxels (x, y, z) and their size, mm; most a worker may need, GiB.
SIZE, SPACING, ALLOWED_GIB = (512, 512, 600), (0.8, 0.8, 1.0), 8

#: Anatomy of the same field of view, a quarter as fine.
SMALL = PhantomSettings(
    extent_mm=(410.0, 410.0, 600.0), spacing_mm=(4.0, 3.2, 3.2), spacing_variation=0.0, oblique_degrees=0.0
)


def enlarged(volume: Volume, interpolator: int) -> Volume:
    """On the large grid, centred on the phantom."""
    small = to_sitk(volume)
    grid = sitk.Image(SIZE, small.GetPixelID())
    grid.SetSpacing(SPACING)
    grid.SetOrigin([float(c - (n - 1) / 2 * s) for c, n, s in zip(volume.geometry.centre, SIZE, SPACING, strict=True)])
    return from_sitk(sitk.Resample(small, grid, sitk.Transform(), interpolator, 0.0))


def write_scan(folder: Path, number: int) -> tuple[Path, Path]:
    """A CT and its label, files."""
    phantom = make_phantom(number, 0, SMALL)
    image = enlarged(Volume(phantom.image.array.astype(np.float32), phantom.image.geometry), sitk.sitkLinear)
    paths = folder / "scans" / f"{phantom.name}.nrrd", folder / "labels" / f"{phantom.name}.nrrd"
    hounsfield = (2 * image.array - 1000).clip(-1000, 1500).astype(np.int16)
    write_volume(paths[0], Volume(hounsfield, image.geometry), compress=False)
    write_volume(paths[1], enlarged(phantom.label, sitk.sitkNearestNeighbor))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--preset", default="standard")
    parser.add_argument("--cases", type=int, default=3, help="beside the template; from two on they vote on each other")
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (template, label), *_, (further, _) = (write_scan(folder, number) for number in range(options.cases + 2))
        (folder / "further").mkdir()
        further.rename(folder / "further" / further.name)
        project = Project.create(folder / "project")

        def measured(what: str, make: Callable[[], JobFolder]) -> None:
            job, began = make(), time.monotonic()
            start(job)
            peak = wait(job) / 2**30
            row: dict[str, Any] = {"benchmark": "large_scan", "what": what, "peak_GiB": round(peak, 2)}
            keep(
                {**row, "asked_GiB": ALLOWED_GIB, "seconds": round(time.monotonic() - began), **machine()}, options.rows
            )

        scans = {"images": str(folder / "scans")}
        measured("import", lambda: JobFolder.create(project.jobs, JobKind.IMPORT, scans, []))
        project.refresh()
        project.add_label(template.stem, label)
        parameters = {"preset": options.preset, "rounds": 1, "iterations": options.iterations}
        measured("training, prediction, report", lambda: request_training(project, parameters))
        project.refresh()
        measured("a further scan", lambda: request_predictions(project, folder / "further", folder / "applied"))
        measured("export", lambda: request_export(project, folder / "exported", "nrrd"))


if __name__ == "__main__":
    main()
