"""Every state of a job, told from its folder alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from job_helpers import empty_job

from SemiSAMO1Lib import files, processes
from SemiSAMO1Lib.job import JobError, JobFolder, State, cancel, kill, observe, resume, running_training, start
from SemiSAMO1Lib.job.folder import JobKind
from SemiSAMO1Lib.job.launcher import RanElsewhere, require_resumable
from SemiSAMO1Lib.tasks.reporter import Follower


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    return empty_job(tmp_path)


def status(job: JobFolder, age_s: float = 0.0, **changes: Any) -> None:
    """Write the status of a worker that is this very process, last heard of `age_s` ago."""
    value = {
        "state": "running",
        "pid": os.getpid(),
        "process_start": processes.start_time(os.getpid()),
        "host": processes.host(),
        "heartbeat": time.time() - age_s,
        "stage": "training 1 3/8",
        "fraction": 0.4,
        "eta_s": 12.5,
        "message": "",
    }
    files.write_json(job.status, {**value, **changes})


def dead_pid() -> int:
    """The pid of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def queued(job: JobFolder, age_s: float) -> None:
    heartbeat = time.time() - age_s
    files.write_json(job.status, {"state": "queued", "host": processes.host(), "heartbeat": heartbeat})


def test_started_without_handshake_is_queued(job: JobFolder) -> None:
    queued(job, 80)
    assert observe(job).state is State.QUEUED


def test_queued_for_more_than_90_s_is_failed(job: JobFolder) -> None:
    queued(job, 91)
    assert observe(job).state is State.FAILED


def test_a_worker_that_never_came_is_explained_by_the_end_of_its_log(job: JobFolder) -> None:
    job.log.write_text("ImportError: no module named torch\n", encoding="utf-8")
    queued(job, 91)
    assert "ImportError: no module named torch" in observe(job).message


def test_a_job_that_nobody_started_is_queued(job: JobFolder) -> None:
    assert observe(job).state is State.QUEUED


def test_a_job_that_nobody_started_for_90_s_is_failed(job: JobFolder) -> None:
    assert observe(job, now=time.time() + 91).state is State.FAILED


def test_live_process_and_fresh_heartbeat_is_running(job: JobFolder) -> None:
    status(job, age_s=3)
    assert observe(job).state is State.RUNNING


def test_a_running_job_says_where_it_is(job: JobFolder) -> None:
    status(job)
    seen = observe(job)
    assert (seen.stage, seen.fraction, seen.eta_s, seen.pid) == ("training 1 3/8", 0.4, 12.5, os.getpid())


def test_running_with_a_cancel_request_is_stopping(job: JobFolder) -> None:
    status(job)
    cancel(job)
    assert observe(job).state is State.STOPPING


def test_finished_stays_finished_however_old(job: JobFolder) -> None:
    status(job, age_s=1e6, state="finished", pid=dead_pid())
    assert observe(job).state is State.FINISHED


def test_finished_with_a_late_cancel_request_is_finished(job: JobFolder) -> None:
    status(job, state="finished", pid=dead_pid())
    job.cancel_request.touch()
    assert observe(job).state is State.FINISHED


def test_failed_keeps_its_reason(job: JobFolder) -> None:
    status(job, age_s=1e6, state="failed", message="the disk is full")
    assert (observe(job).state, observe(job).message) == (State.FAILED, "the disk is full")


def test_stopped_by_a_person_is_interrupted_and_says_so(job: JobFolder) -> None:
    status(job, state="interrupted", stopped=True)
    assert (observe(job).state, observe(job).stopped) == (State.INTERRUPTED, True)


def test_a_dead_process_without_an_end_is_interrupted(job: JobFolder) -> None:
    status(job, pid=dead_pid())
    assert observe(job).state is State.INTERRUPTED


def test_a_dead_process_was_not_stopped_by_a_person(job: JobFolder) -> None:
    status(job, pid=dead_pid())
    assert observe(job).stopped is False


def test_a_pid_used_again_is_interrupted(job: JobFolder) -> None:
    own = processes.start_time(os.getpid())
    assert own is not None
    status(job, process_start=own - 100)
    assert observe(job).state is State.INTERRUPTED


def test_live_process_with_stale_heartbeat_is_not_responding(job: JobFolder) -> None:
    status(job, age_s=31)
    assert observe(job).state is State.NOT_RESPONDING


def test_a_worker_that_beats_again_is_running_again(job: JobFolder) -> None:
    status(job, age_s=300)
    observe(job)
    status(job)
    assert observe(job).state is State.RUNNING


def test_a_job_that_does_not_respond_is_never_resumed_over(job: JobFolder) -> None:
    status(job, age_s=31)
    with pytest.raises(JobError, match="does not respond"):
        resume(job)


def test_of_another_host_the_heartbeat_alone_counts(job: JobFolder) -> None:
    status(job, host="elsewhere", pid=dead_pid())
    seen = observe(job)
    assert (seen.state, seen.here) == (State.RUNNING, False)


def test_another_host_that_is_silent_is_not_responding_and_named(job: JobFolder) -> None:
    status(job, age_s=31, host="elsewhere")
    seen = observe(job)
    assert seen.state is State.NOT_RESPONDING and "elsewhere" in seen.message


def test_a_job_of_another_host_is_not_killed(job: JobFolder) -> None:
    status(job, host="elsewhere")
    assert kill(job) is False, "the pid belongs to another computer; here it is this test"


@pytest.mark.parametrize(("state", "age_s"), [("interrupted", 0), ("failed", 0), ("running", 31)])
def test_a_job_of_another_host_is_not_resumed_unasked(job: JobFolder, state: str, age_s: float) -> None:
    status(job, host="elsewhere", state=state, age_s=age_s)
    with pytest.raises(RanElsewhere, match=r"ran on elsewhere.*surely ended there"):
        resume(job)


@pytest.mark.parametrize(("state", "age_s"), [("interrupted", 0), ("running", 31)])
def test_a_job_of_another_host_is_taken_over_when_somebody_says_that_it_has_ended(
    job: JobFolder, state: str, age_s: float
) -> None:
    status(job, host="elsewhere", pid=77, state=state, age_s=age_s)
    lock = job.path.parent / ".trainer.lock"
    files.write_json(lock, {"pid": 77, "host": "elsewhere", "user": "a", "time": "t"})
    require_resumable(job, elsewhere=True)
    assert not lock.exists(), "the lock of the other computer stayed: the training could not begin"


@pytest.mark.parametrize(("host", "pid"), [("third", 77), ("elsewhere", 78)])
def test_the_lock_of_another_process_is_not_broken(job: JobFolder, host: str, pid: int) -> None:
    """Another training of this project may be under way there."""
    status(job, host="elsewhere", pid=77, state="interrupted")
    lock = job.path.parent / ".trainer.lock"
    files.write_json(lock, {"pid": pid, "host": host, "user": "a", "time": "t"})
    require_resumable(job, elsewhere=True)
    assert lock.exists()


def test_nothing_is_taken_over_while_another_training_runs(job: JobFolder) -> None:
    status(job, host="elsewhere", pid=77, state="interrupted")
    lock = job.path.parent / ".trainer.lock"
    files.write_json(lock, {"pid": 77, "host": "elsewhere", "user": "a", "time": "t"})
    status(JobFolder.create(job.path.parent, JobKind.TRAIN, {}, []), host="elsewhere", pid=77)
    with pytest.raises(JobError, match="is under way"):
        require_resumable(job, elsewhere=True)
    assert lock.exists(), "the lock is that of the training under way"


def test_a_job_that_runs_on_another_host_is_not_taken_over(job: JobFolder) -> None:
    status(job, host="elsewhere")
    with pytest.raises(JobError, match="is running"):
        require_resumable(job, elsewhere=True)


def test_what_failed_in_another_process_is_the_jobs_failure(job: JobFolder) -> None:
    status(job, pid=dead_pid())
    Follower(job, together=True).end(State.FAILED, "out of memory on the second GPU")
    seen = observe(job)
    assert (seen.state, seen.message) == (State.FAILED, "out of memory on the second GPU")


def test_what_another_process_had_to_do_otherwise_is_said(job: JobFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own cases, of which the first process knows nothing; what all know the first one says."""
    follower = Follower(job, together=True)
    follower.event("warning", text="prediction: the GPU's memory does not suffice")
    follower.event("note", text="round 1: going on from iteration 5")
    assert capsys.readouterr().out == "warning: {'text': \"prediction: the GPU's memory does not suffice\"}\n"


def test_the_first_to_fail_is_the_one_that_counts(job: JobFolder) -> None:
    """What others meet then may come of it."""
    status(job, pid=dead_pid())
    for message in ("out of memory on the second GPU", "a file is missing"):
        Follower(job, together=True).end(State.FAILED, message)
    assert observe(job).message == "out of memory on the second GPU"


def test_an_earlier_failure_of_another_process_is_forgotten_by_resuming(job: JobFolder) -> None:
    status(job, pid=dead_pid())
    Follower(job, together=True).end(State.FAILED, "out of memory on the second GPU")
    require_resumable(job)
    assert observe(job).state is State.INTERRUPTED


def test_a_running_job_is_not_resumed(job: JobFolder) -> None:
    status(job)
    with pytest.raises(JobError, match="is running"):
        resume(job)


def test_a_finished_job_is_not_resumed(job: JobFolder) -> None:
    status(job, state="finished")
    with pytest.raises(JobError, match="finished"):
        resume(job)


def test_a_job_that_has_ended_is_not_cancelled(job: JobFolder) -> None:
    status(job, state="failed")
    with pytest.raises(JobError, match="not running; it is failed"):
        cancel(job)


def test_an_ended_job_is_not_killed(job: JobFolder) -> None:
    status(job, state="finished")
    assert kill(job) is False, "its old pid may be anybody's"


def test_one_training_at_a_time(job: JobFolder, tmp_path: Path) -> None:
    status(job)
    with pytest.raises(JobError, match=f"training {job.id} is under way"):
        start(empty_job(tmp_path))


def test_the_running_training_is_found(job: JobFolder, tmp_path: Path) -> None:
    status(job)
    empty_job(tmp_path)
    assert running_training(tmp_path / "jobs") == job


def test_a_training_that_nobody_started_blocks_no_other(job: JobFolder, tmp_path: Path) -> None:
    assert running_training(tmp_path / "jobs") is None, f"{job.id} has no worker and never had one"


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_status_is_named(job: JobFolder, content: str) -> None:
    job.status.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"status\.json is not "):
        observe(job)


def test_what_is_observed_can_be_printed_as_json(job: JobFolder) -> None:
    status(job)
    assert json.loads(json.dumps(observe(job).to_json()))["state"] == "running"


def test_watching_needs_no_torch(job: JobFolder) -> None:
    status(job, state="finished")
    code = (
        "import sys; from pathlib import Path; from SemiSAMO1Lib.job import JobFolder, observe;"
        "print(observe(JobFolder(Path(sys.argv[1]))).state, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(job.path)], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["finished", "False", "False"]
