"""The job folder: numbers, job.json, the log's tail."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from job_helpers import empty_job

from SemiSAMO1Lib import files
from SemiSAMO1Lib.job import JobFolder, JobKind
from SemiSAMO1Lib.job.watch import all_jobs, trainings


def test_jobs_are_numbered_across_kinds(tmp_path: Path) -> None:
    made = [empty_job(tmp_path, kind).id for kind in (JobKind.IMPORT, JobKind.TRAIN, JobKind.REPORT)]
    assert made == ["0001-import", "0002-train", "0003-report"], "one counter for all kinds"


def test_a_removed_job_leaves_a_gap(tmp_path: Path) -> None:
    empty_job(tmp_path)
    middle = empty_job(tmp_path)
    empty_job(tmp_path)
    (middle.path / "job.json").unlink()
    middle.path.rmdir()
    assert empty_job(tmp_path).id == "0004-train", "numbers of removed jobs are not used again"


def test_many_jobs_at_once_get_different_numbers(tmp_path: Path) -> None:
    made: list[JobFolder] = []
    threads = [threading.Thread(target=lambda: made.append(empty_job(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job.id for job in made}) == 8, f"every job should have a folder of its own, got {made}"


def test_job_json_says_everything_that_a_run_needs(tmp_path: Path) -> None:
    labels = [{"value": 3, "name": "vessel", "color": [1, 2, 3], "terminology": None}]
    job = JobFolder.create(tmp_path / "jobs", JobKind.TRAIN, {"seed": 7}, labels)
    spec = job.spec()
    expected = {"schema": 1, "id": job.id, "kind": "train", "parameters": {"seed": 7}, "labels": labels}
    assert {key: spec[key] for key in expected} == expected


def test_job_json_fixes_threads_and_determinism(tmp_path: Path) -> None:
    spec = empty_job(tmp_path).spec()
    assert spec["threads"] >= 1 and spec["deterministic"] is True, f"a resumed run needs both, got {spec}"


def test_a_job_of_a_newer_program_is_refused_with_both_versions(tmp_path: Path) -> None:
    job = empty_job(tmp_path)
    files.write_json(job.path / "job.json", {**job.spec(), "schema": 99})
    with pytest.raises(ValueError, match=r"schema 99, this program knows 1"):
        job.spec()


def test_a_damaged_job_json_is_named(tmp_path: Path) -> None:
    job = empty_job(tmp_path)
    (job.path / "job.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"job\.json is not valid JSON"):
        job.spec()


def test_the_log_tail_is_the_last_lines(tmp_path: Path) -> None:
    job = empty_job(tmp_path)
    job.log.write_text("\n".join(f"line {n}" for n in range(10_000)), encoding="utf-8")
    assert job.log_tail(3) == "line 9997\nline 9998\nline 9999"


def test_the_log_tail_of_no_log_is_empty(tmp_path: Path) -> None:
    assert empty_job(tmp_path).log_tail() == ""


def test_the_log_tail_survives_bytes_that_are_not_text(tmp_path: Path) -> None:
    job = empty_job(tmp_path)
    job.log.write_bytes(b"\xff\xfe broken\nlast")
    assert job.log_tail(1) == "last"


def test_the_project_is_two_folders_up(tmp_path: Path) -> None:
    assert empty_job(tmp_path).project == tmp_path


def test_folders_without_job_json_are_no_jobs(tmp_path: Path) -> None:
    job = empty_job(tmp_path)
    (tmp_path / "jobs" / "0002-train").mkdir()
    assert all_jobs(tmp_path / "jobs") == [job]


def test_a_project_without_jobs_has_none(tmp_path: Path) -> None:
    assert all_jobs(tmp_path / "jobs") == []


def test_the_trainings_are_the_jobs_of_that_kind_oldest_first(tmp_path: Path) -> None:
    first, second = empty_job(tmp_path), empty_job(tmp_path)
    empty_job(tmp_path, JobKind.IMPORT)
    assert trainings(tmp_path / "jobs") == [first, second]
