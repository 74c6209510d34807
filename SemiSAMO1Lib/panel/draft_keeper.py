"""Keeps what a person paints: a draft is written some seconds after the last change, without holding up the window."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from ..files import is_there
from ..lock import Locked
from ..project import Case, Project, ProjectError, reviews
from ..project.began import Began
from ..project.drafts import save_draft
from ..project.rescue import Rescued, find_rescued, forget_rescued, rescue
from ..scene.case_view import CaseView
from ..scene.segmentations import Snapshot, show_status
from .time_for_threads import TimeForThreads

#: Seconds between the last change and the draft; and between the first and a draft where somebody paints on and on.
PAUSE_S, LONGEST_S = 20.0, 120.0


class DraftKeeper:
    """Watches the open case.

    Args:
        view: the case that is open now, or None.
        project: the open project, or None.
        reviewer: the person's name.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        view: Callable[[], CaseView | None],
        project: Callable[[], Project | None],
        reviewer: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._view, self._project, self._reviewer, self._clock = view, project, reviewer, clock
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="SemiSAMO1 draft")
        self._writing: Future[Any] | None = None
        self._time = TimeForThreads()
        self._seen: object = None
        self._changed_at = self._first_at = 0.0
        self._rescued: dict[tuple[Path, str], Path] = {}
        self._unnoted: dict[str, tuple[Project, Case | None]] = {}
        self._written_of: str = ""
        self._note_at = self._note_pause = 0.0

    def tick(self) -> None:
        """Look for changes; write the draft when there were none for a while, or when somebody has been painting for
        long. Raises what a write in the thread met."""
        self._take_result(wait=False)
        self._note()
        view, project = self._view(), self._project()
        if view is None or project is None:
            return
        if not view.unkept:
            self._seen = None
            return
        if self._writing is not None or not self._is_due(view.marks) or _painting():
            return
        files, copied = view.files, view.snapshot(project.state.labels)
        view.mark_kept()
        self._seen = None
        self._writing = self._writer.submit(_write, project, files.case, files.began, copied, self._reviewer())
        self._written_of = files.case
        self._time.give(self._writing)
        self._to_be_noted(project, view)
        self._note()

    def _is_due(self, marks: object) -> bool:
        """Whether what is painted is to be written now."""
        now = self._clock()
        if self._seen is None:
            self._first_at = now
        if marks != self._seen:
            self._seen, self._changed_at = marks, now
        return now - self._changed_at >= PAUSE_S or now - self._first_at >= LONGEST_S

    def flush(self) -> None:
        """Write now what was not written yet, and wait for it: the case, the module or Slicer is about to be closed."""
        with suppress(Exception):  # what a write in the thread met is met again below, or is over
            self._take_result(wait=True)
        view, project = self._view(), self._project()
        if view is not None and project is not None and view.unkept and _has_segments(view):
            with slicer.util.WaitCursor():
                copied = view.snapshot(project.state.labels)
                _write(project, view.files.case, view.files.began, copied, self._reviewer())
                view.mark_kept()
            self.forget_rescue(view.files.case)
            self._to_be_noted(project, view)
        self._note_at = 0.0
        try:
            self._note()
        except (ProjectError, OSError) as error:  # what was painted is kept all the same
            slicer.util.showStatusMessage(str(error), 10_000)

    def rescue(self) -> str:
        """Write what could not be written into the project to a place of this computer, from where `rescued` brings it
        back; returns what to say."""
        view, project = self._view(), self._project()
        if view is None or project is None or not _has_segments(view):
            return ""
        case = view.as_seen or project.state.case(view.files.case)
        try:
            copied = view.snapshot(project.state.labels)
            labels, _overlaps, _counts = copied.labels()
            place = rescue(project, case, labels, copied.table, view.files.began, copied.new, self._reviewer())
        except (RuntimeError, ValueError, OSError) as error:
            return str(error)
        self.rescued_is_shown(view.files.case, place)
        return _("It is kept in {file}, and brought back when the case is opened.").format(file=place)

    def rescued(self, case: str) -> Rescued | None:
        """What `rescue` kept of a case of the open project, in this session or an earlier one."""
        project = self._project()
        return find_rescued(project, project.state.case(case)) if project is not None else None

    def rescued_is_shown(self, case: str, file: Path | None) -> None:
        """Which file of `rescue` holds what is on the screen of a case, if any: what the project keeps from now on
        replaces it."""
        if (project := self._project()) is not None:
            self._rescued.pop((project.folder, case), None)
            if file is not None:
                self._rescued[project.folder, case] = file

    def forget_rescue(self, case: str) -> None:
        """What was on the screen is kept in the project, or a person does not want it."""
        project = self._project()
        if project is not None and (file := self._rescued.pop((project.folder, case), None)) is not None:
            forget_rescued(file)

    def forget_rescue_of_open_case(self) -> None:
        if (view := self._view()) is not None:
            self.forget_rescue(view.files.case)

    def settle(self) -> None:
        """Wait for a write that is under way: what is on the screen is about to be saved, or discarded."""
        with suppress(Exception):  # its draft is not needed any more
            self._take_result(wait=True)
        if (view := self._view()) is not None:
            self._unnoted.pop(view.files.case, None)

    def close(self) -> None:
        """No further draft is written."""
        self._writer.shutdown(wait=True)

    def _to_be_noted(self, project: Project, view: CaseView) -> None:
        if view.files.review:
            self._unnoted[view.files.case] = (project, view.as_seen)

    def _note(self) -> None:
        """Cases whose painting was kept are drafts from now on; while somebody else holds the project, or it is away,
        it is tried again, less and less often.

        Raises ProjectError, once, where somebody else decided about a case meanwhile; what was painted is kept.
        """
        now = self._clock()
        if not self._unnoted or now < self._note_at:
            return
        try:
            for name, (project, seen) in list(self._unnoted.items()):
                if is_there(project.file):
                    self._begin(project, name, seen)
        except Locked:
            pass
        finally:
            self._note_pause = min(60.0, 2 * self._note_pause + 5.0) if self._unnoted else 0.0
            self._note_at = now + self._note_pause

    def _begin(self, project: Project, name: str, seen: Case | None) -> None:
        try:
            case = reviews.begin_draft(project, name, self._reviewer(), seen)
        except ProjectError:
            del self._unnoted[name]
            raise
        del self._unnoted[name]
        view = self._view()
        if view is not None and view.files.case == name and project is self._project():
            view.as_seen = case
            show_status(view.segmentation, case.review)
        slicer.util.showStatusMessage(_("What you painted in {case} is kept.").format(case=case.id), 3000)

    def _take_result(self, wait: bool) -> None:
        if self._writing is None or not (wait or self._writing.done()):
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()  # waiting lets the thread run
            self.forget_rescue(self._written_of)
        except Exception:
            if (view := self._view()) is not None:
                view.mark_unkept()
            raise


def _has_segments(view: CaseView) -> bool:
    return bool(view.segmentation.GetSegmentation().GetNumberOfSegments() > 0)


def _write(project: Project, case: str, began: Began, copied: Snapshot, reviewer: str | None) -> None:
    labels, overlaps, _ = copied.labels()
    save_draft(project, case, labels, copied.table, began, copied.new, overlaps, reviewer)


def _painting() -> bool:
    """Whether a mouse button is down: nobody is disturbed in the middle of a stroke."""
    return qt.QApplication.mouseButtons() != qt.Qt.NoButton
