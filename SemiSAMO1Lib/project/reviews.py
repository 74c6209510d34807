"""Review: what a person decides about each prediction, and the steps that are possible.

A decision is one change of the project and one line in reviews.jsonl with the state before; undo adds the inverse.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..job import JobFolder
from ..job.watch import is_under_way, trainings
from . import drafts
from .began import Began
from .cases import Case, Review, Role
from .history import Decision, decisions
from .label_reader import DoubtfulLabel, LabelError, LabelReading, read_labels
from .results import (
    asked_about,
    goes_on_predicting,
    is_as_made,
    prediction_seen,
    predictions,
    read_once,
    values_of_training,
)
from .store import Project, ProjectError, require_as_seen

#: Labels that overlap the prediction by a smaller Dice are asked about: they may be another scan's, or mirrored.
LEAST_OVERLAP = 0.2

#: Labels are asked about whose Dice with the case's prediction is below the first, and with that of another case larger
#: by more than the second: where scans have one grid, a file's grid does not tell whose it is.
RATHER_ANOTHERS = (0.8, 0.1)

_OPEN = frozenset({Review.ACCEPTED, Review.CORRECTED, Review.REJECTED, Review.SKIPPED, Review.DRAFT})

#: State -> states that a person may bring a case to. A draft is begun by painting; accepted and corrected are reopened
#: by it, their label stays in force until the new one is finished.
TRANSITIONS: dict[Review, frozenset[Review]] = {
    Review.NOT_SEEN: _OPEN,
    Review.SKIPPED: _OPEN,
    Review.DRAFT: frozenset({Review.CORRECTED, Review.NOT_SEEN}),
    Review.ACCEPTED: frozenset({Review.DRAFT}),
    Review.CORRECTED: frozenset({Review.DRAFT}),
    Review.REJECTED: frozenset(),
}


def accept(
    project: Project,
    case_id: str,
    absent: list[int] | None = None,
    reviewer: str | None = None,
    training: str | None = None,
    seen: Case | None = None,
) -> Case:
    """The prediction becomes the case's label: it is copied, no label ever points into a job.

    Args:
        project, case_id: whose.
        absent: label values that are really not in this scan. Labels that were added after the training are unknown
            in it.
        reviewer: who decided; None: the account.
        training: whose prediction the person saw; None: the current one's.
        seen: the case as it was when the person opened it; None: as it is now.

    Raises:
        ProjectError: no prediction, or its file was changed, the state does not allow it, somebody else decided
            meanwhile, there is unfinished painting of it, or there are newer predictions than the one that was seen.
        LabelError: a label was not found and not declared absent.
    """
    case = _may(project, case_id, Review.ACCEPTED, seen)
    row = _predicted(project, case, "accept", training)
    if not is_as_made(row):
        raise ProjectError(
            f"the file of {case.id}'s prediction is not as {row['training']} made it ({row['prediction']}). "
            "If you mended it, save it as a correction."
        )
    _require_no_painting(project, case, reviewer)
    project.add_label(
        case.id,
        row["prediction"],
        origin="accepted",
        role=Role.LABELLED,
        absent=absent or (),
        reviewer=reviewer,
        review=Review.ACCEPTED,
        seen=case,
        began=Began.of_row(row),
        asked=asked_about(project, case.id, row["training"]),
        note=lambda reading: _lesson(project, row, reading.volume.array, reading),
    )
    return project.state.case(case.id)


def correct(
    project: Project,
    case_id: str,
    labels: Path,
    absent: list[int] | None = None,
    reviewer: str | None = None,
    add_labels: bool = False,
    sure: bool = False,
    began: Began | None = None,
    seen: Case | None = None,
    priority: Sequence[int] | None = None,
    given: Collection[int] | None = None,
) -> Case:
    """Labels that a person drew or mended become the case's label; a draft of the case ends.

    Args:
        project, case_id: whose.
        labels: any label file; on another grid it is resampled, and that is written into the label's notes.
        absent: label values that are really not in this scan.
        reviewer: who decided; None: the account.
        add_labels: take segments that the project does not know into its label table.
        sure: take it although it looks like another case's.
        began: the prediction that the person began from, with which what is saved is measured; None: what the draft
            says, else the current one.
        seen: the case as it was when the person opened it; None: as it is now.
        priority: which value wins where segments overlap; None: they are refused.
        given: label values that there were when the labels were drawn, as of `Project.add_label`.

    Raises:
        ProjectError: the state does not allow it, somebody else decided meanwhile, or gave a new label's value away.
        LabelError: the file cannot be used.
        DoubtfulLabel: it looks like another case's, hardly overlaps what was predicted, or is nothing else.
    """
    case = _may(project, case_id, Review.CORRECTED, seen)
    latest = predictions(project).get(case.id)
    if began is None:
        draft = drafts.began_from(project, case) if drafts.find_draft(project, case.id) is not None else None
        began = Began.of_row(latest) if draft is None else draft
    row = prediction_seen(project, case.id, began)
    predicted = _voxels(case, row)
    if not sure:
        beside = predicted if row is not None else _voxels(case, latest)
        _require_likeness(project, labels, case, beside, began.training if row is not None else None, priority)

    def said(reading: LabelReading) -> dict[str, Any]:
        if not sure and predicted is not None and np.array_equal(reading.volume.array, predicted):
            raise DoubtfulLabel(
                f"{labels.name} is the prediction of {case.id} itself, voxel for voxel: was it saved after it was "
                "mended? What is right as it is, is accepted."
            )
        return _lesson(project, row, predicted, reading)

    project.add_label(
        case.id,
        labels,
        origin="corrected",
        role=Role.LABELLED,
        absent=absent or (),
        add_labels=add_labels,
        priority=priority,
        reviewer=reviewer,
        review=Review.CORRECTED,
        seen=case,
        refuse_doubts=not sure,
        began=began,
        asked=asked_about(project, case.id, began.training or project.state.current_training),
        given=given,
        note=said,
    )
    drafts.discard_draft(project, case.id, reviewer)
    return project.state.case(case.id)


def reject(
    project: Project,
    case_id: str,
    reviewer: str | None = None,
    training: str | None = None,
    seen: Case | None = None,
) -> Case:
    """The prediction is useless: the next training takes no pseudo-label from it. Arguments as of `accept`."""
    return _decide(project, case_id, Review.REJECTED, reviewer, training, seen)


def skip(
    project: Project,
    case_id: str,
    reviewer: str | None = None,
    training: str | None = None,
    seen: Case | None = None,
) -> Case:
    """Decide later: the case goes to the end of the queue. Arguments as of `accept`."""
    return _decide(project, case_id, Review.SKIPPED, reviewer, training, seen)


def begin_draft(project: Project, case_id: str, reviewer: str | None = None, seen: Case | None = None) -> Case:
    """A person paints: the case is a draft until the painting is saved or discarded; its label stays in force.

    A template, and a case that is one already, stay as they are. Raises ProjectError: somebody else decided about the
    case since it was `seen`.
    """
    case = project.refresh().case(case_id)
    if case.review != Review.DRAFT:
        require_as_seen(case, seen)
    if case.role is Role.TEMPLATE or Review.DRAFT not in TRANSITIONS[case.review]:
        return case
    return project.restore(case.id, Review.DRAFT, case.role, case.label_version, case, reviewer, {})


def discard_draft(project: Project, case_id: str, reviewer: str | None = None, seen: Case | None = None) -> Case:
    """What was painted is thrown away; the case is what it was before. Raises ProjectError."""
    case = project.settled().case(case_id)
    require_as_seen(case, seen)
    made = decisions(project).get(case.id, [])
    if case.review == Review.DRAFT and made and made[-1].after == Review.DRAFT:
        case = _take_back(project, case, made[-1], reviewer)
    elif case.review == Review.DRAFT:  # its line is lost
        origin = project.label_record(case)["origin"] if case.label_version is not None else ""
        before = Review(origin) if origin in (Review.ACCEPTED, Review.CORRECTED) else Review.NOT_SEEN
        case = project.restore(case.id, before, case.role, case.label_version, seen=case)
    drafts.discard_draft(project, case.id, reviewer)
    return case


def undo(project: Project, case_id: str, reviewer: str | None = None, seen: Case | None = None) -> Case:
    """Take the last decision about a case back: state, role and label are those before it.

    A label that the case was given in another way since then stays in force. The painting of a correction becomes a
    draft again, if there is none. Where the decision's line is lost the case waits again, without its label. Raises
    ProjectError; a draft is not undone, but saved or discarded.
    """
    case = project.settled().case(case_id)
    require_as_seen(case, seen)
    if case.role is Role.EXCLUDED:
        raise ProjectError(f"case {case.id} is excluded; include it first")
    made = decisions(project).get(case.id, [])
    if case.review == Review.DRAFT:
        raise ProjectError(f"case {case.id} is a draft: save what was painted as a correction, or discard it")
    if case.review != Review.NOT_SEEN and (not made or made[-1].after != case.review):  # its line is lost
        labelled = case.role is Role.LABELLED and case.review in (Review.ACCEPTED, Review.CORRECTED)
        role, label = (Role.UNLABELLED, None) if labelled else (case.role, case.label_version)
        if labelled and case.review == Review.CORRECTED:
            drafts.restore_draft(project, case.id, project.label_path(case), Began(), reviewer)
        return project.restore(case.id, Review.NOT_SEEN, role, label, seen=case)
    if not made:
        raise ProjectError(f"nothing was decided about case {case.id}; there is nothing to undo")
    last = made[-1]
    present = predictions(project).get(case.id)
    earlier = last.training is not None and not last.began.is_that_of(present)
    if case.review == Review.NOT_SEEN and last.after == Review.REJECTED and earlier:
        raise ProjectError(
            f"nothing was decided about the current prediction of case {case.id}; what was decided about that of "
            f"{last.training} stays: use that training again to take it back"
        )
    if last.after == Review.CORRECTED and case.label_version == last.label is not None:
        drafts.restore_draft(project, case.id, project.label_path(case), last.began, reviewer)
    return _take_back(project, case, last, reviewer)


def use_training(project: Project, training: str) -> None:
    """Let the predictions of another training count. Rejected are those of its predictions that were, and no others.

    Raises ProjectError: there is no such training, it has no predictions, or it is under way and replaces them.
    """
    if is_under_way(JobFolder(project.jobs / training)):
        raise ProjectError(f"{training} is under way; its predictions count when it has ended")
    project.use_training(training, _rejected_of(project, training))


def finish_training(project: Project, training: str) -> bool:
    """A training has ended: its predictions count from now on, and all wait that nobody has seen. Not where those of a
    newer one count: it was resumed, and knows less. Returns whether they count."""
    current = project.refresh().current_training
    if current is not None and current > training and JobFolder(project.jobs / current).index.is_file():
        return False
    project.use_training(training, _rejected_of(project, training))
    return True


def _rejected_of(project: Project, training: str) -> set[str]:
    """Cases whose present prediction by a training was rejected."""
    rows = predictions(project, training)
    about = [[one for one in made if one.began.is_that_of(rows.get(one.case))] for made in decisions(project).values()]
    return {made[-1].case for made in about if made and made[-1].after == Review.REJECTED}


def not_yet_heeded(project: Project) -> set[str]:
    """Cases that wait again after a rejection of which no training knew when it began, and about whose new prediction
    nobody decided: the next training takes no pseudo-label from them."""
    made = decisions(project)
    last = {
        case.id: made[case.id][-1]
        for case in project.state.with_role(Role.UNLABELLED)
        if case.review == Review.NOT_SEEN and made.get(case.id)
    }
    refused = {case: one.training for case, one in last.items() if one.after == Review.REJECTED and one.training}
    heeded: dict[str, set[str]] = {}
    for job in trainings(project.jobs) if refused else ():
        listed = read_once(job.inputs / "cases.json") or {}
        heeded[job.id] = {row["id"] for row in listed.get("cases", ()) if row.get("review") == Review.REJECTED}
    return {
        case
        for case, training in refused.items()
        if not any(case in cases for job, cases in heeded.items() if job > training)
    }


def _take_back(project: Project, case: Case, last: Decision, reviewer: str | None) -> Case:
    role, label = last.role_before, last.label_before
    if case.label_version != last.label or case.role is Role.TEMPLATE:
        role, label = case.role, case.label_version
    before = last.before
    if label is None and before in (Review.ACCEPTED, Review.CORRECTED):  # its label was taken out of force meanwhile
        before = Review.NOT_SEEN
    found = project.restore(case.id, before, role, label, case, reviewer, {"undo": True})
    if unlearned := set(last.added) - values_of_training(project):
        project.retire_labels(unlearned)
    return found


def _decide(
    project: Project, case_id: str, to: Review, reviewer: str | None, training: str | None, seen: Case | None
) -> Case:
    """Change the state alone."""
    case = _may(project, case_id, to, seen)
    row = _predicted(project, case, "review", training)
    _require_no_painting(project, case, reviewer)
    facts: dict[str, Any] = Began.of_row(row).to_json()
    if to is Review.REJECTED:
        facts["signals"] = _signals_of(row)
    return project.restore(case.id, to, case.role, case.label_version, case, reviewer, facts)


def _predicted(project: Project, case: Case, action: str, training: str | None = None) -> dict[str, Any]:
    """The case's row in the current results. Raises ProjectError where there is none, or another one was seen."""
    current = project.refresh().current_training
    row = predictions(project).get(case.id)
    if row is None or row["prediction"] is None:
        raise ProjectError(f"case {case.id} has no prediction of the current training; there is nothing to {action}")
    if training is not None and training != current:
        raise ProjectError(f"{case.id} was predicted anew by {current} since you opened it; look at that one first")
    if goes_on_predicting(JobFolder(project.jobs / row["training"])):
        raise ProjectError(
            f"{row['training']} goes on and predicts {case.id} anew with each round; {action} it when that has ended, "
            "or stop it"
        )
    return row


def _require_likeness(
    project: Project,
    labels: Path,
    case: Case,
    predicted: NDArray[Any] | None,
    training: str | None,
    priority: Sequence[int] | None,
) -> None:
    """Raise DoubtfulLabel for labels that overlap the prediction by next to nothing (of a mirrored scan, say), or that
    are rather what was predicted of another case."""
    try:
        drawn = read_labels(labels, case.geometry, priority).volume.array
    except LabelError:
        return  # whoever takes the label says what is wrong with it
    if predicted is None or not predicted.any():
        return
    dice = _dice(drawn > 0, predicted > 0)
    if dice < LEAST_OVERLAP:
        raise DoubtfulLabel(
            f"{labels.name} overlaps the prediction of {case.id} by a Dice of {dice:.2f} alone: is it its label?"
        )
    enough, better = RATHER_ANOTHERS
    if dice >= enough:
        return
    rows = predictions(project, training)
    same = [one for one in project.state.cases if one.id != case.id and one.geometry.same_grid(case.geometry)]
    for one in same:
        theirs = _voxels(one, rows.get(one.id))
        if theirs is not None and (other := _dice(drawn > 0, theirs > 0)) > dice + better:
            raise DoubtfulLabel(
                f"{labels.name} overlaps the prediction of {one.id} by a Dice of {other:.2f}, that of {case.id} by "
                f"{dice:.2f}: is it its label?"
            )


def _voxels(case: Case, row: dict[str, Any] | None) -> NDArray[Any] | None:
    """Label values of a prediction on the scan's grid; None where it is not there any more, or was changed since."""
    if row is None or row["prediction"] is None or not is_as_made(row):
        return None
    try:
        return read_labels(row["prediction"], case.geometry, allow_empty=True).volume.array
    except (LabelError, OSError):
        return None


def _require_no_painting(project: Project, case: Case, reviewer: str | None) -> None:
    """Raise ProjectError where a decision would leave a person's unfinished painting behind."""
    if drafts.find_draft(project, case.id) is not None:
        raise ProjectError(
            f"there is unfinished painting of case {case.id}{drafts.by_whom(project, case.id, reviewer)}. "
            "Save it as a correction, or discard it."
        )


def _may(project: Project, case_id: str, to: Review, seen: Case | None) -> Case:
    """The case, if its state allows the step. Raises ProjectError saying what is possible."""
    case = project.refresh().case(case_id)
    require_as_seen(case, seen)
    now = case.review
    if case.role in (Role.TEMPLATE, Role.EXCLUDED):
        raise ProjectError(f"case {case.id} is {case.role}; it is not reviewed")
    if case.role is Role.LABELLED and now in (Review.NOT_SEEN, Review.SKIPPED) and to is not Review.CORRECTED:
        raise ProjectError(f"case {case.id} was labelled by a person; its prediction is not reviewed any more")
    if now is Review.DRAFT and to not in TRANSITIONS[now]:
        raise ProjectError(f"case {case.id} is a draft: save what was painted as a correction, or discard it")
    if to not in TRANSITIONS[now]:
        raise ProjectError(f"case {case.id} is {now} and cannot become {to}. Take that decision back first (undo).")
    return case


def _lesson(
    project: Project, row: dict[str, Any] | None, predicted: NDArray[Any] | None, reading: LabelReading
) -> dict[str, Any]:
    """What a label that is saved says about the prediction: its Dice for each label, and the signals of quality that it
    had.

    Nothing where the prediction is not there any more: the label is saved all the same.
    """
    if row is None or predicted is None:
        return {}
    saved, rows = reading.volume.array, row["scores"].get("labels", {})
    known = [int(value) for value in rows] or project.state.labels.values  # labels added later were not predicted
    if saved is predicted:  # accepted as it is
        dice = dict.fromkeys(known, 1.0)
    else:
        dice = {value: _dice(saved == value, predicted == value) for value in known}
    return {**Began.of_row(row).to_json(), "dice": dice, "signals": _signals_of(row)}


def _signals_of(row: dict[str, Any]) -> dict[str, Any]:
    """Label value -> the signals of quality that a prediction had."""
    rows = row["scores"].get("labels", {})
    return {value: one["signals"] for value, one in rows.items() if one.get("signals")}


def _dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    total = int(np.count_nonzero(one)) + int(np.count_nonzero(other))
    return round(2 * int(np.count_nonzero(one & other)) / total, 4) if total else 1.0
