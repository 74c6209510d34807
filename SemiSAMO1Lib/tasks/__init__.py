"""What a worker does for each kind of job: it joins project, job folder and engine."""

from .run import work

__all__ = ["work"]
