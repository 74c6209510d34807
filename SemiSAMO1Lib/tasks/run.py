"""Run one job folder from its first line to its last."""

from __future__ import annotations

import errno
import importlib
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from .. import processes
from ..engine.observer import Stopped
from ..engine.out_of_memory import is_out_of_memory
from ..job.folder import JobFolder, JobKind
from ..job.watch import State
from ..lock import Locked, locked
from .reporter import Follower, Reporter

#: Exit codes of the worker.
FINISHED, FAILED, STOPPED = 0, 1, 3


#: Kind of a job -> module and function that does it.
_TASKS: dict[str, tuple[str, str]] = {
    JobKind.IMPORT: (".importing", "import_scans"),
    JobKind.ADVISE: (".advise", "advise"),
    JobKind.TRAIN: (".train", "train"),
    JobKind.PREDICT: (".apply", "apply"),
    JobKind.EXPORT: (".export", "export"),
    JobKind.REPORT: (".report", "report"),
    JobKind.BUNDLE: (".bundle", "bundle"),
}


def work(folder: Path, low_priority: bool = False, reporter: Reporter | None = None) -> int:
    """Do a job; whatever happens, its status says so. Returns the exit code.

    Args:
        folder: of the job.
        low_priority: let other programs go first.
        reporter: tells the world; None: an ordinary one.
    """
    job = JobFolder(Path(folder).resolve())
    if low_priority:
        processes.lower_priority()
    with reporter or Reporter(job) as told:
        try:
            task = _task(job.spec()["kind"])
            task(job, told)
        except Stopped as stop:
            told.end(State.INTERRUPTED, str(stop), stopped=True)
            return STOPPED
        except Exception as error:
            print(traceback.format_exc(), flush=True)
            if told.together and _another_failed(error):
                if failure := job.failure_of_follower():
                    told.end(State.FAILED, failure)
                else:
                    told.end(State.INTERRUPTED, "another process of this training ended; resume it")
                return FAILED
            told.end(State.FAILED, f"{_explained(error)} Log: {job.log}")
            return FAILED
        told.end(State.FINISHED)
        return FINISHED


def _task(kind: str) -> Callable[[JobFolder, Reporter], None]:
    """What does a kind of job; imported only when it is asked for. Raises ValueError for an unknown kind."""
    if kind not in _TASKS:
        raise ValueError(f"this worker cannot do jobs of kind {kind!r}; update SemiSAMO1")
    module, name = _TASKS[kind]
    task: Callable[[JobFolder, Reporter], None] = getattr(importlib.import_module(module, __package__), name)
    return _alone(task) if kind == JobKind.TRAIN else task


def _alone(task: Callable[[JobFolder, Reporter], None]) -> Callable[[JobFolder, Reporter], None]:
    """One trainer per project, whoever started it."""

    def run(job: JobFolder, reporter: Reporter) -> None:
        if isinstance(reporter, Follower):
            task(job, reporter)  # the first process holds the lock for all
            return
        with ExitStack() as held:
            try:  # other locks are waited for inside of the task
                held.enter_context(locked(job.path.parent / ".trainer.lock", patience_s=5.0))
            except Locked as error:
                who = "{user} on {host}, process {pid}".format_map(defaultdict(lambda: "?", error.holder))
                raise RuntimeError(f"another training of this project is under way ({who})") from error
            task(job, reporter)

    return run


def _another_failed(error: Exception) -> bool:
    """Whether it is not this process that has something to say."""
    from ..engine.ranks import FirstFailed, lost_another

    return isinstance(error, FirstFailed) or lost_another(error)


def _explained(error: Exception) -> str:
    """What happened, the likely cause, what to do."""
    text = str(error).strip() or type(error).__name__
    if is_out_of_memory(error):
        return f"Out of memory ({text}). Choose the preset quick, a smaller patch_voxels, or --device cpu."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full ({text}). Make room and go on with it, or start it again; nothing finished is lost."
    if isinstance(error, PermissionError):
        return f"No permission to write ({text}). Make the project folder writable and resume."
    return text
