"""One training by several processes that torchrun or srun started: the first tells the world, the others follow."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ..job.folder import JobFolder
from ..job.watch import State
from .reporter import Follower, Reporter
from .run import FAILED, FINISHED, STOPPED, work

#: Seconds that a process which failed lets the first one say why.
GRACE_S = 5.0

#: A first process whose heart has not beaten for so long is not waited for, s.
PATIENCE_S = 120.0


def work_together(prepare: Callable[[], JobFolder], device: str) -> tuple[JobFolder, int]:
    """Do a training in this process and in those that were started with it.

    Args:
        prepare: makes the job, or checks that it can go on; called in the first process alone.
        device: 'auto', 'cpu' or 'cuda'.

    Returns:
        the job and the exit code, in the first process; the others have ended.

    Raises:
        what `prepare` raises, in the first process.
    """
    from ..engine.devices import make_fabric
    from ..engine.ranks import Ranks

    fabric = make_fabric(device, "32-true", together=True)
    ranks, refused = Ranks(fabric), None
    path = ""
    if ranks.first:
        try:
            path = str(prepare().path)
        except Exception as error:  # the others must not wait for a job that will never be
            refused = error
    path = fabric.broadcast(path)
    if refused is not None:
        raise refused
    if not path:
        leave(0)
    job = JobFolder(Path(path))
    if not ranks.first:
        code = work(job.path, reporter=Follower(job, together=True))
        if code == FAILED:
            time.sleep(GRACE_S)  # whoever sees this one fail ends all; the first may be about to say why
        if code == FINISHED:
            _wait_for_the_first(job)  # it writes the report; one that leaves early may end all
        leave(0 if code == STOPPED else code)
    with open(job.log, "a", encoding="utf-8") as log:
        log.write(f"{ranks.count} processes work on this; what they say is where torchrun or srun puts it\n")
    return job, work(job.path, reporter=Reporter(job, together=True))


def _wait_for_the_first(job: JobFolder) -> None:
    """Until the job's status says that it has ended, or nothing any more: not in a collective, which would wait for one
    that failed."""
    while (status := job.read_status()) is not None:
        silent = time.time() - status["heartbeat"] > PATIENCE_S
        if silent or not State(status["state"]).active:
            return
        time.sleep(0.2)


def leave(code: int) -> NoReturn:
    """End this process at once: an orderly end would wait for processes that may wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
