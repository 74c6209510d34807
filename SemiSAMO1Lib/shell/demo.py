"""The main job on phantoms: eight scans, one of them labelled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..job import JobFolder, JobKind
from ..phantoms import write_cohort
from ..project import Project
from ..project.results import prediction_files
from ..project.training import request_training
from ..tasks.compare import compare, label_files
from ..tasks.report import write_report
from .console import run_job

#: Scans of the demo, the template included.
CASES = 8

#: What the demo trains with.
PARAMETERS = {"preset": "quick", "device": "auto", "seed": 0, "keep_rounds": True}


def run_demo(folder: Path, quiet: bool) -> dict[str, Any]:
    """Write phantoms, run a project on them, compare with their truth; an older demo in `folder` is replaced.

    Raises:
        FileExistsError: the folder holds something else.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "phantoms" / "images").is_dir():
        raise FileExistsError(f"{folder} is not empty; choose a new folder for the demo")
    for part in ("phantoms", "project"):
        shutil.rmtree(folder / part, ignore_errors=True)
    names = write_cohort(folder / "phantoms", CASES, seed=1)
    project = Project.create(folder / "project", "phantoms")
    importing = JobFolder.create(
        project.jobs, JobKind.IMPORT, {"images": str((folder / "phantoms/images").resolve())}, []
    )
    run_job(importing, quiet)
    references = folder / "phantoms" / "labels"
    project.refresh()
    project.add_label(names[0], references / f"{names[0]}.nrrd")
    job = request_training(project, PARAMETERS)
    run_job(job, quiet)
    measures = compare(prediction_files(project), label_files(references), distances=False)
    first = {row["case"]: job.results / "0" / row["case"] / "prediction.seg.nrrd" for row in measures["cases"]}
    registration = compare(first, label_files(references), distances=False)
    report = folder / "report.html"
    write_report(job, report, references)
    return {
        "cases": len(measures["cases"]),
        "mean_dice": measures["mean_dice"],
        "registration_dice": registration["mean_dice"],
        "report": str(report),
        "project": str(folder / "project"),
    }
