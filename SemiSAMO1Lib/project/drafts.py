"""Unfinished painting of a case, kept in the project until it is saved or discarded: closing a window loses nothing."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import files
from ..lock import identity
from ..volume import Volume, values_in
from .began import Began
from .cases import Case, Review, make_id
from .label_reader import LabelError, read_labels
from .label_table import LabelTable
from .label_writer import write_segmentation
from .store import Project


def draft_file(project: Project, case: str) -> Path:
    """Where a case's draft lies, whether there is one or not."""
    return project.folder / "labels" / case / "draft.seg.nrrd"


#: Two segments that claimed the same voxels, how many; the second one has them.
Overlap = tuple[str, str, int]


def save_draft(
    project: Project,
    case: str,
    labels: Volume,
    table: LabelTable,
    began: Began,
    new: Collection[int] = (),
    overlaps: Sequence[Overlap] = (),
    reviewer: str | None = None,
) -> Path:
    """Write a draft, in place of an older one; another person's is put aside as `draft-of-<name>-<time>.seg.nrrd`.

    Args:
        project, case: whose.
        labels: values (z, y, x) on any grid of the case.
        table: names of the values, also of such that the project does not know yet.
        began: the prediction that it began from, or none.
        new: values that the project has not given. It may give them to other labels before the draft is opened again,
            so their segments go by name.
        overlaps: what segments lost because a voxel has one label; told when the draft is brought back.
        reviewer: who painted, as everywhere below; None: whoever has the account.

    Raises:
        ProjectError: the project's folder is away.
    """
    project.require_there()
    path = draft_file(project, case)
    written = path.with_name("draft-new.seg.nrrd")
    write_segmentation(written, labels, table, Review.DRAFT, new)
    _put_aside(project, case, reviewer)
    written.replace(path)
    _write_record(path, began, reviewer, {"overlaps": list(overlaps)} if overlaps else {})
    return path


def painted_in_drafts(project: Project) -> set[int]:
    """Label values that some case's draft has painted; drafts that cannot be read say nothing."""
    found: set[int] = set()
    for case in project.state.cases:
        if (path := find_draft(project, case.id)) is not None:
            with suppress(LabelError):
                found |= values_in(read_labels(path, case.geometry).volume.array) - {0}
    return found


def drafts_put_aside(project: Project, case: str) -> list[Path]:
    """Drafts of this case by people whose place somebody else took."""
    return sorted(draft_file(project, case).parent.glob("draft-of-*.seg.nrrd"))


def _put_aside(project: Project, case: str, reviewer: str | None) -> None:
    """Another person's draft is kept under a name of its own."""
    path = draft_file(project, case)
    if path.exists() and (theirs := _another_person(project, case, reviewer)):
        when = make_id(theirs["time"].replace(":", ""), ())
        path.replace(path.with_name(f"draft-of-{make_id(theirs['who'], ())}-{when}.seg.nrrd"))


def by_whom(project: Project, case: str, reviewer: str | None = None) -> str:
    """` by <name> on <host>, <time>` of another person's draft, for a sentence; empty for one's own."""
    theirs = _another_person(project, case, reviewer)
    return " by {who} on {host}, {time}".format(**theirs) if theirs else ""


def _another_person(project: Project, case: str, reviewer: str | None) -> dict[str, str]:
    """`who`, `host` and `time` of a draft that somebody else painted: from another account or computer, or under
    another name where both gave one; empty where nobody else did."""
    record, me = _record(project, case), identity()
    if not {"user", "host"} <= set(record):
        return {}
    painter = record.get("reviewer")
    elsewhere = (record["user"], record["host"]) != (me["user"], me["host"])
    renamed = None not in (painter, reviewer) and painter != reviewer
    found = {"who": painter or record["user"], "host": record["host"], "time": record.get("time")}
    return {key: str(value) for key, value in found.items()} if elsewhere or renamed else {}


def _write_record(path: Path, began: Began, reviewer: str | None, facts: Mapping[str, Any]) -> None:
    who = {"reviewer": reviewer} if reviewer is not None else {}
    files.write_json(path.with_name("draft.json"), {**began.to_json(), **identity(), **who, **facts})


def _record(project: Project, case: str) -> dict[str, Any]:
    """Who painted a draft, and when; empty where there is no draft."""
    try:
        return dict(files.read_json(draft_file(project, case).with_name("draft.json")))
    except (OSError, ValueError):
        return {}


def began_from(project: Project, case: Case) -> Began | None:
    """The prediction that what is shown of a case began from: its draft, else the label in force, which a person may
    have drawn from none. None where there is neither: the current prediction is shown itself.

    Raises ProjectError: the label's record cannot be read.
    """
    if find_draft(project, case.id) is not None:
        return Began.from_json(_record(project, case.id))
    if case.label_version is None:
        return None
    record = project.label_record(case)
    return Began.from_json(record) if record["origin"] in (Review.ACCEPTED, Review.CORRECTED) else Began()


def overlaps_of(project: Project, case: str) -> list[Overlap]:
    """What segments of a case's draft lost to others, because a voxel has one label."""
    return [(str(one), str(other), int(n)) for one, other, n in _record(project, case).get("overlaps", ())]


def restore_draft(project: Project, case: str, labels: Path, began: Began, reviewer: str | None) -> Path:
    """Make a draft of a saved label again: its correction was taken back. A draft that is there already stays."""
    path = draft_file(project, case)
    if path.exists():
        return path
    with files.atomic_path(path) as temporary:
        shutil.copyfile(labels, temporary)
    _write_record(path, began, reviewer, {})
    return path


def find_draft(project: Project, case: str) -> Path | None:
    """The draft of a case, if there is one."""
    path = draft_file(project, case)
    return path if path.is_file() else None


def discard_draft(project: Project, case: str, reviewer: str | None = None) -> None:
    """Remove a case's draft: it was saved as a label, or a person does not want it; another person's is put aside."""
    _put_aside(project, case, reviewer)
    path = draft_file(project, case)
    path.unlink(missing_ok=True)
    path.with_name("draft.json").unlink(missing_ok=True)
