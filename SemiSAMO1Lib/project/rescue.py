"""Painting that could not be written into its project, kept on this computer until the case is opened again."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files
from ..job.environment import own_folder
from ..lock import identity
from ..volume import Volume
from .began import Began
from .cases import Case, Review
from .label_table import LabelTable
from .label_writer import write_segmentation
from .store import Project


@dataclass(frozen=True)
class Rescued:
    """Painting of a case that waits on this computer.

    Attributes:
        file: its segmentation.
        began: the prediction that it began from.
        time: when it was kept; empty where that is not known.
        overtaken: somebody decided about the case since the person who painted saw it.
    """

    file: Path
    began: Began
    time: str
    overtaken: bool


def rescue(
    project: Project,
    case: Case,
    labels: Volume,
    table: LabelTable,
    began: Began,
    new: Collection[int] = (),
    reviewer: str | None = None,
) -> Path:
    """Keep painting beside the project, which may be away; returns the file.

    Args:
        project: whose.
        case: as the person who painted saw it.
        labels: values (z, y, x) on any grid of the case.
        table, new: names of the values, and those that the project has not given, as of `drafts.save_draft`.
        began: the prediction that it began from.
        reviewer: who painted; None: whoever has the account.

    Raises:
        OSError: it cannot be written there either.
    """
    path = _file_of(project, case)
    write_segmentation(path, labels, table, Review.DRAFT, new)
    who = {"reviewer": reviewer} if reviewer is not None else {}
    seen = {"review": str(case.review), "role": str(case.role), "label": case.label_version}
    place = {"project": str(project.folder.resolve()), "id": project.state.id, "case": case.id}
    record = {**place, "seen": seen, **began.to_json(), **identity(), **who}
    files.write_json(_record_of(path), record)
    return path


def find_rescued(project: Project, case: Case) -> Rescued | None:
    """The painting of a case that waits here: of the project in this place, else of one that was moved here since."""
    own = _file_of(project, case)
    records = [*_folder().glob(f"{case.id}-*.json")] if project.state.id else []
    moved = sorted(path for path in records if _was_moved_here(_read(path), project, case))
    for path in (own, *(one.with_name(one.name.replace(".json", ".seg.nrrd")) for one in moved)):
        if path.is_file():
            record = _read(_record_of(path))
            now = {"review": str(case.review), "role": str(case.role), "label": case.label_version}
            # a draft is what painting makes of a case
            overtaken = record.get("seen", now) != now and case.review != Review.DRAFT
            return Rescued(path, Began.from_json(record), str(record.get("time", "")), overtaken)
    return None


def forget_rescued(file: Path) -> None:
    """What a file of `find_rescued` holds is in the project by now, or a person does not want it."""
    for path in (file, _record_of(file)):
        with suppress(OSError):
            path.unlink()


def _folder() -> Path:
    return own_folder().parent / "painting"


def _file_of(project: Project, case: Case) -> Path:
    known_by = hashlib.sha256(f"{project.folder.resolve()}\n{case.id}".encode()).hexdigest()[:16]
    return _folder() / f"{case.id}-{known_by}.seg.nrrd"


def _record_of(path: Path) -> Path:
    return path.with_name(path.name.replace(".seg.nrrd", ".json"))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(files.read_json(path))
    except (OSError, ValueError):
        return {}


def _was_moved_here(record: dict[str, Any], project: Project, case: Case) -> bool:
    """Whether a record is of this project in a place where it is not any more; of a copy that is still there it is
    not."""
    place = record.get("project")
    same = (record.get("id"), record.get("case")) == (project.state.id, case.id)
    return same and isinstance(place, str) and not (Path(place) / "project.json").is_file()
