"""How specialists learn, by name. A new learner is one file and one line here."""

from .base import Batch, Learner
from .mean_teacher import MeanTeacher

LEARNERS: dict[str, type[Learner]] = {"mean_teacher": MeanTeacher}


def learner_named(name: str) -> type[Learner]:
    """The learner class. Raises ValueError naming those there are."""
    if name not in LEARNERS:
        raise ValueError(f"unknown learner {name!r}; there are: {', '.join(sorted(LEARNERS))}")
    return LEARNERS[name]


__all__ = ["LEARNERS", "Batch", "Learner", "MeanTeacher", "learner_named"]
