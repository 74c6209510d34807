"""Review from the shell, as in the panel: the queue, decisions about its cases, what is left out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..job.watch import running_training, trainings
from ..project import Case, Project, ProjectError, Review, Role
from ..project import reviews as review
from ..project.began import Began
from ..project.drafts import by_whom, find_draft
from ..project.history import decisions, unreadable_lines
from ..project.queue import Score, advice, lets_through
from ..project.queue import queue as waiting_cases
from ..project.queue import score as honest_score
from ..project.results import changes, is_as_made, predictions, quality
from ..quality import ENOUGH
from .console import Json, ProjectPath, err, existing_file, guarded, next_step, out, register, say
from .given_labels import as_volume_file, parsed_priority

CaseName = Annotated[str, typer.Option("--case", help="The case.", show_default=False)]
Seen = Annotated[
    str | None, typer.Option("--training", help="Whose prediction you looked at; refused if it is not the current one.")
]
Absent = Annotated[list[int] | None, typer.Option(help="A label value that is not in this scan (repeatable).")]


class Shown(StrEnum):
    """The filters of the queue that may let something through which waits for a decision."""

    ALL = "all"
    LOW = "low"
    DRAFT = "draft"
    SKIPPED = "skipped"


@guarded
def queue(
    project: ProjectPath,
    show: Annotated[
        Shown, typer.Option(help="all that wait, those of low likely quality, drafts, or skipped ones.")
    ] = Shown.ALL,
    as_json: Json = False,
) -> None:
    """List the predictions that wait for a decision, the worst first; every fifth is drawn at random."""
    opened = Project(project)
    _say_unreadable(opened)
    rated = quality(opened, predictions(opened))
    waiting = [one for one in waiting_cases(opened, rated) if lets_through(show.value, one.level, one.state, True)]
    if as_json:
        keys = ("case", "state", "score", "level", "random")
        of_all = {"error": rated.error, "checked": rated.checked, "training": opened.state.current_training}
        print(json.dumps([{**{key: getattr(one, key) for key in keys}, **of_all} for one in waiting]))
        return
    if not rated.estimates:
        busy = running_training(opened.jobs)
        broken_off = trainings(opened.jobs)[-1:] if opened.state.current_training is None else []
        step = next_step("status" if busy else "resume" if broken_off else "train", project)
        text = f"{busy.id} is under way; its predictions are not there yet" if busy else "There are no predictions yet"
        out.print(f"{text}. {step}", soft_wrap=True)
        return
    if not waiting and show is not Shown.ALL:
        out.print(f"Nothing of this kind ({show}) waits. {next_step('queue', project)}")
        return
    if not waiting:
        out.print(f"Nothing waits for a decision. {next_step('score', project)}", soft_wrap=True)
        return
    table = Table("case", "state", "likely quality", "offered because")
    for one in waiting:
        shown = "nothing found" if one.score is None else one.level
        if rated.checked and one.score is not None:
            shown += f", Dice {one.score:.2f} ± {rated.error:.2f}"
        table.add_row(one.case, one.state.replace("_", " "), shown, "drawn at random" if one.random else "")
    out.print(table)
    if not rated.checked:
        out.print(f"Likely quality is not yet checked on your scans: {rated.reviewed} of {ENOUGH} are reviewed.")
    folder = predictions(opened)[waiting[0].case]["prediction"]
    if folder is not None:
        text = f"To be mended, a copy of: {folder.parent.parent}/CASE/{folder.name}"
        out.print(text, soft_wrap=True)
    first, training = waiting[0].case, opened.state.current_training
    if (painted := find_draft(opened, first)) is not None:
        step = next_step("correct", project, "--case", first, "--labels", painted)
        out.print(f"{step} (it is a draft; or discard)", soft_wrap=True)
        return
    step = next_step("accept", project, "--case", first, "--training", training)
    out.print(f"{step} (or correct --labels FILE, reject, skip)", soft_wrap=True)


@guarded
def score(project: ProjectPath, as_json: Json = False) -> None:
    """Say how good the predictions were, from the cases drawn at random, and whether to go on."""
    opened = Project(project)
    _say_unreadable(opened)
    rated = quality(opened, predictions(opened))
    found, said, learned = honest_score(opened, rated), advice(opened, rated), changes(opened)
    value = {
        "score": None if found is None else vars(found),
        "verdict": said.verdict,
        "reason": said.reason,
        "reviewed": [vars(one) for one in learned],
    }
    mean = ""
    if found is not None:
        interval = "" if found.of_all else f" (95 %: {found.low:.3f} to {found.high:.3f})"
        mean = (
            f"Mean Dice of what was seen {found.mean:.3f}{interval}, from {_whose(found)}; an accepted prediction "
            "counts 1, a rejected one 0. "
        )
    lines = [f"{mean}{said.verdict.capitalize()}: {said.reason}."]
    lines += [f"Reviewed before, predicted anew: {one.in_words}" for one in learned]
    say(value, as_json, "\n".join(lines))


def _whose(found: Score) -> str:
    """The cases that a mean is of."""
    if found.of_all:
        return f"all {found.cases} cases"
    return f"{found.reviewed} of {found.cases} cases, drawn at random"


@guarded
def accept(
    project: ProjectPath, case: CaseName, absent: Absent = None, training: Seen = None, as_json: Json = False
) -> None:
    """Take a prediction as the case's label: it counts in the next training."""
    opened = Project(project)
    _say(opened, review.accept(opened, case, absent, training=training), as_json)


@guarded
def correct(
    project: ProjectPath,
    case: CaseName,
    labels: Annotated[
        Path, typer.Option(help="The corrected labels: .seg.nrrd, label map, or .h5.", show_default=False)
    ],
    absent: Absent = None,
    training: Annotated[str | None, typer.Option(help="Whose prediction you mended; else the current one's.")] = None,
    add_labels: Annotated[bool, typer.Option("--add-labels", help="Take segments that the project lacks.")] = False,
    priority: Annotated[str | None, typer.Option(help="Which label wins where segments overlap, e.g. 2,1.")] = None,
    sure: Annotated[bool, typer.Option("--sure", help="It is this case's, even if it looks like another's.")] = False,
    as_json: Json = False,
) -> None:
    """Give a case corrected labels: they count in the next training."""
    opened, order = Project(project), parsed_priority(priority)
    known = opened.state.case(case).id
    painted = find_draft(opened, known)
    if painted is not None and not painted.samefile(existing_file(labels)):
        saved = next_step("correct", project, "--case", known, "--labels", painted)
        raise ProjectError(
            f"there is unfinished painting of case {known}{by_whom(opened, known)}. Save that, or discard it first "
            f"({shlex.join(['semisamo1', 'discard', str(project), '--case', known])}). {saved}"
        )
    rows = predictions(opened, training)
    if training is not None and not rows:
        raise ProjectError(f"{training} is not a training of this project with predictions")
    before, row = opened.state.labels.values, rows.get(known)
    began = Began.of_row(row) if training is not None and painted is None else None
    as_made, given = row is None or is_as_made(row), existing_file(labels)
    with as_volume_file(given) as volume:
        changed = review.correct(
            opened, case, volume, absent, add_labels=add_labels, sure=sure, began=began, priority=order
        )
    if row is not None and not as_made:
        text = f"note: {row['prediction']} is not as {row['training']} made it; how good it was is not counted"
        err.print(text, soft_wrap=True)
    for label in opened.state.labels:
        if label.value not in before:
            text = f"note: label {label.value} ({label.name}) is new; in labels that were saved before it is unknown"
            err.print(text, soft_wrap=True)
    for note in opened.label_record(changed)["notes"]:
        err.print(f"note: {note}", soft_wrap=True)
    _say(opened, changed, as_json)


@guarded
def reject(project: ProjectPath, case: CaseName, training: Seen = None, as_json: Json = False) -> None:
    """The prediction is useless: the next training takes no pseudo-label from it and predicts it again."""
    opened = Project(project)
    _say(opened, review.reject(opened, case, training=training), as_json)


@guarded
def skip(project: ProjectPath, case: CaseName, training: Seen = None, as_json: Json = False) -> None:
    """Decide later: the case goes to the end of the queue."""
    opened = Project(project)
    _say(opened, review.skip(opened, case, training=training), as_json)


@guarded
def undo(project: ProjectPath, case: CaseName, as_json: Json = False) -> None:
    """Take the last decision about a case back."""
    opened = Project(project)
    changed = review.undo(opened, case)
    _say(opened, changed, as_json)
    if find_draft(opened, changed.id) is not None and not as_json:
        drop = shlex.join(["semisamo1", "discard", str(project), "--case", changed.id])
        out.print(f"Its correction is kept as a draft; throw it away with: {drop}", soft_wrap=True)


@guarded
def discard(project: ProjectPath, case: CaseName, as_json: Json = False) -> None:
    """Throw away what was painted in a case and not saved; it is what it was before."""
    opened = Project(project)
    known = opened.state.case(case)
    if find_draft(opened, known.id) is None and known.review != Review.DRAFT:
        raise ProjectError(f"there is no unfinished painting of case {known.id}")
    _say(opened, review.discard_draft(opened, case), as_json)


@guarded
def exclude(project: ProjectPath, case: CaseName, as_json: Json = False) -> None:
    """Leave a case out: it is not trained on, predicted or exported, until it is included again."""
    opened = Project(project)
    if opened.state.case(case).role is Role.TEMPLATE:
        text = "warning: this is the template; the next training begins from another labelled scan, if there is one"
        err.print(text, soft_wrap=True)
    _say(opened, opened.exclude(case), as_json)


@guarded
def include(project: ProjectPath, case: CaseName, as_json: Json = False) -> None:
    """Take an excluded case in again, as what it was."""
    opened = Project(project)
    _say(opened, opened.include(case), as_json)


@guarded
def use(
    project: ProjectPath,
    training: Annotated[str, typer.Option(help="The training, such as 0002-train.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Let the predictions of an earlier training count again."""
    review.use_training(Project(project), training)
    say({"current_training": training}, as_json, f"The predictions of {training} count. {next_step('queue', project)}")


def _say_unreadable(project: Project) -> None:
    """A review file that was damaged is no secret: what it lost is not counted."""
    if count := unreadable_lines(project):
        err.print(f"warning: {count} lines of {project.reviews} cannot be read and are left out", soft_wrap=True)


def _say(project: Project, case: Case, as_json: bool) -> None:
    value = {"case": case.id, "state": case.review, "role": str(case.role), "label_version": case.label_version}
    made = decisions(project).get(case.id, [])
    training = made[-1].training if made and made[-1].after == case.review else None
    label = f", label version {case.label_version}" if case.label_version is not None else ""
    seen = f", prediction of {training}" if training is not None else ""
    text = f"{case.id} is {case.review.replace('_', ' ')} ({case.role}{label}{seen})"
    say({**value, "training": training}, as_json, text)


def add_to(app: typer.Typer) -> None:
    """Put these commands into the shell."""
    examples: dict[Callable[..., None], str] = {
        queue: "semisamo1 queue ~/study --json",
        score: "semisamo1 score ~/study",
        accept: "semisamo1 accept ~/study --case scan_007",
        correct: "semisamo1 correct ~/study --case scan_008 --labels mended.seg.nrrd",
        reject: "semisamo1 reject ~/study --case scan_009",
        skip: "semisamo1 skip ~/study --case scan_010",
        undo: "semisamo1 undo ~/study --case scan_009",
        discard: "semisamo1 discard ~/study --case scan_008",
        exclude: "semisamo1 exclude ~/study --case scan_011",
        include: "semisamo1 include ~/study --case scan_011",
        use: "semisamo1 use ~/study --training 0002-train",
    }
    register(app, examples)
