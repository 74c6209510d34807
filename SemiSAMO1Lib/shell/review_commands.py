"""semisamo1 queue, accept, correct, reject, skip, undo: review from the shell, as in the panel."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..project import Case, Project
from ..project import reviews as review
from .console import guarded, out, say

ProjectPath = Annotated[Path, typer.Argument(help="The project folder.", show_default=False)]
CaseName = Annotated[str, typer.Option("--case", help="The case.", show_default=False)]
Absent = Annotated[list[int] | None, typer.Option(help="A label value that is not in this scan (repeatable).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


@guarded
def queue(project: ProjectPath, as_json: Json = False) -> None:
    """List the predictions that wait for a decision, the least certain first."""
    waiting = review.queue(Project(project))
    if as_json:
        print(json.dumps([{"case": one.case, "state": str(one.state), "score": one.score} for one in waiting]))
        return
    if not waiting:
        out.print("Nothing waits for a decision.")
        return
    table = Table("case", "state", "uncertainty, %")
    for one in waiting:
        shown = "nothing found" if one.score is None else f"{100 * one.score:.0f}"
        table.add_row(one.case, str(one.state).replace("_", " "), shown)
    out.print(table)


@guarded
def accept(project: ProjectPath, case: CaseName, absent: Absent = None, as_json: Json = False) -> None:
    """Take a prediction as the case's label: it counts in the next training."""
    _say(review.accept(Project(project), case, absent), as_json)


@guarded
def correct(
    project: ProjectPath,
    case: CaseName,
    labels: Annotated[Path, typer.Option(help="The corrected labels: .seg.nrrd or label map.", show_default=False)],
    absent: Absent = None,
    as_json: Json = False,
) -> None:
    """Give a case corrected labels: they count in the next training."""
    _say(review.correct(Project(project), case, labels, absent), as_json)


@guarded
def reject(project: ProjectPath, case: CaseName, as_json: Json = False) -> None:
    """The prediction is useless: the next training takes no pseudo-label from it and predicts it again."""
    _say(review.reject(Project(project), case), as_json)


@guarded
def skip(project: ProjectPath, case: CaseName, as_json: Json = False) -> None:
    """Decide later: the case goes to the end of the queue."""
    _say(review.skip(Project(project), case), as_json)


@guarded
def undo(project: ProjectPath, case: CaseName, as_json: Json = False) -> None:
    """Take the last decision about a case back."""
    _say(review.undo(Project(project), case), as_json)


def _say(case: Case, as_json: bool) -> None:
    value = {"case": case.id, "state": case.review, "role": str(case.role), "label_version": case.label_version}
    label = f", label version {case.label_version}" if case.label_version is not None else ""
    say(value, as_json, f"{case.id} is {case.review.replace('_', ' ')} ({case.role}{label})")


def add_to(app: typer.Typer) -> None:
    """Put these commands into the shell."""
    examples: dict[Callable[..., None], str] = {
        queue: "semisamo1 queue ~/study --json",
        accept: "semisamo1 accept ~/study --case scan_007",
        correct: "semisamo1 correct ~/study --case scan_008 --labels mended.seg.nrrd",
        reject: "semisamo1 reject ~/study --case scan_009",
        skip: "semisamo1 skip ~/study --case scan_010",
        undo: "semisamo1 undo ~/study --case scan_009",
    }
    for command, example in examples.items():
        app.command(epilog=f"Example: {example}")(command)
