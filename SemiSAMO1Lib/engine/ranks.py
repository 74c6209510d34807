"""Processes that do one run together: who does which case, who writes, and that all stop when one does.

torchrun or srun starts them (docs/scaling.md); Lightning Fabric connects them. They share the project's folder.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from lightning_fabric import Fabric
from torch import Tensor

from .observer import Observer, Stopped

T = TypeVar("T")
R = TypeVar("R")


class FirstFailed(RuntimeError):
    """What one process did for all failed in that one."""


#: What came of a thing that one does for all.
_DONE, _STOPPED, _FAILED = 0, 1, 2


def started_together() -> tuple[int, int]:
    """How many processes torchrun or srun started with this one, and how many of them on this computer; (1, 1) else."""
    if by_torchrun():
        return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    count = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return count, count // int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def threads_each(usable: int, wanted: int | None) -> int:
    """CPU threads of this process beside those that were started with it.

    Args:
        usable: cores that this process may use.
        wanted: threads that a person gave for all of this computer's processes; None: all that there are.
    """
    here = started_together()[1]
    given = os.environ.get("SLURM_CPUS_PER_TASK")  # stands in every allocation, and is each task's of srun alone
    share = min(usable, int(given)) if given and not by_torchrun() else usable // here
    return max(1, min(share, wanted // here if wanted else share))


class Ranks:
    """The processes of a run, seen from one of them.

    Args:
        fabric: connects them; None: this process is alone.

    Attributes:
        number: this one, from 0.
        count: how many there are.
        first: this is the one that writes what there is once: plan, weights, results, events.
    """

    def __init__(self, fabric: Fabric | None = None) -> None:
        self._fabric = fabric
        self.number, self.count = (fabric.global_rank, fabric.world_size) if fabric is not None else (0, 1)
        self.first = fabric is None or fabric.is_global_zero

    def wait(self) -> None:
        """Until all are here."""
        if self._fabric is not None and self.count > 1:
            self._fabric.barrier()

    def largest(self, here: int) -> int:
        """The largest of a number over all processes; all have to ask."""
        if self._fabric is None or self.count == 1:
            return here
        asked = self._fabric.all_gather(torch.tensor(here, device=self._fabric.device))
        assert isinstance(asked, Tensor)
        return int(asked.max())

    def as_first(self, here: bool) -> bool:
        """What the first one finds; all have to ask. A folder that several computers mount may show another one what
        was there a moment ago, and who waits for whom must not hang on that. Nor may it remember for long that a file
        was not there: the others do not look (`ranks.first and ...`) for what they read soon after."""
        if self._fabric is None or self.count == 1:
            return here
        found = self._fabric.all_gather(torch.tensor(int(here), device=self._fabric.device))
        assert isinstance(found, Tensor)
        return bool(found.reshape(-1)[0])

    def share(self, items: Sequence[T], observer: Observer) -> Iterator[tuple[int, T]]:
        """This process' part of the items, with their positions among all; at its end all wait for each other.

        Raises:
            Stopped: in all of them, when one was asked to stop.
        """
        return self.each(lambda item: item, items, observer)

    def each(
        self, do: Callable[[T], R], items: Sequence[T], observer: Observer, at_once: int = 1
    ) -> Iterator[tuple[int, R]]:
        """Do something with each item of this process' part, and give what it returned with the item's position among
        all, in their order; at its end all wait for each other.

        Args:
            do: given one item; more than one `at_once`, each in a thread of its own.
            items: of all processes.
            observer: is asked before each item whether to stop; what has begun is finished.
            at_once: items that are done side by side.

        Raises:
            Stopped: in all of them, when one was asked to stop.
        """
        stopped, under_way = False, deque[tuple[int, Future[R]]]()
        with ThreadPoolExecutor(at_once, "case") as threads:
            for position in range(self.number, len(items), self.count):
                if stopped := observer.should_stop():
                    break
                if at_once == 1:
                    yield position, do(items[position])
                    continue
                under_way.append((position, threads.submit(do, items[position])))
                if len(under_way) == at_once:
                    first, found = under_way.popleft()
                    yield first, found.result()
            for first, found in under_way:
                yield first, found.result()
        if self.largest(int(stopped)):
            raise Stopped

    def once(self, do: Callable[[], object]) -> None:
        """The first one does it, the others wait for it.

        Raises:
            Stopped, FirstFailed: in the others, when the first one could not; in that one what it met.
        """
        error: Exception | None = None
        if self.first:
            try:
                do()
            except Exception as met:
                error = met
        came_to = self.largest(_STOPPED if isinstance(error, Stopped) else _FAILED if error is not None else _DONE)
        if error is not None:
            raise error
        if came_to == _STOPPED:
            raise Stopped
        if came_to == _FAILED:
            raise FirstFailed("the first process met an error; it says which")


def lost_another(error: BaseException) -> bool:
    """Whether an error says that another process is gone: NCCL has a class for it, gloo names itself in the text."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)
