"""Keeps what a person paints: a draft is written some seconds after the last change, without holding up the window."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from ..lock import Locked
from ..project import Project, ProjectError, reviews
from ..project.drafts import save_draft
from ..scene.case_view import CaseView
from ..scene.segmentations import Snapshot, show_status, snapshot

#: Seconds between the last change and the draft.
PAUSE_S = 20.0


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
        self._seen: object = None
        self._changed_at = 0.0
        self._unnoted = ""

    def tick(self) -> None:
        """Look for changes; write the draft when there were none for a while. Raises what a write in the thread met."""
        self._take_result(wait=False)
        view, project = self._view(), self._project()
        if view is None or project is None:
            return
        self._note()
        if not view.unkept or self._writing is not None:
            return
        if view.marks != self._seen:
            self._seen, self._changed_at = view.marks, self._clock()
            return
        if self._clock() - self._changed_at < PAUSE_S or _painting():
            return
        copied = snapshot(view.segmentation, view.scan, project.state.labels)
        view.mark_kept()
        files = view.files
        self._writing = self._writer.submit(_write, project, files.case, files.training, copied, self._reviewer())
        self._unnoted = view.files.case if view.files.review else ""
        self._note()

    def flush(self) -> None:
        """Write now what was not written yet, and wait for it: the case, the module or Slicer is about to be closed."""
        with suppress(Exception):  # what a write in the thread met is met again below, or is over
            self._take_result(wait=True)
        view, project = self._view(), self._project()
        if view is None or project is None:
            return
        if view.unkept and view.segmentation.GetSegmentation().GetNumberOfSegments() > 0:
            with slicer.util.WaitCursor():
                copied = snapshot(view.segmentation, view.scan, project.state.labels)
                _write(project, view.files.case, view.files.training, copied, self._reviewer())
                view.mark_kept()
            self._unnoted = view.files.case if view.files.review else ""
        try:
            self._note()
        except (ProjectError, Locked) as error:  # what was painted is kept all the same
            slicer.util.showStatusMessage(str(error), 10_000)

    def settle(self) -> None:
        """Wait for a write that is under way: what is on the screen is about to be saved, or discarded."""
        with suppress(Exception):  # its draft is not needed any more
            self._take_result(wait=True)
        self._unnoted = ""

    def close(self) -> None:
        """No further draft is written."""
        self._writer.shutdown(wait=True)

    def _note(self) -> None:
        """The case is a draft from now on; tried again on the next tick where the project is locked.

        Raises ProjectError, once, where somebody else decided about the case meanwhile; what was painted is kept.
        """
        view, project = self._view(), self._project()
        if not self._unnoted or view is None or project is None or view.files.case != self._unnoted:
            return
        try:
            case = view.as_seen = reviews.begin_draft(project, self._unnoted, self._reviewer(), view.as_seen)
        except ProjectError:
            self._unnoted = ""
            raise
        self._unnoted = ""
        show_status(view.segmentation, case.review)
        slicer.util.showStatusMessage(_("What you painted in {case} is kept.").format(case=case.id), 3000)

    def _take_result(self, wait: bool) -> None:
        if self._writing is None or not (wait or self._writing.done()):
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except Exception:
            if (view := self._view()) is not None:
                view.mark_unkept()
            raise


def _write(project: Project, case: str, training: str, copied: Snapshot, reviewer: str | None) -> None:
    labels, overlaps = copied.labels()
    save_draft(project, case, labels, copied.table, training, copied.new, overlaps, reviewer)


def _painting() -> bool:
    """Whether a mouse button is down: nobody is disturbed in the middle of a stroke."""
    return qt.QApplication.mouseButtons() != qt.Qt.NoButton
