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
    path = _folder() / f"{_known_by(case)}-{_place_of(project)}.seg.nrrd"
    write_segmentation(path, labels, table, Review.DRAFT, new)
    who = {"reviewer": reviewer} if reviewer is not None else {}
    seen = {"review": str(case.review), "role": str(case.role), "label": case.label_version}
    record = {"project": str(project.folder.resolve()), "seen": seen, **began.to_json(), **identity(), **who}
    files.write_json(_record_of(path), record)
    return path


def find_rescued(project: Project, case: Case) -> Rescued | None:
    """The painting of a case of this project that waits here, the newest; also where the project was moved since."""
    own = f"{_known_by(case)}-{_place_of(project)}.seg.nrrd"
    found = []
    for path in _folder().glob(f"{_known_by(case)}-*.seg.nrrd"):
        record = _read(path)
        if path.name == own or _is_gone(record):
            seen = record.get("seen") or {}
            now = {"review": str(case.review), "role": str(case.role), "label": case.label_version}
            drafted = case.review == Review.DRAFT  # that is what painting makes of it
            overtaken = bool(seen) and seen != now and not drafted
            found.append(Rescued(path, Began.from_json(record), str(record.get("time", "")), overtaken))
    return max(found, key=lambda one: (one.time, one.file.name), default=None)


def forget_rescued(project: Project, case: Case) -> None:
    """Painting of the case that waits here is in the project by now, or a person does not want it."""
    while (found := find_rescued(project, case)) is not None:
        try:
            found.file.unlink()
        except OSError:
            return
        with suppress(OSError):
            _record_of(found.file).unlink()


def _folder() -> Path:
    return own_folder().parent / "painting"


def _known_by(case: Case) -> str:
    """Of a scan: it stays as it is where its project is moved."""
    return f"{case.id}-{hashlib.sha256(case.fingerprint.encode()).hexdigest()[:12]}"


def _place_of(project: Project) -> str:
    return hashlib.sha256(str(project.folder.resolve()).encode()).hexdigest()[:12]


def _record_of(path: Path) -> Path:
    return path.with_name(path.name.replace(".seg.nrrd", ".json"))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(files.read_json(_record_of(path)))
    except (OSError, ValueError):
        return {}


def _is_gone(record: dict[str, Any]) -> bool:
    """Whether the project is not where it was: it was moved, and this may be it."""
    place = record.get("project")
    return isinstance(place, str) and not (Path(place) / "project.json").is_file()
