"""How specialists learn, by name. A new learner is a file, a line here and one in `choices.py`."""

from .adversarial import Adversarial
from .averaged import AveragedLearner
from .base import Batch, Learner
from .baselines import PseudoOnly, SupervisedOnly
from .dual_task import DualTask
from .mean_teacher import MeanTeacher, UncertaintyMeanTeacher
from .sam_assisted import SemiSam, SemiSamPlus, SemiSamUncertainty

LEARNERS: dict[str, type[AveragedLearner]] = {
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


#: The names by which the learners were published.
SHORT_NAMES = {
    "mt": "mean_teacher",
    "uamt": "uncertainty_mean_teacher",
    "dan": "adversarial",
    "dtc": "dual_task",
    "semisam-uamt": "semisam_uncertainty",
    "semisam+": "semisam_plus",
    "supervised": "supervised_only",
    "pseudo": "pseudo_only",
}


def full_name(name: str) -> str:
    """The name of a learner here, from that or the published one."""
    return SHORT_NAMES.get(name, name)


def learner_named(name: str) -> type[AveragedLearner]:
    """The learner class. Raises ValueError naming those there are."""
    if name not in LEARNERS:
        short = {full: f"{full} ({short})" for short, full in SHORT_NAMES.items()}
        raise ValueError(f"unknown learner {name!r}; there are: {', '.join(short.get(n, n) for n in sorted(LEARNERS))}")
    return LEARNERS[name]


__all__ = ["LEARNERS", "SHORT_NAMES", "Batch", "Learner", "MeanTeacher", "full_name", "learner_named"]
