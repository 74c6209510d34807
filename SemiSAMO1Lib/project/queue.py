"""What a person looks at next, and what may be said of the cases nobody looked at.

The worst come first. Because a mean over the worst says nothing of the rest, every fifth case that is offered is drawn
at random, and these alone give the shown mean.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..quality import level
from .cases import Case, Review, Role
from .history import Decision, decisions
from .results import Quality, labels_of_training, predictions, quality
from .store import Project

#: Of this many cases that are offered one is drawn at random.
EVERY = 5

#: The lower end of the interval of the mean from which on reviewing may end.
GOOD_ENOUGH = 0.9

#: Corrections since the last training that are worth another one.
WORTH_A_TRAINING = 3

#: Least spread of the Dice between cases, for the interval of the mean. Where one prediction of ten fails, a few drawn
#: cases often show none that failed: a smaller spread would call such a cohort good (8 drawn, the others perfect: an
#: interval with a spread that shrinks with the number held the mean in 58 of 100 orders).
SPREAD = 0.12

#: Reviews of random cases below which nothing is said of the mean.
FEWEST = 3

#: What a person may want to see of the predictions: all, what waits for a decision, what is likely bad, or one state.
FILTERS = ("all", "waiting", "low", "draft", "skipped", "accepted", "corrected", "rejected")

_DECIDED = (Review.ACCEPTED, Review.CORRECTED, Review.REJECTED)

#: 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, 1.96 + 2.4 / n + 3 / n² is right to 0.01.
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Waiting:
    """A case in the queue.

    Attributes:
        case: its id.
        state: of its review.
        score: likely Dice, 0 to 1; None where nothing was found.
        random: offered because chance drew it, not because it is bad.
    """

    case: str
    state: Review
    score: float | None
    random: bool = False

    @property
    def level(self) -> str:
        return "low" if self.score is None else level(self.score)


@dataclass(frozen=True)
class Score:
    """How good the predictions that people saw were, from the cases drawn at random alone.

    Attributes:
        mean: Dice between what was seen and what was then saved; a rejected prediction counts 0.
        low, high: its 95 % interval.
        reviewed: random cases that were decided.
        cases: predicted cases that the mean speaks of.
    """

    mean: float
    low: float
    high: float
    reviewed: int
    cases: int

    @property
    def of_all(self) -> bool:
        """Whether every case was decided: then the mean is known, and has no interval."""
        return self.reviewed == self.cases


@dataclass(frozen=True)
class Advice:
    """What to do next, and why: `enough`, `train` or `review`."""

    verdict: str
    reason: str


def queue(project: Project, rated: Quality | None = None) -> list[Waiting]:
    """Predicted cases that nobody decided about, in the order in which they are offered; skipped ones at the end.

    Args:
        project: whose.
        rated: likely quality of the current predictions, where it is known already.
    """
    rated = rated or quality(project, predictions(project))
    cases = {case.id: case for case in project.state.cases}
    waiting = {name: cases[name].review for name in rated.worst_first() if _is_waiting(cases[name])}
    fresh = [name for name, state in waiting.items() if state is not Review.SKIPPED]
    later = [name for name, state in waiting.items() if state is Review.SKIPPED]
    draws = random_order(_population(project, rated), project.state.current_training)
    place = len(_decided(project))
    drawn = set(draws[: place // EVERY])
    ordered = []
    left = dict.fromkeys(fresh)
    while left:
        rank, slot = divmod(place, EVERY)
        name = next(iter(left))
        if slot == EVERY - 1 and rank < len(draws):
            drawn.add(draws[rank])
            name = draws[rank] if draws[rank] in left else name
        del left[name]
        ordered.append(name)
        place += 1
    return [Waiting(name, waiting[name], rated.estimates[name].likely, name in drawn) for name in (*ordered, *later)]


def lets_through(wanted: str, quality_level: str, state: str, waits: bool) -> bool:
    """Whether a filter of `FILTERS` shows a case.

    Args:
        wanted: the filter.
        quality_level: likely quality: low, medium or high.
        state: of its review.
        waits: whether it waits for a decision.
    """
    if wanted == "waiting":
        return waits
    return wanted in ("all", state) or (wanted == "low" and quality_level == "low")


def _is_waiting(case: Case) -> bool:
    """Whether a predicted case waits for a decision: not one that was labelled without looking at its prediction."""
    if case.role is Role.UNLABELLED:
        return case.review in (Review.NOT_SEEN, Review.SKIPPED, Review.DRAFT)
    return case.role is Role.LABELLED and case.review == Review.DRAFT


def random_order(cases: Iterable[str], training: str | None) -> list[str]:
    """Cases in an order that only chance decided, the same each time it is asked for."""
    return sorted(cases, key=lambda case: hashlib.sha256(f"{training}/{case}".encode()).digest())


def score(project: Project, rated: Quality | None = None) -> Score | None:
    """The honest mean of the current training; None until `FEWEST` random cases were decided.

    Of every five decisions one case was drawn in advance from all predicted ones, without looking at its quality; a
    drawn case counts also when somebody had decided about it before, and those after one that is not decided yet do not
    count. So these are a simple random sample. The interval is Student's with the correction for a finite cohort, the
    spread taken as at least `SPREAD`: a few cases that happen to be alike know nothing of the others. When all are
    decided the mean is that of all.
    """
    rated = rated or quality(project, predictions(project))
    decided = _decided(project)
    population = _population(project, rated)
    all_decided = set(population) <= set(decided)
    draws = random_order(population, project.state.current_training)
    values = []
    for case in draws if all_decided else draws[: len(decided) // EVERY]:
        dice = _dice_of(decided.get(case))
        if dice is None:
            break
        values.append(dice)
    if len(values) < (2 if all_decided else FEWEST):
        return None
    count, cases = len(values), len(population)
    mean, spread = float(np.mean(values)), max(float(np.std(values, ddof=1)), SPREAD)
    finite = math.sqrt(max(cases - count, 0) / max(cases - 1, 1))
    half = _student(count - 1) * spread / math.sqrt(count) * finite
    return Score(mean, max(0.0, mean - half), min(1.0, mean + half), count, cases)


def advice(project: Project, rated: Quality | None = None) -> Advice:
    """Go on or enough, by one rule.

    Enough: the lower end of the random cases' interval is at least `GOOD_ENOUGH`, or no scan is without a label and
    nothing waits. Else train again when `WORTH_A_TRAINING` cases have labels that a person drew or mended and the
    current training does not know, or nothing waits. Else review on.
    """
    rated = rated or quality(project, predictions(project))
    if not rated.estimates:
        return Advice("train", "there are no predictions yet")
    found = score(project, rated)
    corrected = len(_drawn_since(project))
    rejected = sum(one.after == Review.REJECTED for one in _decided(project).values())
    cases = {case.id: case for case in project.state.cases}
    waiting = sum(_is_waiting(cases[name]) for name in rated.estimates)
    if found is not None and found.low >= GOOD_ENOUGH:
        known = f"the mean Dice of all {found.cases} predictions is {found.mean:.2f}"
        likely = f"at 95 % the mean Dice of the predictions is at least {found.low:.2f}"
        return Advice("enough", f"{known if found.of_all else likely}; {GOOD_ENOUGH:.2f} is enough")
    if not project.state.with_role(Role.UNLABELLED):  # a training would have nothing to segment
        if waiting:
            return Advice("review", "what was painted is not saved yet")
        return Advice("enough", "every scan has a label of its own; add scans to go on")
    if corrected and (corrected >= WORTH_A_TRAINING or not waiting):
        which = "case was" if corrected == 1 else "cases were"
        first = f" (to know how good these predictions are, review on: {_until_a_mean(project, rated)})"
        return Advice(
            "train",
            f"{corrected} {which} labelled or corrected since the last training; train again with them"
            + (first if found is None and waiting else ""),
        )
    if not waiting and rejected:
        return Advice(
            "train",
            f"{rejected} {'prediction was' if rejected == 1 else 'predictions were'} rejected and none corrected; "
            "label some of these cases by hand and train again",
        )
    if not waiting:
        return Advice("enough", "every prediction was decided about and none needed a correction")
    if found is None:
        return Advice("review", f"correct the worst; {_until_a_mean(project, rated)}")
    return Advice("review", f"the mean Dice may be as low as {found.low:.2f}; correct the worst")


def _drawn_since(project: Project) -> list[str]:
    """Cases whose label in force a person drew or mended, and that the current training does not know but could."""
    learned = labels_of_training(project, project.state.current_training)
    if not learned:  # an older program did not write down what it learned from
        return [case.id for case in project.state.with_role(Role.LABELLED) if case.review == Review.CORRECTED]
    return [
        case.id
        for case in project.state.with_role(Role.TEMPLATE, Role.LABELLED)
        if case.review != Review.ACCEPTED
        and learned.get(case.id) != case.label_version
        and project.lies_somewhere(case)  # a training would leave it out
    ]


def _until_a_mean(project: Project, rated: Quality) -> str:
    """What the mean still waits for."""
    needed = min(FEWEST * EVERY, len(_population(project, rated)))
    decided = _decided(project)
    if (left := needed - len(decided)) > 0:
        return f"a mean is shown after {left} more {'decision' if left == 1 else 'decisions'}"
    draws = random_order(_population(project, rated), project.state.current_training)
    unknown = [case for case in draws[:FEWEST] if _dice_of(decided.get(case)) is None]
    return f"a mean is shown when {', '.join(unknown)}, drawn at random, is decided"


def _population(project: Project, rated: Quality) -> list[str]:
    """The predicted cases that the mean speaks of: those whose prediction a person decides about. Excluded ones, those
    that were labelled without looking at it, and those decided by an earlier prediction are none of them."""
    known, decided = {case.id: case for case in project.state.cases}, _decided(project)
    roles = (Role.UNLABELLED, Role.LABELLED)
    return [
        case for case in rated.estimates if _is_waiting(known[case]) or (case in decided and known[case].role in roles)
    ]


def _dice_of(decision: Decision | None) -> float | None:
    """Dice of what was seen with what was saved; 0 for a rejected prediction; None where it is not known."""
    if decision is None:
        return None
    return 0.0 if decision.after == Review.REJECTED else decision.mean_dice


def _decided(project: Project) -> dict[str, Decision]:
    """Case -> the decision in force about its prediction by the current training."""
    current, rows = project.state.current_training, predictions(project)
    last = {case: made[-1] for case, made in decisions(project).items() if made}
    mine = {case: one for case, one in last.items() if one.training == current and one.after in _DECIDED}
    # one that was stopped, and resumed after the decision, predicted the case anew
    return {case: one for case, one in mine.items() if case not in rows or one.began.is_that_of(rows[case])}


def _student(freedom: int) -> float:
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.4 / freedom + 3 / freedom**2
