"""Segment one further scan with a finished training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..engine.cases import CaseResult
from ..engine.data.store import Store
from ..engine.observer import Observer, Silent
from ..image_io import SUFFIXES, suffix_of, write_volume
from ..job.folder import JobFolder
from ..project import LabelTable, Project
from ..project.label_writer import write_segmentation
from .inputs import ClassMap, checked_volume, read_labelled
from .report import current_training
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
        raise FileNotFoundError(f"{scan} does not exist")
    for path in filter(None, (output, uncertainty)):
        if suffix_of(path) not in (*SUFFIXES, ".seg.nrrd"):
            raise ValueError(f"{path.name}: unknown format; possible are .seg.nrrd, {', '.join(SUFFIXES)}")
    job = current_training(project)
    table = LabelTable.from_json(job.spec()["labels"])
    result = _segment(job, scan, device, observer or Silent())
    labels = ClassMap.of(table).to_values(result.prediction)
    if suffix_of(output) == ".seg.nrrd":
        write_segmentation(output, labels, table)
    else:
        write_volume(output, labels)
    if uncertainty is not None:
        write_volume(uncertainty, result.uncertainty)
    return {"mean_uncertainty": result.scores["uncertainty"], "values": np.unique(labels.array).tolist()}


def _segment(job: JobFolder, scan: Path, device: str, observer: Observer) -> CaseResult:
    from ..engine.further import segment_one

    config = config_of(job).model_copy(update={"device": device})
    class_map, labelled = read_labelled(job)
    features = job.project / "cache" / "features"
    return segment_one(checked_volume(scan), labelled, class_map.classes, config, Store(job.work), observer, features)
