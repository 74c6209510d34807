"""Small projects and real workers for the tests of the background job."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from SemiSAMO1Lib import files
from SemiSAMO1Lib.job import JobFolder, JobKind, Observed, observe, start
from SemiSAMO1Lib.phantoms import PhantomSettings, write_cohort
from SemiSAMO1Lib.project import Project
from SemiSAMO1Lib.project.importing import Found, candidates, look
from SemiSAMO1Lib.project.training import request_training

#: Voxels so large that a whole training takes two seconds.
SMALL = PhantomSettings(spacing_mm=(4.5, 4.0, 4.0))

#: The training of these tests; longer when it is to be killed more often (see test_kill_and_resume.py).
ITERATIONS = 8 if int(os.environ.get("SEMISAMO1_KILLS", "3")) <= 3 else 300

PARAMETERS: dict[str, Any] = {
    "preset": "quick",
    "rounds": 2,
    "iterations": ITERATIONS,
    "patch_voxels": 4096,
    "filters": 4,
    "checkpoint_seconds": 0,
    "device": "cpu",
}


def make_project(folder: Path, count: int = 4) -> tuple[Project, list[str]]:
    """A project of phantoms in `folder`/project, nothing labelled; the truth is in `folder`/cohort/labels."""
    names = write_cohort(folder / "cohort", count, settings=SMALL)
    project = Project.create(folder / "project")
    for candidate in candidates(folder / "cohort" / "images", project.folder):
        found = look(candidate)
        assert isinstance(found, Found), f"every phantom should become a case, got {found}"
        project.add(found)
    return project, names


def truth_of(project: Project, name: str) -> Path:
    return project.folder.parent / "cohort" / "labels" / f"{name}.nrrd"


def image_of(project: Project, name: str) -> Path:
    return project.folder.parent / "cohort" / "images" / f"{name}.nrrd"


def make_training(project: Project, **changes: Any) -> JobFolder:
    """A training that nobody has started, with one thread."""
    job = request_training(project, {**PARAMETERS, **changes})
    return one_thread(job)


def one_thread(job: JobFolder) -> JobFolder:
    files.write_json(job.path / "job.json", {**job.spec(), "threads": 1})
    return job


def labelled_project(folder: Path, count: int = 4) -> tuple[Project, list[str]]:
    """A project whose first case is the template."""
    project, names = make_project(folder, count)
    project.add_label(names[0], truth_of(project, names[0]))
    return project, names


def empty_job(folder: Path, kind: JobKind = JobKind.TRAIN) -> JobFolder:
    """A job folder with a job.json and nothing else."""
    return JobFolder.create(folder / "jobs", kind, {}, [])


def wait_until(happened: Callable[[], bool], what: str, patience_s: float = 90) -> None:
    """Wait for something; a test that waits in vain says what for."""
    deadline = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s in vain until {what}"
        time.sleep(0.02)


def wait_for_end(job: JobFolder, patience_s: float = 90) -> Observed:
    """Wait until a job is not active any more."""
    wait_until(lambda: not observe(job).state.active, f"{job.id} ended", patience_s)
    return observe(job)


def run_to_end(job: JobFolder) -> Observed:
    """Start a worker and wait for its end."""
    start(job)
    return wait_for_end(job)


def events_of(job: JobFolder, kind: str | None = None) -> list[dict[str, Any]]:
    events, _ = files.read_lines(job.events)
    return [event for event in events if kind in (None, event["kind"])]
