"""Segment one further scan with a finished training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..engine.data.store import Store
from ..engine.further import FinishedRun
from ..engine.observer import Observer, Silent
from ..image_io import SUFFIXES, UnreadableImage, suffix_of, write_volume
from ..job.folder import JobFolder
from ..project import LabelTable, Project, Review, Role
from ..project.case_rows import checked_volume
from ..project.label_writer import write_segmentation
from ..project.results import current_training
from .inputs import ClassMap, read_labelled
from .train import config_of


def predict_file(
    project: Project,
    scan: Path,
    output: Path,
    uncertainty: Path | None = None,
    device: str = "auto",
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Segment `scan` with the project's current training and write the segmentation; returns its scores.

    Raises:
        ProjectError: there is no finished training.
        UnreadableImage: the scan cannot be used.
    """
    if not scan.is_file():
        raise FileNotFoundError(f"{scan} {'is a folder; give one file' if scan.is_dir() else 'does not exist'}")
    for path in filter(None, (output, uncertainty)):
        _require_writable(project, scan, path)
    if uncertainty is not None and uncertainty.resolve() == output.resolve():
        raise ValueError(f"segmentation and uncertainty cannot both be written to {output}")
    job = current_training(project)
    table = LabelTable.from_json(job.spec()["labels"])
    run, class_map = finished_run(job, device, observer or Silent())
    try:
        volume = checked_volume(scan)
    except UnreadableImage as error:
        raise UnreadableImage(f"{scan.name} {error}") from error
    result = run.segment(volume)
    labels = class_map.to_values(result.prediction)
    if suffix_of(output) == ".seg.nrrd":
        write_segmentation(output, labels, table, Review.NOT_SEEN)
    else:
        write_volume(output, labels)
    if uncertainty is not None:
        write_volume(uncertainty, result.uncertainty)
    doubt = doubt_of(job, result.scores)
    found = np.unique(labels.array).tolist()
    return {"mean_uncertainty": result.scores["uncertainty"], "values": found, "warning": doubt}


def _require_writable(project: Project, scan: Path, path: Path) -> None:
    """Raise ValueError for an output of unknown format, or one that is a scan: that would be overwritten."""
    if suffix_of(path) not in (*SUFFIXES, ".seg.nrrd"):
        raise ValueError(f"{path.name}: unknown format; possible are .seg.nrrd, {', '.join(SUFFIXES)}")
    if path.resolve() == scan.resolve():
        raise ValueError(f"{path} is the scan itself; it would be overwritten. Choose another output")
    for case in project.refresh().cases:
        if path.resolve() in {place.resolve() for place in project.image_places(case)} and path.exists():
            raise ValueError(f"{path} is the scan of case {case.id}; it would be overwritten. Choose another output")


def doubt_of(job: JobFolder, scores: dict[str, Any]) -> str:
    """A warning where a prediction is far less certain than those of the project's own scans, or where the labels may
    lie elsewhere than was looked; else nothing."""
    if warning := scores.get("warning"):
        return str(warning)
    own = [row["scores"]["label_uncertainty"] for row in files.read_json(job.index)["cases"]]
    known = [value for value in own if value is not None]
    mine = scores["label_uncertainty"]
    if mine is None:
        return "no label was found in this scan. Does it show the same anatomy in the same kind of image?"
    if known and mine > max(known):
        return (
            f"less certain than for every scan that the training segmented (uncertainty {mine:.0%}; theirs at most "
            f"{max(known):.0%}). "
            "Look at it closely: does the scan show the same anatomy in the same kind of image?"
        )
    return ""


def finished_run(job: JobFolder, device: str, observer: Observer) -> tuple[FinishedRun, ClassMap]:
    """A finished training, ready to segment further scans."""
    config = config_of(job).model_copy(update={"device": device})
    class_map, labelled = read_labelled(job)
    features = job.project / "cache" / "features"
    store, without = Store(job.work), _not_believed(Project(job.project))
    return FinishedRun(labelled, class_map.classes, config, store, observer, features, without), class_map


def _not_believed(project: Project) -> list[str]:
    """Cases whose prediction a person rejected, drew otherwise or left out since it was made."""
    refused = (Review.REJECTED, Review.CORRECTED)
    return [case.id for case in project.refresh().cases if case.review in refused or case.role is Role.EXCLUDED]
