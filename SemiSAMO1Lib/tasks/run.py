"""Run one job folder from its first line to its last."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

from .. import processes
from ..engine.observer import Stopped
from ..job.folder import JobFolder, JobKind
from ..job.watch import State
from ..lock import Locked, locked
from .reporter import Reporter

#: Exit codes of the worker.
FINISHED, FAILED, STOPPED = 0, 1, 3


def work(folder: Path, low_priority: bool = False) -> int:
    """Do a job; whatever happens, its status says so. Returns the exit code."""
    job = JobFolder(Path(folder).resolve())
    if low_priority:
        processes.lower_priority()
    with Reporter(job) as reporter:
        try:
            task = _task(JobKind(job.spec()["kind"]))
            task(job, reporter)
        except Stopped as stop:
            reporter.end(State.INTERRUPTED, str(stop), stopped=True)
            return STOPPED
        except Exception as error:
            print(traceback.format_exc(), flush=True)
            reporter.end(State.FAILED, f"{_explained(error)} Log: {job.log}")
            return FAILED
        reporter.end(State.FINISHED)
        return FINISHED


def _task(kind: JobKind) -> Callable[[JobFolder, Reporter], None]:
    if kind is JobKind.IMPORT:
        from .importing import import_scans

        return import_scans
    if kind is JobKind.TRAIN:
        from .train import train

        return _alone(train)
    if kind is JobKind.ADVISE:
        from .advise import advise

        return advise
    if kind is JobKind.PREDICT:
        from .apply import apply

        return apply
    if kind is JobKind.EXPORT:
        from .export import export

        return export
    if kind is JobKind.REPORT:
        from .report import report

        return report
    raise ValueError(f"this worker cannot do jobs of kind {kind}")


def _alone(task: Callable[[JobFolder, Reporter], None]) -> Callable[[JobFolder, Reporter], None]:
    """One trainer per project, whoever started it."""

    def run(job: JobFolder, reporter: Reporter) -> None:
        try:
            with locked(job.path.parent / ".trainer.lock", patience_s=5.0):
                task(job, reporter)
        except Locked as error:
            raise RuntimeError(f"another training of this project is under way ({error.holder})") from error

    return run


def _explained(error: Exception) -> str:
    """What happened, the likely cause, what to do."""
    text = str(error).strip() or type(error).__name__
    if "out of memory" in text.lower() or isinstance(error, MemoryError):
        return f"Out of memory ({text}). Choose the preset quick, a smaller patch_voxels, or --device cpu."
    if isinstance(error, OSError) and error.errno == 28:
        return f"The disk is full ({text}). Make room and resume the job; nothing finished is lost."
    if isinstance(error, PermissionError):
        return f"No permission to write ({text}). Make the project folder writable and resume."
    return text
