"""Review: what a person decided about each prediction, the steps that are possible, and the queue of what comes next.

A decision is one change of the project and one line in reviews.jsonl with the state before; undo adds the inverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from .. import files
from .cases import Case, Role
from .label_reader import read_labels
from .store import Project, ProjectError


class Review(StrEnum):
    """States of a case's review. A training changes one of them alone: rejected becomes not_seen."""

    NOT_SEEN = "not_seen"
    SKIPPED = "skipped"
    DRAFT = "draft"
    ACCEPTED = "accepted"
    CORRECTED = "corrected"
    REJECTED = "rejected"


_OPEN = frozenset({Review.ACCEPTED, Review.CORRECTED, Review.REJECTED, Review.SKIPPED, Review.DRAFT})

#: State -> states that a person may bring a case to. A draft is begun by painting; accepted and corrected are reopened
#: by it, their label stays in force until the new one is finished.
TRANSITIONS: dict[Review, frozenset[Review]] = {
    Review.NOT_SEEN: _OPEN,
    Review.SKIPPED: _OPEN,
    Review.DRAFT: frozenset({Review.CORRECTED, Review.NOT_SEEN}),
    Review.ACCEPTED: frozenset({Review.DRAFT}),
    Review.CORRECTED: frozenset({Review.DRAFT, Review.CORRECTED}),
    Review.REJECTED: frozenset(),
}


@dataclass(frozen=True)
class Waiting:
    """A case in the queue.

    Attributes:
        case: its id.
        state: of its review.
        score: mean uncertainty of its labels, 0 to 1; None where nothing was found, which comes first.
    """

    case: str
    state: Review
    score: float | None


def queue(project: Project) -> list[Waiting]:
    """Predicted cases that nobody decided about: the least certain first, ties by id, skipped ones at the end."""
    predicted = predictions(project)
    cases = {case.id: case for case in project.state.cases}  # as `predictions` just read them
    waiting = []
    for name in worst_first(predicted):
        state = Review(cases[name].review)
        if cases[name].role is not Role.EXCLUDED and state in (Review.NOT_SEEN, Review.SKIPPED):
            waiting.append(Waiting(name, state, predicted[name]["scores"]["label_uncertainty"]))
    return sorted(waiting, key=lambda one: one.state is Review.SKIPPED)


def worst_first(predicted: Mapping[str, dict[str, Any]]) -> list[str]:
    """Cases by the uncertainty of their labels, the least certain first, ties by id; nothing found is the worst."""

    def order(case: str) -> tuple[float, str]:
        doubt = predicted[case]["scores"]["label_uncertainty"]
        return -1.0 if doubt is None else -doubt, case

    return sorted(predicted, key=order)


def predictions(project: Project) -> dict[str, dict[str, Any]]:
    """Case id -> its row in the results of the current training; empty before the first one.

    Rows have the files as whole paths and the training beside the scores. Raises ValueError for a damaged index.
    """
    current = project.refresh().current_training
    index = project.jobs / current / "results" / "index.json" if current is not None else None
    if index is None or not index.is_file():
        return {}
    known = {case.id for case in project.state.cases}
    found = {}
    for row in files.read_json(index)["cases"]:
        places = {key: index.parent / row[key] for key in ("prediction", "uncertainty") if key in row}
        if row["case"] in known:
            found[row["case"]] = {**row, **places, "training": current}
    return found


def accept(project: Project, case_id: str, absent: list[int] | None = None, reviewer: str | None = None) -> Case:
    """The prediction becomes the case's label: it is copied, no label ever points into a job.

    Args:
        project, case_id: whose.
        absent: label values that are really not in this scan.
        reviewer: who decided; None: the account.

    Raises:
        ProjectError: no prediction, or the state does not allow it.
        LabelError: a label was not found and not declared absent.
    """
    case = _may(project, case_id, Review.ACCEPTED)
    row = predictions(project).get(case.id)
    if row is None:
        raise ProjectError(f"case {case.id} has no prediction of the current training; there is nothing to accept")
    project.add_label(
        case.id, row["prediction"], "accepted", Role.LABELLED, absent or (), reviewer=reviewer, review="accepted"
    )
    return _noted(project, case, reviewer, training=project.state.current_training)


def correct(
    project: Project, case_id: str, labels: Path, absent: list[int] | None = None, reviewer: str | None = None
) -> Case:
    """Labels that a person drew or mended become the case's label. Raises ProjectError or LabelError."""
    case = _may(project, case_id, Review.CORRECTED)
    project.add_label(case.id, labels, "corrected", Role.LABELLED, absent or (), reviewer=reviewer, review="corrected")
    seen = predictions(project).get(case.id)
    agreement = _agreement(project, case.id, seen["prediction"]) if seen is not None else None
    return _noted(project, case, reviewer, training=project.state.current_training, dice_seen_to_saved=agreement)


def reject(project: Project, case_id: str, reviewer: str | None = None) -> Case:
    """The prediction is useless: the next training takes no pseudo-label from it. Raises ProjectError."""
    return _decide(project, case_id, Review.REJECTED, reviewer)


def skip(project: Project, case_id: str, reviewer: str | None = None) -> Case:
    """Decide later: the case goes to the end of the queue. Raises ProjectError."""
    return _decide(project, case_id, Review.SKIPPED, reviewer)


def undo(project: Project, case_id: str, reviewer: str | None = None) -> Case:
    """Take the last decision about a case back: state, role and label are those before it. Raises ProjectError."""
    case = project.refresh().case(case_id)
    lines, _ = files.read_lines(project.folder / "reviews.jsonl")
    history: list[dict[str, Any]] = []
    for line in lines:
        if line["case"] == case.id:
            history.pop() if line.get("undo") else history.append(line)
    if not history:
        raise ProjectError(f"nothing was decided about case {case.id}; there is nothing to undo")
    last = history[-1]
    project.restore(case.id, last["before"], Role(last["role_before"]), last["label_before"])
    return _noted(project, case, reviewer, undo=True)


def _decide(project: Project, case_id: str, to: Review, reviewer: str | None) -> Case:
    case = _may(project, case_id, to)
    if case.id not in predictions(project):
        raise ProjectError(f"case {case.id} has no prediction of the current training; there is nothing to review")
    project.restore(case.id, str(to), case.role, case.label_version)
    return _noted(project, case, reviewer, training=project.state.current_training)


def _may(project: Project, case_id: str, to: Review) -> Case:
    """The case, if its state allows the step. Raises ProjectError saying what is possible."""
    case = project.refresh().case(case_id)
    now = Review(case.review)
    if case.role in (Role.TEMPLATE, Role.EXCLUDED):
        raise ProjectError(f"case {case.id} is {case.role}; it is not reviewed")
    if to not in TRANSITIONS[now]:
        possible = ", ".join(sorted(TRANSITIONS[now])) or "none"
        raise ProjectError(
            f"case {case.id} is {now} and cannot become {to}. Possible: {possible}; or undo the decision first."
        )
    return case


def _noted(project: Project, before: Case, reviewer: str | None, **facts: Any) -> Case:
    """Write the decision down; returns the case as it is now."""
    after = project.state.case(before.id)
    was = {"role_before": str(before.role), "label_before": before.label_version, "label": after.label_version}
    who = {"reviewer": reviewer} if reviewer is not None else {}
    project.append_review(before.id, before.review, after.review, **was, **facts, **who)
    return after


def _agreement(project: Project, case_id: str, seen: Path) -> float | None:
    """Dice over all labels together between the prediction that a person saw and the label that was then saved."""
    case = project.state.case(case_id)
    grid = case.geometry
    saved = read_labels(project.label_path(case), grid, allow_empty=True).volume.array > 0
    predicted = read_labels(seen, grid, allow_empty=True).volume.array > 0
    total = int(saved.sum()) + int(predicted.sum())
    return round(2 * int((saved & predicted).sum()) / total, 4) if total else None
