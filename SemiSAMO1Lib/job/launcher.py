"""Start, stop, kill and resume a job's worker."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .. import files, processes
from ..lock import break_lock_of, locked
from .environment import clean, this_python
from .folder import JobFolder, JobKind
from .watch import Observed, State, observe, running_training

#: On Linux the C allocator gives every big tensor back to the kernel; half of a step's time was spent on that.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}

#: Threads that wait should sleep, not spin: two trainings at once on two cores were about ten times slower than one. A
#: short spin before that saves most of the waking up (docs/performance.md).
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "1000"}


class JobError(RuntimeError):
    """A job cannot be started, resumed or stopped; the message says why."""


class RanElsewhere(JobError):
    """A job of another computer that is silent or has ended; somebody who knows that it has may take it over."""


def start(
    job: JobFolder,
    python: Path | None = None,
    low_priority: bool = False,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Start the worker of a job, apart from this process; returns the pid that the system gave.

    Args:
        job: a new job.
        python: the worker's Python; None: this one.
        low_priority: let other programs go first.
        environment: variables to begin with; None: those of this process.

    Raises:
        JobError: a training is under way in this project already.
    """
    with locked(job.path.parent / ".launch.lock"):
        if job.status.exists() and observe(job).state.active:
            raise JobError(f"{job.id} is under way already")
        other = running_training(job.path.parent)
        if job.spec()["kind"] == JobKind.TRAIN and other is not None and other != job:
            raise JobError(
                f"training {other.id} is under way in this project. Wait for it, or stop it: semisamo1 cancel"
            )
        return _launch(job, python, low_priority, environment)


def resume(
    job: JobFolder,
    python: Path | None = None,
    low_priority: bool = False,
    environment: Mapping[str, str] | None = None,
    elsewhere: bool = False,
) -> int:
    """Start the worker of a job again; what it finished is kept.

    Args:
        job, python, low_priority, environment: as of `start`.
        elsewhere: take it over from another computer; somebody knows that it has ended there.

    Raises:
        RanElsewhere: it belongs to another computer.
        JobError: it runs, does not respond, or is finished.
    """
    with locked(job.path.parent / ".launch.lock"):
        require_resumable(job, elsewhere)
        return _launch(job, python, low_priority, environment)


def require_resumable(job: JobFolder, elsewhere: bool = False) -> None:
    """Make a job ready to be gone on with: an earlier wish to stop it is forgotten, and what failed the last time.

    Args:
        job: which.
        elsewhere: take it over from another computer; somebody knows that it has ended there.

    Raises:
        RanElsewhere: it belongs to another computer.
        JobError: it runs, does not respond, or is finished.
    """
    seen = observe(job)
    if seen.state is State.FINISHED:
        raise JobError(f"{job.id} is finished; there is nothing to resume")
    foreign = not seen.here and (seen.state is State.NOT_RESPONDING or not seen.state.active)
    if foreign and not elsewhere:
        host = (job.read_status() or {}).get("host", "another computer")
        raise RanElsewhere(
            f"{job.id} ran on {host}. Resume it there; or take it over when it has surely ended there: two processes "
            "that train into one folder spoil it."
        )
    if foreign:
        seen = replace(seen, state=State.INTERRUPTED)
    if seen.state is State.NOT_RESPONDING:
        raise JobError(f"{job.id} does not respond, but its process {seen.pid} is alive. Wait, or end it first.")
    if seen.state.active and job.status.exists():
        raise JobError(f"{job.id} is {seen.state} (process {seen.pid})")
    other = running_training(job.path.parent)
    if other is not None and other != job:
        raise JobError(f"training {other.id} is under way in this project")
    if foreign:
        break_lock_of(job.path.parent / ".trainer.lock", job.read_status() or {})
    job.cancel_request.unlink(missing_ok=True)
    job.follower_failed.unlink(missing_ok=True)


def cancel(job: JobFolder) -> Observed:
    """Ask a job to stop at the next safe point; it keeps what it has and can be resumed.

    Raises:
        JobError: it is not running.
    """
    seen = observe(job)
    if not seen.state.active:
        raise JobError(f"{job.id} is not running; it is {seen.state}")
    files.write_text(job.cancel_request, time.strftime("%Y-%m-%dT%H:%M:%S%z") + "\n")
    return observe(job)


def kill(job: JobFolder) -> bool:
    """End a job's worker and all its children at once; False when there is none on this computer."""
    seen = observe(job)
    if not seen.here or seen.pid is None or not seen.state.active:
        return False
    return processes.kill_tree(seen.pid, seen.process_start)


def _launch(
    job: JobFolder, python: Path | None, low_priority: bool, environment: Mapping[str, str] | None = None
) -> int:
    command = [str(python or this_python()), "-m", "SemiSAMO1Lib.worker", str(job.path)]
    status = {
        "state": str(State.QUEUED),
        "reached": job.reached(),
        "host": processes.host(),
        "heartbeat": time.time(),
    }
    files.write_json(job.status, status)
    if low_priority:
        command.append("--low-priority")
    library = str(Path(__file__).resolve().parents[2])
    given = clean(os.environ if environment is None else environment, command[0])
    paths = [library, *filter(None, [given.get("PYTHONPATH")])]
    surroundings = {**given, **ALLOCATOR, **WAITING, "PYTHONPATH": os.pathsep.join(paths)}
    return processes.launch_detached(command, job.log, surroundings, low_priority)
