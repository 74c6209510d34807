"""The report of a training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import files
from ..engine.evaluation.report import CasePage, render_report
from ..engine.observer import Observer, Silent, stop_if_asked
from ..image_io import UnreadableImage, read_volume
from ..job.folder import JobFolder
from ..project import LabelTable, Project, read_labels
from ..project.case_rows import find_image
from ..project.cases import said_origin, without_folders
from ..project.results import changes, quality
from .compare import compare, references_of
from .reporter import Reporter


def report(job: JobFolder, reporter: Reporter) -> None:
    """The report job: parameters `training` (job id), `output`, `references` (folder or null)."""
    reporter.handshake()
    parameters = job.spec()["parameters"]
    references = parameters.get("references")
    training = JobFolder(job.path.parent / parameters["training"])
    write_report(training, Path(parameters["output"]), Path(references) if references else None, reporter)


def write_report(job: JobFolder, path: Path, references: Path | None = None, observer: Observer | None = None) -> None:
    """Write one self-contained HTML file about a training's results; the observer gets progress, and may stop it."""
    index = files.read_json(job.index)
    rows = index["cases"]
    measures: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    truth: dict[str, Path] = {}
    if references is not None:
        predictions = {row["case"]: job.results / row["prediction"] for row in rows}
        values = LabelTable.from_json(job.spec()["labels"]).values
        truth = references_of(Project(job.project), references)
        measures = compare(predictions, truth, values=values)
        first = {row["case"]: job.results / "0" / row["case"] / "prediction.seg.nrrd" for row in rows}
        if index["round"] > 0 and all(path.is_file() for path in first.values()):
            before = compare(first, truth, distances=False, values=values)
    events, _ = files.read_lines(job.events)
    project = Project(job.project)
    listed = files.read_json(job.inputs / "cases.json")
    labelled = listed["labelled"]
    places = {row["id"]: row["places"] for kind in ("labelled", "cases") for row in listed[kind]}
    html = render_report(
        title=project.state.name,
        table=LabelTable.from_json(job.spec()["labels"]).to_json(),
        pages=_pages(job, rows, truth, places, observer or Silent()),
        losses=[event for event in events if event["kind"] == "losses"],
        measures=measures,
        before=before,
        facts={
            "training": job.id,
            "created": job.spec()["created"],
            "round": index["round"],
            "labelled": [
                f"{row['id']} ({said_origin(row['origin'], is_template=not number)})"
                for number, row in enumerate(labelled)
            ],
            "learned": [one.in_words for one in changes(project, job.id)],
            "checked": quality(project, {row["case"]: row for row in rows}).checked,
            "parameters": files.read_json(job.work / "config.json"),
            "environment": files.read_json(job.work / "environment.json"),
            "plan": files.read_json(job.work / "plan.json"),
            "skipped": [
                {**row, "reason": _said_outside(row["name"], row["reason"], project, places)}
                for row in index["skipped"]
            ],
        },
    )
    files.write_text(path, html)


def _said_outside(case: str, reason: str, project: Project, places: dict[str, list[str]]) -> str:
    """Why a scan was left out, for those who get the report."""
    further = [place for one in project.state.cases if one.id == case for place in project.image_places(one)]
    return without_folders(reason, [*places.get(case, ()), *further, project.folder, project.folder.resolve()])


def _pages(
    job: JobFolder,
    rows: list[dict[str, Any]],
    truth: dict[str, Path],
    places: dict[str, list[str]],
    observer: Observer,
) -> Iterator[CasePage]:
    """One case after the other, worst first, each read when it is drawn."""
    listing = {row["id"]: row for row in files.read_json(job.inputs / "cases.json")["cases"]}
    by_case = {row["case"]: row for row in rows}
    project = Project(job.project)
    rated = quality(project, by_case)
    for position, row in enumerate(by_case[case] for case in rated.worst_first()):
        level = rated.estimates[row["case"]].level
        stop_if_asked(observer)
        observer.event("progress", stage="drawing", done=position, of=len(rows), fraction=position / len(rows))
        try:
            image = read_volume(find_image(listing[row["case"]], project))
            reference = truth.get(row["case"])
        except UnreadableImage as error:
            note = _said_outside(row["case"], str(error), project, places)
            yield CasePage(row["case"], None, None, None, row["scores"], note=note, quality=level)
            continue
        yield CasePage(
            case=row["case"],
            image=image,
            prediction=read_volume(job.results / row["prediction"]),
            uncertainty=read_volume(job.results / row["uncertainty"]),
            scores=row["scores"],
            quality=level,
            reference=read_labels(reference, image.geometry, allow_empty=True).volume if reference else None,
        )
