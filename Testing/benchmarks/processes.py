"""What further processes gain: the main job by one process, by two, and so on, each with one thread.

    python Testing/benchmarks/processes.py --folder FOLDER --counts 1 2

Phantoms, one short round; the batch is that of the largest count in all, so the same work is done. Efficiency is the
time of one process over that of n, over n. More processes than free cores measure nothing. Rows that are in the folder
are not measured again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from common import keep, machine, measured_once
from one_label import new_project

from SemiSAMO1Lib import files
from SemiSAMO1Lib.job import JobFolder
from SemiSAMO1Lib.job.launcher import ALLOCATOR, WAITING
from SemiSAMO1Lib.phantoms import write_cohort

#: Parts of a training, and the stages that each is made of.
PARTS = {
    "propagation": ("finding the label", "finding it again", "propagation", "detours"),
    "links": ("links",),
    "training": ("training 1", "volumes 1"),
    "prediction and answers": ("answer 0", "prediction 1", "votes 1", "answer 1"),
    "signals": ("signals 0", "signals 1"),
    "results (the first alone)": ("results 0", "results 1"),
}


def seconds_by_stage(job: JobFolder) -> dict[str, float]:
    """An event says that something of its stage is done: the time since the event before is that stage's."""
    found: dict[str, float] = {}
    before: float | None = None
    for event in files.read_lines(job.events)[0]:
        if event["kind"] == "progress" and before is not None:
            found[event["stage"]] = found.get(event["stage"], 0.0) + event["time"] - before
        if event["kind"] in ("progress", "handshake"):
            before = event["time"]
    return found


def measured(folder: Path, count: int, settings: dict[str, object], scans: int) -> dict[str, float]:
    """Seconds of each part by `count` processes."""
    shutil.rmtree(folder / "scans", ignore_errors=True)
    names = write_cohort(folder / "scans", scans)
    project = new_project(folder / "project", folder / "scans" / "images")
    project.add_label(names[0], folder / "scans" / "labels" / f"{names[0]}.nrrd")
    files.write_json(folder / "config.json", settings)
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m", "SemiSAMO1Lib.cli"]
    words = ["train", str(project.folder), "--config", str(folder / "config.json")]
    surroundings = {**os.environ, **ALLOCATOR, **WAITING, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *start, *words], env=surroundings, check=True)
    found = seconds_by_stage(JobFolder(project.jobs / "0002-train"))
    row = {part: sum(found.get(stage, 0.0) for stage in stages) for part, stages in PARTS.items()}
    row["all"] = sum(found.values())
    return {part: round(seconds, 1) for part, seconds in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--scans", type=int, default=13)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    most = max(options.counts)
    settings = {
        "preset": "quick",
        "rounds": 1,
        "iterations": options.iterations,
        "batch": most,
        "labelled_batch": most,
        "device": options.device,
        "threads": 1 if options.device == "cpu" else None,
    }
    found = {}
    for count in options.counts:
        given, kept = {**settings, "scans": options.scans}, options.folder / f"{count}.json"
        found[count] = measured_once(kept, given, partial(measured, options.folder, count, settings, options.scans))
        keep({"benchmark": "processes", "processes": count, **found[count], **machine()}, options.rows)
    alone = found[min(options.counts)]
    for count, row in found.items():
        parts = [part for part in (*PARTS, "all") if row[part]]
        shown = (f"{part} {alone[part] * min(options.counts) / (count * row[part]):.2f}" for part in parts)
        print(f"{count} processes, efficiency:", ", ".join(shown))


if __name__ == "__main__":
    main()
