"""From the project to a job: what a training will use is copied into its folder at the moment of pressing Train."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import files
from ..choices import full_name
from ..job.folder import JobFolder, JobKind
from ..job.watch import running_training
from .case_rows import case_row
from .cases import Case, Review, Role
from .reviews import not_yet_heeded
from .store import Project, ProjectError

#: As `continue_from`: the current training, where it has weights and the new one has the same shape; else from scratch.
LAST = "last"

#: How much a label counts beside others in training, by origin.
WEIGHTS = {"template": 1.0, "imported": 1.0, "corrected": 0.8, "accepted": 0.5}


def reasons_against_training(project: Project, thorough: bool = True) -> list[str]:
    """Why training cannot start, in words that a person can act on; empty when it can.

    Without its template there is none; another labelled case that cannot be used is left out (`request_training`).

    Args:
        project: whose.
        thorough: read images and labels to see whether they were changed; else only whether they are there.
    """
    state = project.refresh()
    reasons = []
    labelled = state.with_role(Role.TEMPLATE, Role.LABELLED)
    if not state.cases:
        reasons.append("the project has no scans: add a folder of scans")
    elif not labelled:
        reasons.append("no scan is labelled: label one as the template")
    elif not state.with_role(Role.UNLABELLED):
        reasons.append("there is no unlabelled scan to segment: add scans")
    for case in state.with_role(Role.TEMPLATE) or state.with_role(Role.LABELLED)[:1]:  # it stands for the template
        if thorough:
            reasons += [reason] if (reason := _reason_against(project, case)) else []
        elif not any(path.is_file() for path in project.image_places(case)):
            reasons.append(f"the image of the template {case.id} is missing: bring it back, or locate its folder")
    other = running_training(project.jobs)
    if other is not None:
        reasons.append(f"training {other.id} is under way: wait for it, or stop it")
    return reasons


def _reason_against(project: Project, case: Case) -> str:
    """Why a labelled case cannot be used: image or label is missing or was changed; empty where it can."""
    try:
        project.image_path(case)
        project.label_path(case)
    except ProjectError as error:
        return str(error)
    return ""


def request_training(project: Project, parameters: dict[str, Any]) -> JobFolder:
    """Make the job folder of a training: parameters, label table, copies of the labels, the list of cases.

    Labelled cases besides the template whose image or label is missing or was changed are left out and named there.

    Args:
        project: whose.
        parameters: of the training; `continue_from` names an earlier training whose weights it begins with, or `LAST`.

    Raises:
        ProjectError: training cannot start; all reasons are named.
    """
    if reasons := reasons_against_training(project):
        raise ProjectError("training cannot start: " + "; ".join(reasons))
    state = project.state
    if parameters.get("continue_from") == LAST:
        parameters = {**parameters, **_going_on_if_possible(project)}
    if isinstance(learner := parameters.get("learner"), str):  # whoever reads the job knows one name of each
        parameters = {**parameters, "learner": full_name(learner)}
    start = _start_of(project, parameters.get("continue_from"))
    job = JobFolder.create(project.jobs, JobKind.TRAIN, parameters, state.labels.to_json())
    labelled = [*state.with_role(Role.TEMPLATE), *state.with_role(Role.LABELLED)]
    against = {case.id: _reason_against(project, case) for case in labelled[1:]}  # the first was looked at above
    rows = [_labelled_row(project, job, case) for case in labelled if not against.get(case.id)]
    refused = not_yet_heeded(project)
    cases = [
        case_row(project, replace(case, review=Review.REJECTED) if case.id in refused else case)
        for case in state.with_role(Role.UNLABELLED)
    ]
    left_out = [{"name": name, "reason": reason} for name, reason in against.items() if reason]
    files.write_json(job.inputs / "cases.json", {"labelled": rows, "cases": cases, "left_out": left_out})
    for name, path in start.items():
        with files.atomic_path(job.inputs / "start" / name) as temporary:
            shutil.copyfile(path, temporary)
    return job


def _going_on_if_possible(project: Project) -> dict[str, Any]:
    """Parameters that go on from the current training, or begin from scratch where it has no weights; whether its
    network fits is known to the worker."""
    current = project.state.current_training
    try:
        return {"continue_from": current if _start_of(project, current) else None, "if_possible": True}
    except ProjectError:
        return {"continue_from": None}


def _start_of(project: Project, training: str | None) -> dict[str, Path]:
    """Files of an earlier training that a new one goes on from: its plan, configuration and last weights, and what it
    cut out of its scans, if it did."""
    if training is None:
        return {}
    work = JobFolder(project.jobs / training).work
    rounds = sorted((work / "weights").glob("round-*.pt"), key=lambda path: int(path.stem.partition("-")[2]))
    found = {"plan.json": work / "plan.json", "config.json": work / "config.json"}
    if not rounds or not all(path.is_file() for path in found.values()):
        raise ProjectError(f"training {training} has no weights to go on from. Finish it, or train from scratch.")
    parts = work / "surroundings.json"
    return {**found, "weights.pt": rounds[-1], **({parts.name: parts} if parts.exists() else {})}


def _labelled_row(project: Project, job: JobFolder, case: Case) -> dict[str, Any]:
    record = project.label_record(case)
    source = project.label_path(case)
    with files.atomic_path(job.inputs / "labels" / f"{case.id}.seg.nrrd") as temporary:
        shutil.copyfile(source, temporary)
    said = set(record["declared"])
    unknown = [value for value in project.state.labels.values if value not in said]
    return {
        **case_row(project, case),
        "label": f"labels/{case.id}.seg.nrrd",
        "version": case.label_version,
        "sha256": record["sha256"],
        "origin": record["origin"],
        "weight": WEIGHTS.get(record["origin"], 1.0),
        "present": sorted(said - set(record.get("absent", ()))),
        "unknown": unknown,
    }
