"""How specialists learn, by name. A new learner is a file, a line here and one in `choices.py`."""

from ...choices import SHORT_NAMES
from .adversarial import Adversarial
from .base import Batch, Learner
from .baselines import PseudoOnly, SupervisedOnly
from .dual_task import DualTask
from .mean_teacher import MeanTeacher, UncertaintyMeanTeacher
from .sam_assisted import SemiSam, SemiSamPlus, SemiSamUncertainty

LEARNERS: dict[str, type[Learner]] = {
    "mean_teacher": MeanTeacher,
    "uncertainty_mean_teacher": UncertaintyMeanTeacher,
    "adversarial": Adversarial,
    "dual_task": DualTask,
    "semisam": SemiSam,
    "semisam_uncertainty": SemiSamUncertainty,
    "semisam_plus": SemiSamPlus,
    "supervised_only": SupervisedOnly,
    "pseudo_only": PseudoOnly,
}


def learner_named(name: str) -> type[Learner]:
    """The learner class. Raises ValueError naming those there are."""
    if name not in LEARNERS:
        short = {full: f"{full} ({short})" for short, full in SHORT_NAMES.items()}
        raise ValueError(f"unknown learner {name!r}; there are: {', '.join(short.get(n, n) for n in sorted(LEARNERS))}")
    return LEARNERS[name]


__all__ = ["LEARNERS", "Batch", "Learner", "MeanTeacher", "learner_named"]
