"""A training that ran on another computer: the shell says how it is taken over, and does not do it unasked."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from shell_runner import shell

from SemiSAMO1Lib import files, lock
from SemiSAMO1Lib.job import JobFolder, JobKind
from SemiSAMO1Lib.project import Project


@pytest.mark.parametrize(("state", "age_s"), [("interrupted", 0), ("running", 3600)])
def test_resume_names_the_computer_and_the_option(tmp_path: Path, state: str, age_s: float) -> None:
    """Also where an older training failed here: the silent one is the newest, and it is what the person means."""
    project = Project.create(tmp_path / "study")
    older = JobFolder.create(project.jobs, JobKind.TRAIN, {}, [])
    files.write_json(older.status, {**lock.identity(), "state": "failed", "heartbeat": time.time()})
    job = JobFolder.create(project.jobs, JobKind.TRAIN, {}, [])
    gone = {**lock.identity(), "host": "elsewhere", "state": state, "heartbeat": time.time() - age_s}
    files.write_json(job.status, gone)
    shown = shell("resume", project.folder)
    assert shown.code != 0 and f"{job.id} ran on elsewhere" in shown.text and "--elsewhere" in shown.text
    assert files.read_json(job.status) == gone, "it was taken over unasked"
