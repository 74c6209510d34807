"""What a further scan costs: the main job on 10, 40 and 160 phantoms, and a straight line through the times.

    python Testing/benchmarks/many_scans.py --folder FOLDER

Two short rounds, with the refinement between them: the length of a training does not depend on the number of scans.
Rows that are in the folder are not measured again.
"""

from __future__ import annotations

import argparse
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
from cohorts import wait
from common import keep, machine, measured_once
from one_label import new_project

from SemiSAMO1Lib.job import start
from SemiSAMO1Lib.phantoms import write_cohort
from SemiSAMO1Lib.project.training import request_training

PARAMETERS = {"preset": "quick", "rounds": 2, "iterations": 20}


def measured(folder: Path, count: int) -> dict[str, float]:
    """Seconds of import and training of `count` scans, peak memory of the training's worker."""
    names = write_cohort(folder / "scans", count)
    began = time.monotonic()
    project = new_project(folder / "project", folder / "scans" / "images")
    imported = time.monotonic() - began
    project.add_label(names[0], folder / "scans" / "labels" / f"{names[0]}.nrrd")
    job, began = request_training(project, PARAMETERS), time.monotonic()
    start(job)
    peak = wait(job) / 2**30
    row = {"import_s": imported, "training_s": time.monotonic() - began, "peak_GiB": peak}
    shutil.rmtree(folder / "project")
    shutil.rmtree(folder / "scans")
    return {key: round(value, 2) for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=(10, 40, 160))
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    found = {}
    for count in options.counts:
        kept = options.folder / f"{count}.json"
        found[count] = measured_once(kept, PARAMETERS, partial(measured, options.folder, count))
        keep({"benchmark": "many_scans", "scans": count, **found[count], **machine()}, options.rows)
    counts = np.array(list(found), float)
    for what in ("import_s", "training_s"):
        seconds = np.array([one[what] for one in found.values()])
        slope, fixed = np.polyfit(counts, seconds, 1)
        off = np.abs(fixed + slope * counts - seconds) / seconds
        print(f"{what}: {fixed:.1f} s + {slope:.2f} s a scan; the line is off by at most {off.max():.0%}")


if __name__ == "__main__":
    main()
