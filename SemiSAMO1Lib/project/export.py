"""What leaves the project: the segmentation of every case, labels first, then predictions, and a table of both."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..image_io import write_volume
from ..job.folder import JobFolder, JobKind
from ..volume import Volume
from .cases import Case, Review, Role, said_origin, without_folders
from .history import decided_by, left_out_by, seen_to_saved
from .label_reader import read_labels
from .label_table import LabelTable
from .label_writer import write_segmentation
from .results import Quality, current_training, is_as_made, predictions, quality, values_of_training
from .store import MissingImage, Project, ProjectError

#: Format -> ending of its files. `dicom-seg` needs the original series.
FORMATS = {"nrrd": ".seg.nrrd", "nifti": ".nii.gz", "dicom-seg": ".dcm"}

#: The table that every export holds, and the one of predictions of further scans.
TABLE, PREDICTIONS = "volumes.csv", "predictions.csv"

#: What each format's last export into a folder wrote.
_LIST = "exported.json"

_COLUMNS = ("case", "scan", "file", "what", "origin", "by", "time", "state", "value", "label", "volume_ml")
_SCORES = ("uncertainty_percent", "likely_dice", "likely_dice_error", "likely_dice_checked", "dice_seen_to_saved")


@dataclass(frozen=True)
class Exported:
    """One case as it is exported.

    Attributes:
        case: which.
        source: its label in force or its prediction.
        what: label or prediction.
        origin: template, imported, corrected, accepted or predicted.
        by: the reviewer, or the training.
        time: when it was saved; empty for a prediction.
        known: the label values that it says something of; others were added later.
        scores: label value -> row of the results, for a prediction.
        likely: label value -> likely Dice, for a prediction.
        rated: likely quality of all predictions: its error, and whether it was checked on this project's scans.
        seen: label value -> Dice between the prediction that a person saw and the label that was saved.
    """

    case: Case
    source: Path
    what: str
    origin: str
    by: str
    time: str
    known: frozenset[int]
    scores: Mapping[str, Any]
    likely: Mapping[int, float]
    rated: Quality
    seen: Mapping[int, float] = field(default_factory=dict)

    def read(self) -> Volume:
        """Label values (z, y, x) on the scan's grid."""
        return read_labels(self.source, self.case.geometry, allow_empty=True).volume


def chosen(project: Project) -> tuple[list[Exported], list[tuple[str, str]]]:
    """What is exported, and (case, reason) of what is left out."""
    state = project.refresh()
    rows = predictions(project)
    rated = quality(project, rows)
    predicted_labels = values_of_training(project) if rows else frozenset()
    found, left_out = [], []
    for case in state.cases:
        try:
            one = _choose(project, case, rows.get(case.id), rated, predicted_labels)
        except ProjectError as error:
            left_out.append((case.id, said_outside(str(error), project, case)))
            continue
        if isinstance(one, str):
            left_out.append((case.id, one))
        else:
            found.append(one)
    return found, left_out


def said_outside(reason: str, project: Project, case: Case) -> str:
    """Why a case is left out, for those who get the export."""
    return without_folders(reason, [*project.image_places(case), project.folder, project.folder.resolve()])


def _choose(
    project: Project, case: Case, row: dict[str, Any] | None, rated: Quality, predicted_labels: frozenset[int]
) -> Exported | str:
    if case.role is Role.EXCLUDED:
        return f"excluded{left_out_by(project, case)}"
    with suppress(MissingImage):  # of a changed image neither label nor prediction holds
        project.image_path(case)
    if case.label_version is not None:
        record = project.label_record(case)
        path = project.label_path(case)
        who, when = record.get("reviewer", ""), record.get("time", "")
        known = frozenset(record["declared"])
        seen = seen_to_saved(project, case)
        return Exported(case, path, "label", record["origin"], who, when, known, {}, {}, rated, seen)
    if case.review == Review.REJECTED:
        return f"its prediction was rejected{decided_by(project, case)}"
    if row is None or row["prediction"] is None:
        return "no label and no prediction"
    if not row["prediction"].is_file():
        return f"its prediction is missing: {row['prediction']}"
    if not is_as_made(row):
        return f"the file of its prediction is not as {row['training']} made it; what was mended is a correction"
    likely = rated.estimates[case.id].labels
    scores, training = row["scores"].get("labels", {}), row["training"]
    path = row["prediction"]
    return Exported(case, path, "prediction", "predicted", training, "", predicted_labels, scores, likely, rated)


def require_output(project: Project, folder: Path, kind: str) -> None:
    """Raise ProjectError for an unknown format, or a folder where an export could overwrite something."""
    if kind not in FORMATS:
        raise ProjectError(f"unknown format {kind!r}; there are: {', '.join(FORMATS)}")
    if folder.is_file():
        raise ProjectError(f"{folder} is a file. Give a folder for the segmentations.")
    if folder.resolve() == project.folder.resolve() or project.folder.resolve() in folder.resolve().parents:
        raise ProjectError(f"{folder} is in the project. Export into a folder of its own.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / TABLE).is_file():
        raise ProjectError(f"{folder} holds other files. Export into an empty folder, or one of an earlier export.")


def request_export(project: Project, folder: Path, kind: str, dicom: Path | None = None) -> JobFolder:
    """Make the job folder of an export; see `require_output` for what is refused."""
    require_output(project, folder, kind)
    if kind == "dicom-seg" and (dicom is None or not dicom.is_dir()):
        raise ProjectError("DICOM SEG needs the folder of the original series. Name it, or export as NRRD.")
    where = {"output": str(folder.resolve()), "dicom": str(dicom.resolve()) if dicom else None}
    return JobFolder.create(project.jobs, JobKind.EXPORT, {**where, "format": kind}, [])


def request_report(project: Project) -> JobFolder:
    """Make the job folder that writes the current training's report anew, with all that was reviewed since. Raises
    ProjectError where nothing was trained."""
    training = current_training(project).id
    output = project.jobs / training / "report.html"
    return JobFolder.create(project.jobs, JobKind.REPORT, {"training": training, "output": str(output.resolve())}, [])


def request_bundle(project: Project, path: Path) -> JobFolder:
    """Make the job folder that writes the current training's networks as one .zip file. Raises ProjectError."""
    current_training(project)
    if path.suffix.lower() != ".zip":
        raise ProjectError(f"{path.name}: a bundle is one .zip file; give a name with that ending")
    return JobFolder.create(project.jobs, JobKind.BUNDLE, {"output": str(path.resolve())}, [])


def request_predictions(
    project: Project, images: Path, folder: Path, kind: str = "nrrd", device: str = "auto"
) -> JobFolder:
    """Make the job folder that applies the current training to a folder of further scans. Raises ProjectError."""
    training = current_training(project).id
    if not images.is_dir():
        raise ProjectError(f"{images} is not a folder. Give the folder that holds the scans.")
    if kind not in ("nrrd", "nifti"):
        raise ProjectError(f"format {kind!r}: predictions of further scans are written as nrrd or nifti")
    own = project.folder.resolve()
    target, source = folder.resolve(), images.resolve()
    if own in (target, *target.parents) or source in (target, *target.parents) or target in source.parents:
        raise ProjectError(
            f"{folder} holds the scans, or is in the project. Give the segmentations a folder of their own."
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PREDICTIONS).is_file():
        raise ProjectError(f"{folder} holds other files. Give an empty folder, or one of an earlier call.")
    where = {"images": str(images.resolve()), "output": str(folder.resolve())}
    parameters = {**where, "training": training, "device": device, "format": kind}
    return JobFolder.create(project.jobs, JobKind.PREDICT, parameters, [])


def write_labels(path: Path, labels: Volume, table: LabelTable, kind: str, review: str | None = None) -> None:
    """Write one segmentation as NRRD (names, colours, codes and Slicer's status with it) or NIfTI (values alone)."""
    if kind == "nrrd":
        write_segmentation(path, labels, table, review)
    else:
        write_volume(path, labels)


def volumes_of(labels: Volume, table: LabelTable) -> dict[int, float]:
    """Label value -> volume in ml."""
    voxel_ml = float(np.prod(labels.geometry.spacing)) / 1000
    counts = np.bincount(labels.array.reshape(-1), minlength=max(table.values, default=0) + 1)
    return {value: int(counts[value]) * voxel_ml for value in table.values}


def rows_of(one: Exported, labels: Volume, table: LabelTable, file: str) -> Iterator[dict[str, Any]]:
    """The lines of the table for one case, one a label; of a label that was added later nothing is said."""
    volumes = volumes_of(labels, table)
    for label in table:
        score = one.scores.get(str(label.value), {})
        likely = one.likely.get(label.value)
        uncertainty = score.get("uncertainty")
        yield {
            "case": one.case.id,
            "scan": one.case.name,
            "file": file,
            "what": one.what,
            "origin": said_origin(one.origin, one.case.role is Role.TEMPLATE),
            "by": one.by,
            "time": one.time,
            "state": one.case.review,
            "value": label.value,
            "label": label.name,
            "volume_ml": f"{volumes[label.value]:.4f}" if label.value in one.known else "",
            "uncertainty_percent": "" if uncertainty is None else f"{100 * uncertainty:.1f}",
            "likely_dice": "" if likely is None else f"{likely:.3f}",
            "likely_dice_error": "" if likely is None else f"{one.rated.error:.3f}",
            "likely_dice_checked": "" if likely is None else "yes" if one.rated.checked else "not yet on these scans",
            "dice_seen_to_saved": f"{one.seen[label.value]:.4f}" if label.value in one.seen else "",
        }


def clear_earlier(folder: Path, kind: str, planned: Iterable[str]) -> None:
    """Remove what earlier exports of this format wrote; mark the folder as one of an export, and note the files that
    are about to be written: an export that is ended by force leaves some of them."""
    names = set(_written(folder).get(kind, ()))
    for name in names | listed_files(folder / TABLE):  # an older program wrote no list
        if name.endswith(FORMATS[kind]) and Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    write_tables(folder, kind, [], [])
    files.write_json(folder / _LIST, {**_written(folder), kind: sorted(planned)})


def listed_files(path: Path) -> set[str]:
    """Files that the table of an export, or of predictions, names; none where there is no table."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return {name for row in csv.DictReader(io.StringIO(text)) if (name := row.get("file"))}


def _written(folder: Path) -> dict[str, list[str]]:
    """Format -> files of the last export of it into a folder; the table is that of the last export alone."""
    path = folder / _LIST
    return dict(files.read_json(path)) if path.is_file() else {}


def write_tables(folder: Path, kind: str, rows: list[dict[str, Any]], left_out: list[tuple[str, str]]) -> None:
    """`volumes.csv`, `left_out.csv` with the reasons, and `exported.json`, what each format's last export wrote.

    An export that wrote nothing leaves the table of another format's files, which are still there.
    """
    files.write_json(folder / _LIST, {**_written(folder), kind: sorted({row["file"] for row in rows})})
    if rows or all(name.endswith(FORMATS[kind]) for name in listed_files(folder / TABLE)):
        files.write_text(folder / TABLE, table_as_text((*_COLUMNS, *_SCORES), rows))
    listed = [{"case": case, "reason": reason} for case, reason in left_out]
    files.write_text(folder / "left_out.csv", table_as_text(("case", "reason"), listed))


def table_as_text(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    """Rows as CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
