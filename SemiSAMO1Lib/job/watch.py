"""What a job is doing, told from its folder alone: any process may watch, also after a restart."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from .. import processes
from .folder import JobFolder, JobKind

#: The worker's thread beats this often, seconds.
HEARTBEAT_S = 2.0

#: A heartbeat older than this is stale, seconds.
STALE_S = 30.0

#: A queued job whose worker has not shaken hands after this time has failed, seconds.
HANDSHAKE_S = 90.0


class State(StrEnum):
    """States of a job. not_responding: alive but silent (sleep, swap); never resumed over."""

    QUEUED = "queued"
    RUNNING = "running"
    STOPPING = "stopping"
    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    NOT_RESPONDING = "not_responding"

    @property
    def active(self) -> bool:
        return self in (State.QUEUED, State.RUNNING, State.STOPPING, State.NOT_RESPONDING)


@dataclass(frozen=True)
class Observed:
    """A job at this moment.

    Attributes:
        state: see State.
        pid: of the worker itself, None before it has written its own.
        stage, fraction, eta_s: where it is; fraction 0 to 1; seconds left, None when unknown.
        message: the reason of a failure, or what a person should know.
        here: True when the worker runs (or ran) on this computer.
        stopped: True when it was interrupted because a person asked for it.
    """

    state: State
    pid: int | None = None
    process_start: float | None = None
    stage: str = ""
    fraction: float = 0.0
    eta_s: float | None = None
    message: str = ""
    here: bool = True
    stopped: bool = False

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "state": str(self.state)}


def observe(job: JobFolder, now: float | None = None) -> Observed:
    """Look at a job. `now` is the time in seconds since 1970, given in tests."""
    now = time.time() if now is None else now
    processes.reap()
    status = job.read_status()
    if status is None:
        return _queued(job, Observed(State.QUEUED), now - (job.path / "job.json").stat().st_mtime)
    here = status.get("host") == processes.host()
    seen = Observed(
        state=State(status["state"]),
        pid=status.get("pid"),
        process_start=status.get("process_start"),
        stage=status.get("stage", ""),
        fraction=status.get("fraction", 0.0),
        eta_s=status.get("eta_s"),
        message=status.get("message", ""),
        here=here,
        stopped=status.get("stopped", False),
    )
    if seen.state is State.QUEUED:
        return _queued(job, seen, now - status["heartbeat"])
    if seen.state not in (State.RUNNING, State.STOPPING):
        return seen
    fresh = now - status["heartbeat"] <= STALE_S
    if not here:
        return seen if fresh else _changed(seen, State.NOT_RESPONDING, f"no sign of life from {status.get('host')}")
    if seen.pid is None or not processes.is_same_process(seen.pid, seen.process_start):
        if job.cancel_request.exists():
            stopped = _changed(seen, State.INTERRUPTED, "stopped as asked, at once; what was done is kept")
            return replace(stopped, stopped=True)
        if failure := job.failure_of_follower():
            return _changed(seen, State.FAILED, failure)
        return _changed(seen, State.INTERRUPTED, "the worker ended without saying why; what was done is kept")
    if not fresh:
        return _changed(
            seen, State.NOT_RESPONDING, "the worker is alive but silent (computer asleep or out of memory?)"
        )
    if job.cancel_request.exists():
        return _changed(seen, State.STOPPING, seen.message)
    return seen


def _queued(job: JobFolder, seen: Observed, waited_s: float) -> Observed:
    if waited_s <= HANDSHAKE_S:
        return seen
    tail = job.log_tail()
    return _changed(seen, State.FAILED, f"the worker did not start within {HANDSHAKE_S:.0f} s. End of its log:\n{tail}")


def _changed(seen: Observed, state: State, message: str) -> Observed:
    return replace(seen, state=state, message=message)


def all_jobs(jobs: Path) -> list[JobFolder]:
    """All jobs of a project, oldest first."""
    if not jobs.is_dir():
        return []
    return [JobFolder(one) for one in sorted(jobs.iterdir()) if (one / "job.json").exists()]


def is_under_way(job: JobFolder) -> bool:
    """Whether somebody works on a job. On one that nobody has started yet nobody does; of one whose status cannot be
    read nobody knows, and a second worker would find its lock."""
    try:
        return job.status.exists() and observe(job).state.active
    except (OSError, ValueError):
        return False


def running_training(jobs: Path) -> JobFolder | None:
    """The training that is under way in a project, if any."""
    return next((job for job in trainings(jobs) if is_under_way(job)), None)


def trainings(jobs: Path) -> list[JobFolder]:
    """The trainings of a project in whatever state, oldest first."""
    return [job for job in all_jobs(jobs) if job.path.name.endswith(f"-{JobKind.TRAIN}")]
