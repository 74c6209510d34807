"""The whole main job on real scans, through project, job and worker, scored against references that it never saw.

    python Testing/benchmarks/cohorts.py hippocampus --cases 60 --preset standard
    python Testing/benchmarks/cohorts.py hippocampus --cases 20 --preset quick
    python Testing/benchmarks/cohorts.py left_atrium --cases 20 --preset quick

The template is the first scan by name. Only images are put into the project's scan folder. Every round and the
registration alone (round 0) are scored on the cases' own grids. Peak memory is the worker's.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import keep, machine, reference_of, scans

from SemiSAMO1Lib import files
from SemiSAMO1Lib.job import JobFolder, JobKind, observe, start
from SemiSAMO1Lib.project import Project
from SemiSAMO1Lib.project.training import request_training
from SemiSAMO1Lib.tasks.compare import compare


def wait(job: JobFolder) -> int:
    """Wait for a job; returns the worker's peak memory in bytes (Linux)."""
    peak = 0
    while (seen := observe(job)).state.active:
        if seen.pid is not None:
            peak = max(peak, _peak_memory(seen.pid))
        time.sleep(0.5)
    if seen.state != "finished":
        raise SystemExit(f"{job.id} {seen.state}: {seen.message}\n{job.log_tail()}")
    return peak


def _peak_memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", choices=("hippocampus", "left_atrium"))
    parser.add_argument("--cases", type=int, default=20, help="scans, the template included")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, help="JSON file with further parameters")
    parser.add_argument("--folder", type=Path, help="keep the project here")
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    chosen = scans(options.cohort, options.cases)
    for scan in chosen:
        (folder / "scans").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(scan, folder / "scans" / scan.name)
    project = Project.create(folder / "project")
    importing = JobFolder.create(project.jobs, JobKind.IMPORT, {"images": str(folder / "scans")}, [])
    start(importing)
    wait(importing)
    project.refresh()
    project.add_label(chosen[0].name.split(".")[0], reference_of(chosen[0]))
    extra = files.read_json(options.config) if options.config else {}
    parameters = {"preset": options.preset, "seed": options.seed, "keep_rounds": True, **extra}
    began = time.monotonic()
    job = request_training(project, parameters)
    start(job)
    peak = wait(job)
    minutes = (time.monotonic() - began) / 60
    keep(
        {
            "benchmark": "cohorts",
            "cohort": options.cohort,
            "scans": len(chosen),
            "preset": options.preset,
            "seed": options.seed,
            **extra,
            "rounds": rounds(job, chosen[1:]),
            "minutes": round(minutes, 2),
            "peak_GiB": round(peak / 2**30, 2),
            **machine(),
        },
        options.rows,
    )
    if options.folder is None:
        shutil.rmtree(folder)


def rounds(job: JobFolder, others: list[Path]) -> list[dict[str, Any]]:
    """Mean and worst Dice of every round."""
    found = []
    references = {scan.name.split(".")[0]: reference_of(scan) for scan in others}
    for number in range(files.read_json(job.index)["round"] + 1):
        predictions = {name: job.results / str(number) / name / "prediction.seg.nrrd" for name in references}
        measures = compare(predictions, references, distances=False)
        worst = float(np.min([row["mean_dice"] for row in measures["cases"]]))
        found.append({"round": number, "mean_dice": round(measures["mean_dice"], 4), "worst_dice": round(worst, 4)})
    return found


if __name__ == "__main__":
    main()
