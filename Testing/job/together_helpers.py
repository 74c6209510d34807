"""Several processes of the shell that train together on one machine (gloo)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from job_helpers import labelled_project, truth_of

from SemiSAMO1Lib.job import JobFolder

ROOT = Path(__file__).resolve().parents[2]

#: Who votes is a choice between cases: with this seed no two of them are nearly alike, so rounding decides nothing.
#: Grey values change a class or leave it as it is, by a limit; after so few iterations that is often near.
TINY = {
    "seed": 1,
    "edge_weight": 0.0,
    "patch_voxels": 4096,
    "filters": 4,
    "device": "cpu",
    "precision": "32-true",
    "batch": 6,
    "labelled_batch": 6,
    "rounds": 2,
    "iterations": 12,
}

#: Where a process' children can be found.
HAS_PROC = Path("/proc/self/task").is_dir()


def together(count: int, *words: object) -> list[str]:
    """The command that starts `count` processes of the shell, as docs/scaling.md has it."""
    run = [sys.executable, "-m"]
    if count > 1:
        run += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    return [*run, "SemiSAMO1Lib.cli", *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def done(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)


def new_project(folder: Path) -> Path:
    """Five phantoms, the first and the last of them labelled."""
    project, names = labelled_project(folder, 5)
    project.add_label(names[-1], truth_of(project, names[-1]))
    return project.folder


def training_of(project: Path) -> JobFolder:
    """The first job of a project, which is its training."""
    return JobFolder(project / "jobs" / "0001-train")


def children(pid: int) -> list[int]:
    """Processes that one started (Linux)."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for one in found]
