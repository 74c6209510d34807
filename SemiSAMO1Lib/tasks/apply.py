"""The predict job: a finished training applied to a folder of further scans, which do not become cases."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import __version__, files
from ..engine.observer import PartOfMore, stop_if_asked
from ..image_io import write_volume
from ..job.folder import JobFolder
from ..project import LabelTable, Project, Review, Skipped
from ..project.case_rows import checked_volume
from ..project.cases import make_id, without_folders
from ..project.export import FORMATS, PREDICTIONS, listed_files, table_as_text, volumes_of, write_labels
from ..project.importing import Found, candidates, look
from ..volume import Volume
from .predict import doubt_of, finished_run
from .reporter import Reporter

_COLUMNS = ("scan", "file", "value", "label", "volume_ml", "uncertainty_percent", "warning")


def apply(job: JobFolder, reporter: Reporter) -> None:
    """Segment every scan of a folder: parameters `images`, `output`, `training`, `device`, `format`.

    Writes a segmentation and an uncertainty map for each, and `predictions.csv`; scans that cannot be used are listed
    in `left_out.csv`.
    """
    reporter.handshake(library=__version__)
    parameters = job.spec()["parameters"]
    folder, kind = Path(parameters["output"]), parameters["format"]
    training = JobFolder(job.path.parent / parameters["training"])
    table = LabelTable.from_json(training.spec()["labels"])
    run, class_map = finished_run(training, parameters["device"], PartOfMore(reporter))
    _clear_earlier(folder)
    _write_tables(folder, [], [])
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    images = Path(parameters["images"])
    listed = list(candidates(images, Project(job.project).folder))
    taken: list[str] = []
    for position, candidate in enumerate(listed):
        stop_if_asked(reporter)
        found = candidate if isinstance(candidate, Skipped) else look(candidate)
        if isinstance(found, Skipped):
            left_out.append({"scan": found.name, "reason": without_folders(found.reason, [images])})
            reporter.event("skipped", name=found.name, reason=found.reason)
        else:
            name = make_id(found.name, taken)
            taken.append(name)
            try:
                result = run.segment(_volume(found))
                labels = class_map.to_values(result.prediction)
                file = f"{name}{FORMATS[kind]}"
                write_labels(folder / file, labels, table, kind, Review.NOT_SEEN)
                write_volume(folder / f"{name}-uncertainty.nrrd", result.uncertainty)
                rows += _rows(found.name, file, labels, table, result.scores, doubt_of(training, result.scores))
            except Exception as error:  # one scan that cannot be segmented does not keep the others back
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise
                print(traceback.format_exc(), flush=True)
                reason = without_folders(str(error) or type(error).__name__, [images])
                left_out.append({"scan": found.name, "reason": reason})
                reporter.event("skipped", name=found.name, reason=str(error))
        done = position + 1
        reporter.event("progress", stage="segmenting", done=done, of=len(listed), fraction=done / len(listed))
        _write_tables(folder, rows, left_out)
    if not rows:
        reasons = "; ".join(f"{row['scan']}: {row['reason']}" for row in left_out[:3])
        raise ValueError(f"no scan in {parameters['images']} could be segmented. {reasons}")


def _clear_earlier(folder: Path) -> None:
    """Remove what an earlier call wrote here: another model's segmentations are not to be taken for this one's."""
    for name in listed_files(folder / PREDICTIONS):
        ending = next((one for one in FORMATS.values() if name.endswith(one)), None)
        if ending is not None and Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
            (folder / f"{name.removesuffix(ending)}-uncertainty.nrrd").unlink(missing_ok=True)


def _write_tables(folder: Path, rows: list[dict[str, Any]], left_out: list[dict[str, Any]]) -> None:
    """After each scan: a job that is stopped leaves a table of what is there."""
    files.write_text(folder / PREDICTIONS, table_as_text(_COLUMNS, rows))
    files.write_text(folder / "left_out.csv", table_as_text(("scan", "reason"), left_out))


def _volume(found: Found) -> Volume:
    if found.converted is not None:
        return found.converted
    assert found.path is not None, "a found scan has a file or a converted volume"
    return checked_volume(found.path)


def _rows(
    scan: str, file: str, labels: Volume, table: LabelTable, scores: dict[str, Any], warning: str
) -> Iterator[dict[str, Any]]:
    volumes = volumes_of(labels, table)
    by_class = list(scores["classes"].values())
    for label, score in zip(table, by_class, strict=True):
        doubt = score["uncertainty"]
        yield {
            "scan": scan,
            "file": file,
            "value": label.value,
            "label": label.name,
            "volume_ml": f"{volumes[label.value]:.4f}",
            "uncertainty_percent": "" if doubt is None else f"{100 * doubt:.1f}",
            "warning": warning,
        }
