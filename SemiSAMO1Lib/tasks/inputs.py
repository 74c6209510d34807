"""What a training job may read: its own inputs folder, and the images named there. No other label."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import files
from ..engine.cases import EngineCase, LabelledCase
from ..image_io import UnreadableImage
from ..job.folder import JobFolder
from ..project import LabelError, LabelTable, Project, Review, read_labels
from ..project.case_rows import checked_volume, find_image
from ..volume import Geometry, StoredVolume, Volume


class UnusableTemplate(ValueError):
    """A labelled case cannot be used: nothing may start."""


@dataclass(frozen=True)
class ClassMap:
    """Label values of the project and the class indices 0..C-1 of the engine; 0 is background in both."""

    values: tuple[int, ...]

    @classmethod
    def of(cls, table: LabelTable) -> ClassMap:
        return cls((0, *table.values))

    @property
    def classes(self) -> int:
        return len(self.values)

    def to_indices(self, labels: Volume) -> Volume:
        """Label values -> class indices, uint8 or uint16. Raises LabelError for a value that the table lacks."""
        if unknown := sorted(set(np.unique(labels.array).tolist()) - set(self.values)):
            raise LabelError(f"label values {unknown} are not in the label table {list(self.values[1:])}")
        lookup = np.zeros(int(max(self.values)) + 1, np.uint16)
        lookup[list(self.values)] = np.arange(self.classes)
        kind = np.uint8 if self.classes <= 256 else np.uint16
        return Volume(lookup[labels.array].astype(kind), labels.geometry)

    def to_values(self, indices: Volume) -> Volume:
        """Class indices -> label values, uint8 or uint16."""
        kind = np.uint8 if max(self.values) <= 255 else np.uint16
        return Volume(np.asarray(self.values, kind)[indices.array], indices.geometry)


@dataclass(frozen=True)
class Inputs:
    """Everything a training reads."""

    table: LabelTable
    class_map: ClassMap
    labelled: list[LabelledCase]
    cases: list[EngineCase]
    skipped: list[dict[str, str]]


def read_inputs(job: JobFolder) -> Inputs:
    """Read a training's inputs; cases that cannot be used are listed, an unusable template stops everything.

    Raises:
        UnusableTemplate: a labelled case's image or label cannot be read, was changed, or shows nothing.
    """
    listing = files.read_json(job.inputs / "cases.json")
    table = LabelTable.from_json(job.spec()["labels"])
    class_map, labelled = read_labelled(job)
    cases: list[EngineCase] = []
    skipped: list[dict[str, str]] = list(listing.get("left_out", []))
    project = project_of(job)
    for row in listing["cases"]:
        try:
            path = find_image(row, project)
        except UnreadableImage as error:
            skipped.append({"name": row["id"], "reason": str(error)})
            continue
        trainable = row.get("review") != Review.REJECTED
        cases.append(EngineCase(row["id"], Geometry.from_json(row), partial(checked_volume, path), trainable))
    return Inputs(table, class_map, labelled, cases, skipped)


def project_of(job: JobFolder) -> Project | None:
    """The project that a job belongs to; None for a job folder by itself."""
    return Project(job.project) if (job.project / "project.json").exists() else None


def read_labelled(job: JobFolder) -> tuple[ClassMap, list[LabelledCase]]:
    """The labelled cases of a training alone. Raises UnusableTemplate."""
    class_map = ClassMap.of(LabelTable.from_json(job.spec()["labels"]))
    if class_map.classes < 2:
        raise UnusableTemplate("the label table is empty: label the template first")
    rows = files.read_json(job.inputs / "cases.json")["labelled"]
    return class_map, [_labelled(job, row, class_map, stored=number > 0) for number, row in enumerate(rows)]


def _labelled(job: JobFolder, row: dict[str, Any], class_map: ClassMap, stored: bool) -> LabelledCase:
    """A labelled case, read and checked; `stored`: it is read again when it is needed, and not kept in memory."""
    try:
        scan, path = find_image(row, project_of(job)), job.inputs / row["label"]
        image = checked_volume(scan)
        if files.sha256(path) != row["sha256"]:
            raise LabelError(f"{path} was changed after the training was started")

        def indices(geometry: Geometry = image.geometry) -> Volume:
            nothing_there = not set(row.get("present", [None]))  # a person said so
            return class_map.to_indices(read_labels(path, geometry, allow_empty=nothing_there).volume)

        label = indices()
        if stored:
            image = StoredVolume(image.geometry, lambda: checked_volume(scan).array)
            label = StoredVolume(label.geometry, lambda: indices().array)
    except (UnreadableImage, LabelError, OSError) as error:
        raise UnusableTemplate(f"labelled case {row['id']} cannot be used: {error}") from error
    index = {value: number for number, value in enumerate(class_map.values)}
    return LabelledCase(
        id=row["id"],
        image=image,
        label=label,
        weight=row["weight"],
        origin=row["origin"],
        unknown=tuple(index[value] for value in row["unknown"]),
    )
