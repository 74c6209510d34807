"""Whole jobs in real workers: what a finished, a failed, a stopped and a refused one leave behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from job_helpers import (
    empty_job,
    events_of,
    image_of,
    labelled_project,
    make_project,
    make_training,
    run_to_end,
    truth_of,
    wait_for_end,
    wait_until,
)

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.cases import CaseResult
from SemiSAMO1Lib.engine.observer import Silent
from SemiSAMO1Lib.image_io import read_volume
from SemiSAMO1Lib.job import JobError, JobFolder, JobKind, State, cancel, observe, resume, start
from SemiSAMO1Lib.lock import Locked, locked
from SemiSAMO1Lib.project import Project, Role, reviews
from SemiSAMO1Lib.tasks import work
from SemiSAMO1Lib.tasks.predict import finished_run


def worker(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run worker.py as a program and wait."""
    command = [sys.executable, "-m", "SemiSAMO1Lib.worker", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


# ---------------------------------------------------------------------- a finished training


def test_a_training_finishes(finished: JobFolder) -> None:
    seen = observe(finished)
    assert seen.state is State.FINISHED, f"{seen.message}\n{finished.log_tail()}"


def test_the_worker_was_another_process(finished: JobFolder) -> None:
    assert observe(finished).pid not in (None, os.getpid())


def test_the_first_event_is_a_handshake_with_versions(finished: JobFolder) -> None:
    first = events_of(finished)[0]
    assert {"kind", "library", "schema", "python", "torch", "device"} <= set(first) and first["kind"] == "handshake"


def test_the_last_event_is_the_end(finished: JobFolder) -> None:
    assert (events_of(finished)[-1]["kind"], events_of(finished)[-1]["state"]) == ("end", "finished")


def test_progress_only_grows(finished: JobFolder) -> None:
    fractions = [e["fraction"] for e in events_of(finished, "progress") if e.get("fraction") is not None]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_every_unlabelled_case_has_a_result(finished: JobFolder) -> None:
    rows = files.read_json(finished.index)["cases"]
    assert [row["case"] for row in rows] == ["phantom_001", "phantom_002", "phantom_003"]


def test_predictions_lie_on_the_grid_of_their_scan(finished: JobFolder) -> None:
    project = Project(finished.project)
    for row in files.read_json(finished.index)["cases"]:
        scan = read_volume(image_of(project, row["case"]))
        prediction = read_volume(finished.results / row["prediction"])
        assert prediction.geometry.same_grid(scan.geometry), f"{row['case']}: {prediction.geometry}"


def test_uncertainty_is_percent(finished: JobFolder) -> None:
    for row in files.read_json(finished.index)["cases"]:
        array = read_volume(finished.results / row["uncertainty"]).array
        assert array.dtype == np.uint8 and array.max() <= 100, f"{row['case']}: {array.dtype} up to {array.max()}"


def test_the_index_knows_the_files_by_their_hash(finished: JobFolder) -> None:
    rows = files.read_json(finished.index)["cases"]
    assert [files.sha256(finished.results / row["prediction"]) for row in rows] == [row["sha256"] for row in rows]


def test_superseded_rounds_keep_their_scores_only(finished: JobFolder) -> None:
    names = {path.name for number in "01" for path in (finished.results / number).glob("*/*")}
    assert names == {"scores.json"}


def test_the_project_switches_to_the_finished_training(finished: JobFolder) -> None:
    assert Project(finished.project).state.current_training == finished.id


def test_a_report_is_written(finished: JobFolder) -> None:
    assert (finished.path / "report.html").stat().st_size > 1000


def test_no_lock_and_no_half_file_is_left(finished: JobFolder) -> None:
    left = [
        path.name for path in finished.project.rglob("*") if "lock" in path.name or path.name.startswith(".writing")
    ]
    assert left == []


def test_checkpoints_of_finished_rounds_are_removed(finished: JobFolder) -> None:
    assert list((finished.work / "checkpoints").glob("*.pt")) == []


def test_of_the_working_files_only_what_further_scans_need_is_kept(finished: JobFolder) -> None:
    needed = {
        "behind",
        "edges",
        "plan.json",
        "config.json",
        "weights",
        "transforms",
        "library",
        "library.json",
        "detours.json",
        "template-signature.npy",
    }
    facts = {
        "in-force.json",
        "labelled.json",
        "skipped.json",
        "environment.json",
        "refinement",
        "shifts",
    }
    empty = {"checkpoints"}
    kept = {path.name for path in finished.work.iterdir()}
    assert needed <= kept, f"missing: {needed - kept}"
    assert kept <= needed | facts | empty, f"left behind: {kept - needed - facts - empty}"


def test_a_training_of_an_older_program_goes_on_as_it_began(tmp_path: Path) -> None:
    """Its configuration knows nothing of what came later."""
    from SemiSAMO1Lib.engine.config import BEFORE, make_config
    from SemiSAMO1Lib.tasks.train import config_of

    job = empty_job(tmp_path)
    written = {key: one for key, one in make_config("quick").model_dump(mode="json").items() if key not in BEFORE}
    files.write_json(job.work / "config.json", written)
    assert {key: getattr(config_of(job), key) for key in BEFORE} == BEFORE


def test_superseded_rounds_of_a_killed_worker_are_removed_later(tmp_path: Path) -> None:
    from SemiSAMO1Lib.tasks.inputs import ClassMap, Inputs
    from SemiSAMO1Lib.tasks.train import ResultWriter

    job = empty_job(tmp_path)
    old = job.results / "0" / "case" / "prediction.seg.nrrd"
    old.parent.mkdir(parents=True)
    old.touch()  # killed after index.json was switched, before the older round was removed
    files.write_json(job.index, {"round": 1, "cases": [], "skipped": []})
    ResultWriter(job, Inputs(None, ClassMap((0, 1)), [], [], []), keep_rounds=False)  # type: ignore[arg-type]
    assert not old.exists()


def test_half_a_round_never_switches_the_set(tmp_path: Path) -> None:
    from SemiSAMO1Lib.project import Label, LabelTable
    from SemiSAMO1Lib.tasks.inputs import ClassMap, Inputs
    from SemiSAMO1Lib.tasks.train import ResultWriter
    from SemiSAMO1Lib.volume import Geometry, Volume

    job = empty_job(tmp_path)
    table = LabelTable((Label(1, "organ"),))
    volume = Volume(np.ones((4, 4, 4), np.uint8), Geometry((4, 4, 4)))
    writer = ResultWriter(job, Inputs(table, ClassMap.of(table), [], [None, None], []), keep_rounds=False)  # type: ignore[list-item]
    writer.add(CaseResult(0, "first", volume, volume, {"classes": {}}))
    assert not job.index.exists(), "one of two cases is written; the queue must not see it yet"


# ---------------------------------------------------------------------- stopping and going on


def test_a_stopped_training_can_go_on(tmp_path: Path) -> None:
    project, _ = labelled_project(tmp_path, 3)
    job = make_training(project, rounds=1)
    start(job)
    wait_until(lambda: len(events_of(job, "handshake")) == 1, "the worker shook hands")
    cancel(job)
    stopped = wait_for_end(job)
    resume(job)
    finished = wait_for_end(job)
    assert (stopped.state, stopped.stopped, finished.state) == (State.INTERRUPTED, True, State.FINISHED)


def test_a_cancelled_worker_ends_with_code_3(tmp_path: Path) -> None:
    job = empty_job(tmp_path, JobKind.IMPORT)
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.nrrd").touch()
    Project.create(tmp_path)
    files.write_json(job.path / "job.json", {**job.spec(), "parameters": {"images": str(tmp_path / "scans")}})
    job.cancel_request.touch()
    assert worker(job.path).returncode == 3


# ---------------------------------------------------------------------- refused and failed


def test_two_trainings_at_once_are_refused(tmp_path: Path) -> None:
    project, _ = labelled_project(tmp_path, 3)
    first, second = make_training(project), make_training(project)
    start(first)
    with pytest.raises(JobError, match=f"{first.id} is under way"):
        start(second)
    wait_until(lambda: observe(first).pid is not None, "the worker said who it is, so that it can be ended")


def test_a_second_worker_in_the_project_gives_way(tmp_path: Path) -> None:
    job = empty_job(tmp_path)
    with locked(job.path.parent / ".trainer.lock"):
        work(job.path)
    assert "another training of this project is under way" in observe(job).message


def test_another_lock_that_is_held_is_not_called_a_second_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its end a training writes into the project, which somebody else may be doing."""
    job = empty_job(tmp_path)

    def meets_a_lock(*_: object) -> None:
        raise Locked(tmp_path / "project.lock", {"user": "ann", "host": "lab"})

    monkeypatch.setattr("SemiSAMO1Lib.tasks.train.train", meets_a_lock)
    work(job.path)
    assert "is being written by ann on lab" in (message := observe(job).message), message
    assert "another training" not in message


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("CUDA out of memory")],
    ids=str,
)
def test_a_lack_of_memory_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def without_memory(*_: object) -> None:
        raise error

    job = empty_job(tmp_path)
    monkeypatch.setattr("SemiSAMO1Lib.tasks.train.train", without_memory)
    work(job.path)
    assert "Choose the preset quick" in (message := observe(job).message), message


def test_a_lock_that_a_killed_worker_left_half_made_is_taken_over(tmp_path: Path) -> None:
    job = empty_job(tmp_path)
    (job.path.parent / ".trainer.lock").touch()
    work(job.path)  # fails, because the folder has no inputs, but not because of the lock
    assert "under way" not in observe(job).message


def test_a_failed_job_names_its_log(tmp_path: Path) -> None:
    job = empty_job(tmp_path, JobKind.ADVISE)
    assert run_to_end(job).state is State.FAILED and str(job.log) in observe(job).message


def test_the_log_of_a_failed_job_says_where(tmp_path: Path) -> None:
    job = empty_job(tmp_path, JobKind.ADVISE)
    run_to_end(job)
    assert "Traceback" in job.log_tail(50)


def test_a_job_that_this_worker_cannot_do_is_named(tmp_path: Path) -> None:
    job = empty_job(tmp_path, JobKind.ADVISE)
    files.write_json(job.path / "job.json", {**job.spec(), "kind": "dream"})
    assert "cannot do jobs of kind 'dream'; update SemiSAMO1" in run_to_end(job).message


def test_a_python_without_the_library_is_failed_with_its_words(tmp_path: Path) -> None:
    job = empty_job(tmp_path, JobKind.IMPORT)
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho no module named torch\nexit 1\n", encoding="utf-8")
    bare.chmod(0o755)
    start(job, python=bare)
    wait_until(lambda: "torch" in job.log_tail(), "the program wrote to the log", 20)
    status = files.read_json(job.status)
    files.write_json(job.status, {**status, "heartbeat": status["heartbeat"] - 91})
    assert observe(job).state is State.FAILED and "no module named torch" in observe(job).message


def test_a_worker_without_a_job_says_how_it_is_used(tmp_path: Path) -> None:
    assert worker().returncode == 2


def test_a_worker_makes_no_job_folder_of_a_wrong_path(tmp_path: Path) -> None:
    shown = worker(tmp_path / "nothing")
    assert (shown.returncode, (tmp_path / "nothing").exists()) == (2, False), shown.stderr


# ---------------------------------------------------------------------- imports and reports


@pytest.fixture
def importing(tmp_path: Path) -> JobFolder:
    """An import of three phantoms, one damaged file and one label map."""
    source, names = make_project(tmp_path / "source", 3)
    scans = tmp_path / "source" / "cohort" / "images"
    (scans / "damaged.nrrd").write_bytes(image_of(source, names[0]).read_bytes()[:2000])
    (scans / "mask.nrrd").write_bytes(truth_of(source, names[0]).read_bytes())
    project = Project.create(tmp_path / "project")
    job = JobFolder.create(project.jobs, JobKind.IMPORT, {"images": str(scans)}, [])
    run_to_end(job)
    return job


def test_an_import_makes_cases_of_the_usable_scans(importing: JobFolder) -> None:
    assert [case.id for case in Project(importing.project).state.cases] == ["phantom_000", "phantom_001", "phantom_002"]


def test_an_import_lists_the_others(importing: JobFolder) -> None:
    skipped = {one.name: one.reason for one in Project(importing.project).state.skipped}
    assert sorted(skipped) == ["damaged.nrrd", "mask.nrrd"] and all(skipped.values())


def test_an_import_tells_what_it_skips_while_it_runs(importing: JobFolder) -> None:
    assert {event["name"] for event in events_of(importing, "skipped")} == {"damaged.nrrd", "mask.nrrd"}


def test_an_import_without_a_usable_scan_fails_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    project = Project.create(tmp_path / "project")
    job = JobFolder.create(project.jobs, JobKind.IMPORT, {"images": str(tmp_path / "empty")}, [])
    assert f"no usable scan in {tmp_path / 'empty'}" in run_to_end(job).message


def test_a_report_job_writes_the_report(finished: JobFolder, tmp_path: Path) -> None:
    parameters = {"training": finished.id, "output": str(tmp_path / "report.html")}
    job = JobFolder.create(finished.path.parent, JobKind.REPORT, parameters, [])
    assert run_to_end(job).state is State.FINISHED and (tmp_path / "report.html").exists()


def test_a_report_names_no_folder_of_this_computer(finished: JobFolder, tmp_path: Path) -> None:
    """Reports are passed on. It says which image it lacks, without where."""
    shutil.copytree(finished.project, tmp_path / "project")
    training = JobFolder(tmp_path / "project" / "jobs" / finished.id)
    listing = files.read_json(training.inputs / "cases.json")
    listing["cases"][0]["fingerprint"] = "another"
    files.write_json(training.inputs / "cases.json", listing)
    parameters = {"training": training.id, "output": str(tmp_path / "report.html")}
    run_to_end(JobFolder.create(training.path.parent, JobKind.REPORT, parameters, []))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    folders = [tmp_path, finished.project.parent, *(Path(place).parent for place in listing["cases"][0]["places"])]
    assert "the image was changed since it was added" in text
    assert [str(folder) for folder in folders if str(folder) in text] == []


def test_cases_that_a_person_refused_since_have_no_vote_on_further_scans(finished: JobFolder, tmp_path: Path) -> None:
    shutil.copytree(finished.project, tmp_path / "project")
    project = Project(tmp_path / "project")
    rejected, left_out, *_ = (case.id for case in project.state.with_role(Role.UNLABELLED))
    reviews.reject(project, rejected)
    project.exclude(left_out)
    run, _ = finished_run(JobFolder(project.jobs / finished.id), "cpu", Silent())
    assert set(run.without) == {rejected, left_out}
