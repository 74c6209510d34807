"""A background job: its folder is the contract. Start, watch, cancel, resume. Standard library only."""

from .folder import JobFolder, JobKind
from .launcher import JobError, cancel, kill, resume, start
from .watch import Observed, State, observe, running_training

__all__ = [
    "JobError",
    "JobFolder",
    "JobKind",
    "Observed",
    "State",
    "cancel",
    "kill",
    "observe",
    "resume",
    "running_training",
    "start",
]
