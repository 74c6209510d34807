"""Scans that are not where they were: says so, asks where they lie now, and looks for them without holding up the
window."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from slicer.i18n import tr as _

from ..project import Project
from .banner import Banner
from .dialogs import Dialogs
from .time_for_threads import TimeForThreads
from .widgets import guarded


class MovedScans:
    """Looks for the scans of a project that was moved.

    Args:
        ui: of the panel: its button names the folder at any time.
        banner: says what is missing and what was found.
        dialogs: asks for the folder.
        project: the open project, or None.
        found: called when scans have a new place.
    """

    def __init__(
        self,
        ui: Any,
        banner: Banner,
        dialogs: Dialogs,
        project: Callable[[], Project | None],
        found: Callable[[], None],
    ) -> None:
        self._banner, self._dialogs, self._project, self._found = banner, dialogs, project, found
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="SemiSAMO1 search")
        self._search: tuple[Project, Future[dict[str, Path]]] | None = None
        self._time, self._closed = TimeForThreads(), Event()
        ui.locateButton.connect("clicked(bool)", guarded(banner.show)(self._locate))

    def tell(self) -> None:
        """A banner for scans that are not where they were: the project or the scans were moved."""
        project = self._project()
        missing = project.missing() if project is not None else []
        if missing:
            text = _("{count} scans are not where they were, {first} among them.")
            self._offer(text.format(count=len(missing), first=missing[0].id))

    def tick(self) -> None:
        """Take in what a search has found. Raises ProjectError when the folder cannot be read."""
        if self._search is None or not self._search[1].done():
            return
        (project, search), self._search = self._search, None
        if project is not self._project():
            return  # another project was opened meanwhile
        places = search.result()
        project.relink(places)
        self._found()
        missing = len(project.missing())
        text = _("{found} scans were found, {missing} are still missing.").format(found=len(places), missing=missing)
        if missing:
            self._offer(text)
        else:
            self._banner.show(text)

    def close(self) -> None:
        """A search that is under way ends soon and is not taken in: Slicer would wait for it when it quits."""
        self._closed.set()
        self._search = None
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _offer(self, text: str) -> None:
        self._banner.show(text, _("Locate folder..."), self._locate)

    def _locate(self) -> None:
        """Ask for the folder where the scans lie now; they are known by name and content."""
        project, folder = self._project(), self._dialogs.folder(_("Where do the scans lie now?"))
        if project is None or folder is None:
            return
        self._search = (project, self._reader.submit(project.moved_scans, folder, self._closed.is_set))
        self._time.give(self._search[1])
        self._banner.show(_("Looking for the scans in {folder}...").format(folder=folder))
