"""One training by several processes that torchrun or srun started: the first tells the world, the others follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..job.folder import JobFolder
from .reporter import Follower, Reporter
from .run import work


def work_together(prepare: Callable[[], JobFolder], device: str) -> tuple[JobFolder, int, bool]:
    """Do a training in this process and in those that were started with it.

    Args:
        prepare: makes the job, or checks that it can go on; called in the first process alone.
        device: 'auto', 'cpu' or 'cuda'.

    Returns:
        the job, this process' exit code, and whether this is the first process.
    """
    from ..engine.ranks import Ranks
    from ..engine.training import make_fabric

    fabric = make_fabric(device, "32-true", together=True)
    ranks = Ranks(fabric)
    made = prepare() if ranks.first else None
    job = JobFolder(Path(fabric.broadcast(str(made.path) if made is not None else "")))
    kind = Reporter if ranks.first else Follower
    if ranks.first:
        with open(job.log, "a", encoding="utf-8") as log:
            log.write(f"{ranks.count} processes work on this; what they say is where torchrun or srun puts it\n")
    return job, work(job.path, reporter=kind(job, together=True)), ranks.first
