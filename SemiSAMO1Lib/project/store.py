"""The project folder: one JSON file changed one step at a time, labels that are never overwritten."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from .. import files
from ..image_io import read_geometry, stem_of, suffix_of, write_volume
from ..lock import identity, locked
from ..volume import Geometry
from .began import Began
from .cases import Case, Review, Role, Skipped, fingerprint, make_id, mentions, plain_name, relative_path, same_name
from .importing import Found
from .label_reader import DoubtfulLabel, LabelError, LabelReading, read_labels
from .label_table import Label, LabelTable
from .label_writer import write_segmentation

#: Version of project.json that this library writes.
SCHEMA = 1


#: Key of a project's id in project.json.
_ID = "id"

#: What helps where scans were moved.
NAME_THE_FOLDER = "name the folder where scans lie now (Locate folder... in Slicer, semisamo1 locate in a shell)"

#: What a label began from that no prediction was shown for.
_FROM_NOTHING = Began()


class ProjectError(RuntimeError):
    """The project cannot do what was asked; the message says why and what to do."""


class MissingImage(ProjectError):
    """An image is in none of its places."""


@dataclass(frozen=True)
class ProjectState:
    """What project.json says at one revision."""

    name: str
    revision: int = 0
    labels: LabelTable = field(default_factory=LabelTable)
    cases: tuple[Case, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    current_training: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Stays with a project wherever it is moved, and with its copies; empty for one of an older program."""
        return str(self.extra.get(_ID, ""))

    def case(self, case_id: str) -> Case:
        """The case with this id (any capitals) or this file name. Raises ProjectError naming some there are."""
        for case in self.cases:
            if case.id.lower() == case_id.lower():
                return case
        named = [case for case in self.cases if same_name(case.name, case_id)]
        if len(named) == 1:
            return named[0]
        some = ", ".join(case.id for case in self.cases[:5])
        raise ProjectError(f"no case {case_id!r} in this project. Cases: {some}{'…' if len(self.cases) > 5 else ''}")

    def with_role(self, *roles: Role) -> list[Case]:
        return [case for case in self.cases if case.role in roles]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "revision": self.revision,
            "name": self.name,
            "labels": self.labels.to_json(),
            "retired_values": list(self.labels.retired),
            "current_training": self.current_training,
            "cases": [case.to_json() for case in self.cases],
            "skipped": [{"name": one.name, "reason": one.reason} for one in self.skipped],
            **self.extra,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ProjectState:
        known = {"schema", "revision", "name", "labels", "retired_values", "current_training", "cases", "skipped"}
        return cls(
            name=value["name"],
            revision=value["revision"],
            labels=replace(LabelTable.from_json(value["labels"]), retired=tuple(value.get("retired_values", ()))),
            cases=tuple(Case.from_json(row) for row in value["cases"]),
            skipped=tuple(Skipped(row["name"], row["reason"]) for row in value["skipped"]),
            current_training=value["current_training"],
            extra={key: one for key, one in value.items() if key not in known},
        )


class Project:
    """A project folder. `state` is read afresh by every call that changes something.

    Args:
        folder: of the project.
        patience_s: how long a change waits for somebody else's.
    """

    def __init__(self, folder: Path, patience_s: float = 10.0) -> None:
        self.folder = Path(folder)
        self.patience_s = patience_s
        self._read_at = self._stamp()
        self.state = self._read()

    # ------------------------------------------------------------------ create and open

    @classmethod
    def create(cls, folder: Path, name: str | None = None) -> Project:
        """Make a new, empty project. Raises ProjectError when the folder is one already or cannot be written."""
        folder = Path(folder)
        if (folder / "project.json").exists():
            raise ProjectError(f"{folder} is a project already. Open it, or choose another folder.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            state = ProjectState(name or folder.resolve().name, extra={_ID: uuid4().hex})
            files.write_json(folder / "project.json", state.to_json())
        except OSError as error:
            raise ProjectError(f"{folder} cannot be written ({error.strerror}). Choose another folder.") from error
        return cls(folder)

    @property
    def file(self) -> Path:
        return self.folder / "project.json"

    def require_there(self) -> None:
        """Raise ProjectError where the folder is away: what is written meanwhile would not be in the project."""
        if not self.file.is_file():
            raise ProjectError(
                f"{self.folder} is not there at the moment, or no project any more. Connect its disk or share again."
            )

    @property
    def reviews(self) -> Path:
        """Every decision, one a line."""
        return self.folder / "reviews.jsonl"

    @property
    def jobs(self) -> Path:
        return self.folder / "jobs"

    def refresh(self) -> ProjectState:
        """Read project.json again where another process may have changed it; an unchanged file is not read twice."""
        stamp = self._stamp()
        if stamp is None:
            self.require_there()
        if stamp is None or stamp != self._read_at:
            self.state = self._read()
            self._read_at = stamp
        return self.state

    def _stamp(self) -> tuple[int, int, int] | None:
        """Changes with every write: each one puts a new file in the place of the old."""
        try:
            found = self.file.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _read(self) -> ProjectState:
        if not self.file.exists():
            raise ProjectError(
                f"{self.folder} is not a project (it has no project.json). Make one with: semisamo1 init"
            )
        value = files.read_json(self.file)
        schema = value.get("schema") if isinstance(value, dict) else None
        if not isinstance(schema, int):
            raise ProjectError(f"{self.file} does not say its schema version; it is not a project file")
        if schema > SCHEMA:
            raise ProjectError(
                f"{self.file} has schema {schema}, this program knows {SCHEMA}. Update SemiSAMO1 to open the project."
            )
        if schema < SCHEMA:
            value = self._migrate(value, schema)
        try:
            return ProjectState.from_json(value)
        except (KeyError, TypeError, ValueError) as error:
            raise ProjectError(f"{self.file} is damaged ({error!r}). Restore it from a copy.") from error

    def _migrate(self, value: dict[str, Any], schema: int) -> dict[str, Any]:
        for step in range(schema, SCHEMA):
            if step not in MIGRATIONS:
                raise ProjectError(f"{self.file} has schema {schema}, which this program can no longer read")
            value = MIGRATIONS[step](value)
        old = self.file.with_name(f"project.schema-{schema}.json")
        if not old.exists():
            shutil.copyfile(self.file, old)
        files.write_json(self.file, {**value, "schema": SCHEMA})
        return {**value, "schema": SCHEMA}

    # ------------------------------------------------------------------ one change at a time

    def change(
        self,
        apply: Callable[[ProjectState], ProjectState],
        line: Callable[[ProjectState, ProjectState], Mapping[str, Any] | None] = lambda before, after: None,
    ) -> ProjectState:
        """Take the lock, read again, apply one change, raise the revision, write, release.

        Args:
            apply: the change.
            line: what reviews.jsonl says of it, from the states before and after it; written in the same step, so that
                nobody finds the one without the other. Where it cannot be written the change is not made.

        Raises:
            Locked: another process on this or another computer is writing.
            ProjectError: the folder cannot be written.
        """
        with _in_words(self.folder), locked(self.folder / "project.lock", self.patience_s):
            before = self._read()
            after = apply(before)
            after = replace(after, revision=before.revision + 1)
            files.write_json(self.file, after.to_json())
            self._read_at, self.state = self._stamp(), after
            try:
                if (said := line(before, after)) is not None:
                    files.mend_last_line(self.reviews)
                    files.append_line(self.reviews, said)
            except OSError:
                files.write_json(self.file, before.to_json())
                self._read_at, self.state = self._stamp(), before
                raise
        return after

    def settled(self) -> ProjectState:
        """The state when nobody is in the middle of a change, so that its line in reviews.jsonl is there, too."""
        with _in_words(self.folder), locked(self.folder / "project.lock", self.patience_s):
            return self.refresh()

    def add(self, found: Found) -> Case | Skipped:
        """Make a case of a checked scan; the same file again is a listed skip."""
        if (known := _known(found, self.refresh())) is not None:
            return known
        made: list[Case | Skipped] = []
        new = self.folder / "images" / f".new-{uuid4().hex}.nrrd"
        if found.converted is not None:  # before the project is locked: a large series takes seconds
            with _in_words(self.folder):
                write_volume(new, found.converted)

        def apply(state: ProjectState) -> ProjectState:
            if (known := _known(found, state)) is not None:
                made.append(known)
                return state
            case = self._new_case(found, new, [case.id for case in state.cases])
            made.append(case)
            return replace(state, cases=(*state.cases, case))

        try:
            self.change(apply)
        finally:
            new.unlink(missing_ok=True)
        return made[0]

    def _new_case(self, found: Found, new: Path, taken: Sequence[str]) -> Case:
        """A case of a scan; `new`: where a converted one was written."""
        case_id = make_id(found.name, taken)
        path = found.path
        if found.converted is not None:
            path = new.with_name(f"{case_id}.nrrd")
            files.replace(new, path)
        assert path is not None, "a found scan has a file or a converted volume"
        path = path.resolve()
        return Case(
            id=case_id,
            relative=relative_path(path, self.folder.resolve()),
            absolute=path.as_posix(),
            fingerprint=found.fingerprint or fingerprint(path),
            geometry=found.geometry,
            source=found.source,
            name=found.name,
        )

    def note_skipped(self, skipped: Iterable[Skipped], added: Iterable[str] = ()) -> None:
        """Remember what was skipped and why; a newer reason replaces an older one, names in `added` are taken off."""
        new, gone = {one.name: one for one in skipped}, set(added)

        def apply(state: ProjectState) -> ProjectState:
            listed = {**{one.name: one for one in state.skipped}, **new}
            return replace(state, skipped=tuple(one for name, one in listed.items() if name not in gone))

        self.change(apply)

    def exclude(self, case_id: str) -> Case:
        """Leave a case out: it is not trained on, predicted or exported. Its label and review stay, see `include`."""

        def apply(state: ProjectState) -> ProjectState:
            return _with_case(state, replace(state.case(case_id), role=Role.EXCLUDED))

        return self.change(apply, partial(_left_out, case_id, left_out=True)).case(case_id)

    def include(self, case_id: str) -> Case:
        """Take an excluded case in again, as what it was; other cases stay as they are."""

        def apply(state: ProjectState) -> ProjectState:
            case = state.case(case_id)
            if case.role is not Role.EXCLUDED:
                return state
            role = Role.UNLABELLED
            if case.label_version is not None:
                drawn = self.label_record(case)["origin"] == "template"
                role = Role.TEMPLATE if drawn and not state.with_role(Role.TEMPLATE) else Role.LABELLED
            return _with_case(state, replace(case, role=role))

        return self.change(apply, partial(_left_out, case_id, left_out=False)).case(case_id)

    def use_training(self, job_id: str, rejected: Collection[str]) -> None:
        """Let the predictions of a training count; what was decided about labels stays.

        Args:
            job_id: the training.
            rejected: cases whose prediction by it was rejected (`reviews.use_training` knows); others wait again.

        Raises:
            ProjectError: there is no such training, or it has no predictions.
        """
        if not (self.jobs / job_id / "results" / "index.json").is_file() or Path(job_id).name != job_id:
            raise ProjectError(f"{job_id} is not a training of this project with predictions")

        def after(case: Case) -> Case:
            if case.id in rejected and case.review in (Review.NOT_SEEN, Review.SKIPPED):
                return replace(case, review=Review.REJECTED)
            waits = case.review == Review.REJECTED and case.id not in rejected
            return replace(case, review=Review.NOT_SEEN) if waits else case

        self.change(lambda state: replace(state, current_training=job_id, cases=tuple(map(after, state.cases))))

    # ------------------------------------------------------------------ images

    def image_path(self, case: Case) -> Path:
        """Where the case's image lies: relative first, then absolute, else relinked by name and fingerprint.

        Raises:
            ProjectError: it is nowhere, or it was changed since it was added.
        """
        changed = False
        for path in self.image_places(case):
            if path.is_file():
                if fingerprint(path) == case.fingerprint:
                    return path
                changed = True
        if changed:
            raise ProjectError(
                f"the image of case {case.id} was changed since it was added ({case.absolute}). Its label is not used; "
                "exclude the case, or add the scan again under another name. Where another file took its place, "
                f"{NAME_THE_FOLDER}."
            )
        raise MissingImage(
            f"the image of case {case.id} is missing. Looked in {case.absolute} and beside the project. "
            f"Bring it back, or {NAME_THE_FOLDER}."
        )

    def image_places(self, case: Case) -> list[Path]:
        """Where the image may lie: beside the project first, so that a moved project finds its own copy."""
        return [Path(place) for place in self._places(case)]

    def _places(self, case: Case) -> tuple[str, str, str, str]:
        """The same as text: 500 cases are looked for when a project is opened."""
        name = case.absolute.rpartition("/")[2]
        relative = case.absolute if case.relative == case.absolute else f"{self.folder}/{case.relative}"
        return relative, case.absolute, f"{self.folder}/images/{name}", f"{self.folder.parent}/{name}"

    def missing(self) -> list[Case]:
        """Cases whose image is in none of its places, excluded ones left out; contents are not looked at."""
        return [case for case in self.state.cases if case.role is not Role.EXCLUDED and not self.lies_somewhere(case)]

    def lies_somewhere(self, case: Case) -> bool:
        """Whether a case's image, or another one of its name, is in one of its places."""
        return any(os.access(place, os.F_OK) for place in self._places(case))

    def moved_scans(self, folder: Path, stop: Callable[[], bool] = lambda: False) -> dict[str, Path]:
        """Look for missing and replaced images below a folder, by name and fingerprint: case id -> where it lies now.

        It changes nothing and may run in another thread: a large folder takes its time. Once `stop` says True it looks
        no further, and nothing is found.

        Raises:
            ProjectError: the folder cannot be read.
        """
        if not folder.is_dir():
            raise ProjectError(f"{folder} is not a folder. Give the folder that holds the scans now.")
        wanted = [case for case in self.state.cases if not self._in_place(case)]
        names = {plain_name(Path(case.absolute).name) for case in wanted}
        there: dict[str, list[Path]] = {}
        for path in folder.rglob("*"):
            if stop():
                return {}
            if (name := plain_name(path.name)) in names and path.is_file():
                there.setdefault(name, []).append(path.resolve())
        places = {}
        for case in wanted:
            for path in sorted(there.get(plain_name(Path(case.absolute).name), ())):
                if stop():
                    return {}
                if fingerprint(path) == case.fingerprint:
                    places[case.id] = path
                    break
        return places

    def _in_place(self, case: Case) -> bool:
        """Whether the image itself lies where it is looked for, and not another one of its name."""
        try:
            self.image_path(case)
        except ProjectError:
            return False
        return True

    def relink(self, places: Mapping[str, Path]) -> None:
        """Note where images lie now; see `moved_scans`."""

        def moved(case: Case) -> Case:
            path = places.get(case.id)
            if path is None:
                return case
            return replace(case, relative=relative_path(path, self.folder.resolve()), absolute=path.as_posix())

        if places:
            self.change(lambda state: replace(state, cases=tuple(moved(case) for case in state.cases)))

    # ------------------------------------------------------------------ labels

    def label_path(self, case: Case) -> Path:
        """The label in force. Raises ProjectError when there is none or its file was changed or lost."""
        if case.label_version is None:
            raise ProjectError(f"case {case.id} has no label")
        path = self._label_file(case.id, case.label_version)
        if not path.is_file():
            raise ProjectError(f"label {case.label_version} of case {case.id} is missing: {path}")
        if files.sha256(path) != self.label_record(case)["sha256"]:
            raise ProjectError(f"label {case.label_version} of case {case.id} was changed outside the project: {path}")
        return path

    def label_record(self, case: Case) -> dict[str, Any]:
        """Origin, reviewer, time, sha256 and absent values of the label in force."""
        path = self._label_file(case.id, case.label_version or 0).with_name(f"{case.label_version}.json")
        try:
            record = dict(files.read_json(path))
        except (OSError, ValueError) as error:
            raise ProjectError(f"the record of label {case.label_version} of case {case.id}: {error}") from error
        if missing := {"sha256", "declared", "origin"} - set(record):
            raise ProjectError(f"{path} lacks {sorted(missing)}; restore it from a copy, or label the case again")
        return record

    def add_label(
        self,
        case_id: str,
        labels_file: Path,
        *,
        origin: str = "template",
        role: Role = Role.TEMPLATE,
        absent: Iterable[int] = (),
        add_labels: bool = False,
        priority: Sequence[int] | None = None,
        reviewer: str | None = None,
        review: Review | None = None,
        seen: Case | None = None,
        refuse_doubts: bool = False,
        began: Began = _FROM_NOTHING,
        asked: Collection[int] | None = None,
        given: Collection[int] | None = None,
        note: Callable[[LabelReading], Mapping[str, Any]] | None = None,
    ) -> LabelReading:
        """Take a label file as a new version of a case's label.

        Args:
            case_id: the case that the labels belong to.
            labels_file: any label map or segmentation, on any grid (see `read_labels`).
            origin: template, imported, accepted or corrected.
            role: the case's role from now on.
            absent: values that are really not in this scan; any other missing value that was asked about is refused.
            add_labels: take values that the label table does not have into it.
            priority: which value wins where segments overlap.
            reviewer: who drew it.
            review: the case's review state from now on; None: as it was.
            seen: the case as the person saw it; somebody else's decision since then is not overruled.
            refuse_doubts: refuse a file that looks like another case's, instead of noting it.
            began: the prediction that was accepted or mended; by default none.
            asked: values that the person was asked about; others are unknown in this scan unless they are painted.
                None: all of the label table.
            given: values that the label table had when the file was made: one that was given to another label since is
                refused. None: those that it has now.
            note: the label is a decision about a prediction: what its line says, from what was read.

        Raises:
            LabelError: the file cannot be used; nothing was changed.
            DoubtfulLabel: it looks like another case's; nothing was changed.
            ProjectError: the case is excluded, somebody else changed it meanwhile, or gave a value meanwhile that the
                file has for a new label; nothing was changed.
        """
        state = self.refresh()
        case = state.case(case_id)
        self.image_path(case)
        absent = sorted(set(absent))
        needed = set(state.labels.values if asked is None else asked)
        nothing_there = role is not Role.TEMPLATE and bool(absent) and needed <= set(absent)
        reading = read_labels(labels_file, case.geometry, priority, allow_empty=nothing_there)
        doubts = _doubts(Path(labels_file), reading, case, state)
        if doubts and refuse_doubts:
            raise DoubtfulLabel(" ".join(doubts))
        reading = replace(reading, notes=(*reading.notes, *doubts))
        table = _table_for(reading, state.labels, add_labels, Path(labels_file).name)
        known = state.labels.values if given is None else given
        new = {value: name for value, name in reading.names.items() if value not in known}
        _require_complete(reading, needed, table, absent, Path(labels_file).name)

        def apply(now: ProjectState) -> ProjectState:
            current = _not_excluded(now.case(case_id))
            require_as_seen(current, seen)
            _require_free(new, now.labels)
            merged = now.labels.with_labels((label.value, label.name) for label in table)
            version = self._write_label(current, reading, merged, origin, absent, reviewer, began)
            changed = replace(current, label_version=version, role=role, review=review or current.review)
            return _with_case(replace(now, labels=merged), changed)

        facts = note(reading) if note is not None else None

        def line(before: ProjectState, after: ProjectState) -> dict[str, Any] | None:
            if facts is None:
                return None
            added = sorted(set(after.labels.values) - set(before.labels.values))
            said = {**facts, "added": added} if added else facts
            return _line(before.case(case_id), after.case(case_id), reviewer, said)

        self.change(apply, line)
        return reading

    def role_for_label(self, case_id: str) -> Role:
        """What a case becomes by a label that a person gives it: the template, or a further labelled case beside one.

        Raises ProjectError: no such case.
        """
        case = self.refresh().case(case_id)
        others = [one for one in self.state.with_role(Role.TEMPLATE) if one.id != case.id]
        return Role.LABELLED if others else Role.TEMPLATE

    def update_labels(self, changed: Iterable[Label], given: Collection[int] | None = None) -> LabelTable:
        """Change names, colours and terminology of labels, and add further ones; values stay.

        Args:
            changed: the labels as they are from now on.
            given: values that the label table had when these were made, as of `add_label`; None: all of them.

        Raises:
            ProjectError: two labels of one name, no name, or a value that was given to another label meanwhile.
        """
        rows = list(changed)
        new = {label.value: label.name for label in rows if given is not None and label.value not in given}

        def apply(state: ProjectState) -> ProjectState:
            _require_free(new, state.labels)
            try:
                return replace(state, labels=state.labels.updated(rows))
            except ValueError as error:
                raise ProjectError(str(error)) from error

        return self.change(apply).labels

    def retire_labels(self, values: Iterable[int]) -> None:
        """Take labels out of the table that no label in force has painted; their values are not given again."""

        def apply(state: ProjectState) -> ProjectState:
            return replace(state, labels=state.labels.without(set(values) - self._painted_in(state)))

        self.change(apply)

    def painted_labels(self) -> set[int]:
        """Values that some label in force has painted."""
        return self._painted_in(self.state)

    def _painted_in(self, state: ProjectState) -> set[int]:
        used: set[int] = set()
        for case in state.cases:
            if case.label_version is not None:
                record = self.label_record(case)
                used |= set(record["declared"]) - set(record.get("absent", ()))
        return used

    def remove_label(self, case_id: str) -> Case:
        """Take the label out of force; its file stays. The case becomes unlabelled; what was decided about its
        prediction by that label is open again. Raises ProjectError: the case is excluded."""

        def apply(state: ProjectState) -> ProjectState:
            case = _not_excluded(state.case(case_id))
            review = Review.NOT_SEEN if case.review in (Review.ACCEPTED, Review.CORRECTED) else case.review
            return _with_case(state, replace(case, label_version=None, role=Role.UNLABELLED, review=review))

        def line(before: ProjectState, after: ProjectState) -> dict[str, Any] | None:
            was, now = before.case(case_id), after.case(case_id)
            return None if was.review == now.review else _line(was, now, None, {"undo": True})  # it counts no more

        return self.change(apply, line).case(case_id)

    def _label_file(self, case_id: str, version: int) -> Path:
        return self.folder / "labels" / case_id / f"{version}.seg.nrrd"

    def _write_label(
        self,
        case: Case,
        reading: LabelReading,
        table: LabelTable,
        origin: str,
        absent: list[int],
        reviewer: str | None,
        began: Began,
    ) -> int:
        folder = self.folder / "labels" / case.id
        numbers = [int(p.name.split(".")[0]) for p in folder.glob("*.seg.nrrd") if p.name.split(".")[0].isdigit()]
        version = max(numbers, default=0) + 1
        path = self._label_file(case.id, version)
        declared = set(reading.names) | set(absent)
        known = LabelTable(tuple(label for label in table if label.value in declared))
        write_segmentation(path, reading.volume, known, origin)
        who = identity()
        record = {
            "origin": origin,
            **({key: one or None for key, one in began.to_json().items()}),
            "reviewer": reviewer or who["user"],
            "time": who["time"],
            "sha256": files.sha256(path),
            "declared": sorted(declared),
            "absent": absent,
            "image_fingerprint": case.fingerprint,
            "notes": list(reading.notes),
        }
        files.write_json(path.with_name(f"{version}.json"), record)
        return version

    # ------------------------------------------------------------------ reviews

    def restore(
        self,
        case_id: str,
        review: Review,
        role: Role,
        label_version: int | None,
        seen: Case | None = None,
        reviewer: str | None = None,
        note: Mapping[str, Any] | None = None,
    ) -> Case:
        """Set a case's review state, role and label in force at once; label files stay as they are.

        Args:
            case_id, review, role, label_version: the case, and what it is from now on.
            seen: the case as it was when the person looked at it.
            reviewer: who decided; None: the account.
            note: what the decision's line says besides; None: no line is written.

        Raises:
            ProjectError: the case is no longer as it was `seen`.
        """

        def apply(state: ProjectState) -> ProjectState:
            require_as_seen(state.case(case_id), seen)
            changed = replace(state.case(case_id), review=review, role=role, label_version=label_version)
            return _with_case(state, changed)

        def line(before: ProjectState, after: ProjectState) -> dict[str, Any] | None:
            return None if note is None else _line(before.case(case_id), after.case(case_id), reviewer, note)

        return self.change(apply, line).case(case_id)


def _line(before: Case, after: Case, reviewer: str | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a decision in reviews.jsonl: who and when, the case before it and after it, and facts."""
    who = identity()
    return {
        "time": who["time"],
        "reviewer": reviewer or who["user"],
        "case": after.id,
        "before": str(before.review),
        "after": str(after.review),
        "role_before": str(before.role),
        "label_before": before.label_version,
        "label": after.label_version,
        **facts,
    }


def _left_out(case_id: str, before: ProjectState, after: ProjectState, left_out: bool) -> dict[str, Any] | None:
    """The line of a case that was left out or taken in again; None where it was so before."""
    was, now = before.case(case_id), after.case(case_id)
    return None if was.role is now.role else _line(was, now, None, {"left_out": left_out})


#: Axes that differ by less are the same, and voxels that lie less beside the scan's, as a share of them: spacings that
#: programs average from slices differ by some 0.0001.
_TURNED_DEGREES, _BETWEEN = 0.1, 0.1

#: Schema number -> function that lifts project.json by one version.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


@contextmanager
def _in_words(folder: Path) -> Iterator[None]:
    """Turns the refusal to write into a ProjectError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise ProjectError(f"{folder} cannot be written ({error.strerror}). Make it writable.") from error


def _known(found: Found, state: ProjectState) -> Skipped | None:
    """Why a scan is no further case: it is one already."""
    by_content = {case.fingerprint: case.id for case in state.cases}
    if found.fingerprint and found.fingerprint in by_content:
        return Skipped(found.name, f"the same file as case {by_content[found.fingerprint]}")
    uid = found.source.get("series_uid") or found.source.get("file")
    uid = uid or found.source.get("sha256")
    known_by = ("series_uid", "file", "sha256")
    same = [case.id for case in state.cases if uid and uid in (case.source.get(key) for key in known_by)]
    return Skipped(found.name, f"the same series as case {same[0]}") if same else None


def _with_case(state: ProjectState, changed: Case) -> ProjectState:
    return replace(state, cases=tuple(changed if case.id == changed.id else case for case in state.cases))


def _not_excluded(case: Case) -> Case:
    """Raise ProjectError for a case that was left out: a label alone does not take it in again."""
    if case.role is Role.EXCLUDED:
        raise ProjectError(f"case {case.id} is excluded; include it first")
    return case


def require_as_seen(case: Case, seen: Case | None) -> None:
    """Raise ProjectError when somebody else decided about a case since a person looked at it."""
    if seen is None or (case.review, case.role, case.label_version) == (seen.review, seen.role, seen.label_version):
        return
    raise ProjectError(
        f"case {case.id} was changed meanwhile by somebody else: it is {case.review.replace('_', ' ')} now. "
        "Look at it again; nothing was changed by you."
    )


def _doubts(labels_file: Path, reading: LabelReading, case: Case, state: ProjectState) -> list[str]:
    """Signs that a label file belongs to another scan of the project, lies elsewhere in space, or has its labels the
    other way round."""
    others = [one for one in state.cases if one.id != case.id]
    doubts = []
    if (named := _named_in(stem_of(labels_file), [case, *others])) not in (None, case):
        doubts.append(f"is called like case {named.id}")
    grid = read_geometry(labels_file)
    if not grid.same_grid(case.geometry):
        same = [one.id for one in others if one.geometry.same_grid(grid)]
        doubts += [f"lies on the grid of case {same[0]}"] if len(same) == 1 else []
        # a segmentation may be cropped to what was painted; a label map covers what its scan covers, and so does a
        # segmentation of its very size
        cropped = suffix_of(labels_file) == ".seg.nrrd" and not _same_size(grid, case.geometry)
        if not cropped and (away := grid.field_apart(case.geometry)) is not None:
            doubts.append(f"covers another part of space than the scan: their corners are {away:.3g} mm apart")
        elif cropped and not reading.exact:
            doubts += _beside(grid, case.geometry)
    found = [f"{labels_file.name} {' and '.join(doubts)}: is it the label of {case.id}?"] if doubts else []
    return [*found, *_contradictions(labels_file.name, reading, state.labels)]


def _beside(cropped: Geometry, scan: Geometry) -> list[str]:
    """What is odd about a cropped segmentation that is not on the scan's voxels: its axes are turned against the scan's
    or voxels of the same size lie between them."""
    turn = np.reshape(scan.direction, (3, 3)).T @ np.reshape(cropped.direction, (3, 3))
    squared = turn**2
    off = math.sqrt(max(float((squared.sum(0) - squared.max(0)).max()), 0.0))  # of each axis beside its nearest one
    degrees = math.degrees(math.asin(min(off, 1.0)))
    if degrees > _TURNED_DEGREES:
        return [f"is turned against the scan by {degrees:.3g}°"]
    if not np.allclose(np.abs(np.round(turn)) @ cropped.spacing[::-1], scan.spacing[::-1], rtol=1e-3):
        return []
    origin = np.linalg.inv(scan.index_to_space) @ np.array([*cropped.origin, 1.0])
    between = float(np.abs(origin[:3] - np.round(origin[:3])).max())
    return [f"lies {between:.2g} voxels beside the scan's voxels"] if between > _BETWEEN else []


def _same_size(one: Geometry, other: Geometry) -> bool:
    alike = all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(one.spacing, other.spacing, strict=True))
    return one.shape == other.shape and alike


def _contradictions(name: str, reading: LabelReading, table: LabelTable) -> list[str]:
    """Values count, but a file that gives one label's name to another's value has probably mixed them up."""
    by_name = {label.name.strip().casefold(): label.value for label in table}
    wrong = [
        f"its {called!r} has the value {value}, which is {table.name_of(value)!r} here ({called!r} is {meant})"
        for value, called in sorted(reading.names.items())
        if value in table.values and (meant := by_name.get(called.strip().casefold(), value)) != value
    ]
    found = []
    if wrong:
        found.append(
            f"{name} names its labels otherwise than the label table: {'; '.join(wrong)}. Are the values right?"
        )
    strange = [
        f"{called!r} was taken as {value}, which is {table.name_of(value)!r} here"
        for value, called in sorted(reading.names.items())
        if value in reading.guessed
        and value in table.values
        and called.strip().casefold() != table.name_of(value).strip().casefold()
        and called.strip().casefold() not in by_name
    ]
    if strange:
        found.append(f"{name} has segments that were added in another program: {'; '.join(strange)}. Is that right?")
    return found


def _named_in(stem: str, cases: Sequence[Case]) -> Case | None:
    """The case that a file is called after: the longest name in it; the first of equals."""
    found = [(len(name), case) for case in cases for name in (case.name, case.id) if mentions(stem, name)]
    return max(found, key=lambda one: one[0])[1] if found else None


def _table_for(reading: LabelReading, table: LabelTable, add_labels: bool, name: str) -> LabelTable:
    """The label table with the values of a reading; new ones only into an empty table or when asked for."""
    unknown = sorted(set(reading.names) - set(table.values))
    if unknown and len(table) and not add_labels:
        raise LabelError(
            f"{name} has label values {unknown}, which the label table {table.values} does not know. "
            "Correct the file, or add them to the table with --add-labels."
        )
    return table.with_labels((value, reading.names[value]) for value in unknown)


def _require_free(new: Mapping[int, str], table: LabelTable) -> None:
    """Raise ProjectError where a value that was free when a person added a label is another label's by now."""
    for value, name in new.items():
        if value in table.values and table.name_of(value).strip().casefold() != name.strip().casefold():
            raise ProjectError(
                f"the value {value} of {name} was given to {table.name_of(value)} meanwhile by somebody else; nothing "
                "was changed. Do it again: it gets another value."
            )


def _require_complete(reading: LabelReading, needed: set[int], table: LabelTable, absent: list[int], name: str) -> None:
    """Every label that was asked about, and every one that the file has, must be there, or be said to be absent."""
    present = set(reading.names) - set(reading.empty)
    if wrong := sorted(present & set(absent)):
        raise LabelError(f"{name}: label values {wrong} are declared absent but painted")
    needed = needed | set(reading.names)
    if strange := sorted(set(absent) - set(table.values)):
        raise LabelError(f"{name}: label values {strange} are declared absent, but the label table has no such label")
    if missing := sorted(needed - present - set(absent)):
        names = ", ".join(f"{value} ({table.name_of(value)})" for value in missing)
        raise LabelError(
            f"{name} has no voxel of label {names}. Paint it, or declare that it is absent in this scan (--absent)."
        )
