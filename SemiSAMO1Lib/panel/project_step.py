"""Step 1: a project folder, its scans, and what could not be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import slicer
from slicer.i18n import tr as _

from ..image_io import write_volume
from ..project import Case, Role
from ..project.cases import make_id
from ..project.session import Session
from ..scene.volumes import SceneError, volume_of
from .banner import Banner
from .settings import Settings
from .widgets import Rows, chosen, explain, fill_box, guarded, silent

#: Columns of the table of cases, pixels.
WIDTHS = (110, 95, 115, 75, 60)


class ProjectStep:
    """Choose or make a project, add scans from a folder or from the scene.

    Args:
        ui, session, settings, banner: of the panel.
        closing: called before another project is opened.
        opened: called after it.
        sample: the folder with the sample project.
        shown: the nodes of the open case.
    """

    def __init__(
        self,
        ui: Any,
        session: Session,
        settings: Settings,
        banner: Banner,
        closing: Callable[[], None],
        opened: Callable[[], None],
        sample: Callable[[], Path],
        shown: Callable[[], list[Any]],
    ) -> None:
        self._ui, self._session, self._settings, self._banner = ui, session, settings, banner
        self._closing, self._opened, self._sample, self._shown = closing, opened, sample, shown
        guard = guarded(banner.show)
        self._table = Rows(ui.caseTable, [_("case"), _("size"), _("spacing, mm"), _("role"), _("state")], WIDTHS)
        ui.openProjectButton.connect("clicked(bool)", guard(lambda: self.open(Path(ui.projectPathEdit.currentPath))))
        ui.projectPathEdit.connect("currentPathChanged(QString)", lambda _path: self.show())
        ui.scansPathEdit.connect("currentPathChanged(QString)", lambda _path: self.show())
        ui.sceneVolumeSelector.connect("currentNodeChanged(vtkMRMLNode*)", lambda _node: self.show())
        ui.recentBox.connect("activated(int)", guard(self._open_recent))
        ui.tryItButton.connect("clicked(bool)", guard(lambda: self.open(sample())))
        ui.addFolderButton.connect("clicked(bool)", guard(self.add_folder))
        ui.addVolumeButton.connect("clicked(bool)", guard(self.add_volume))
        ui.stopImportButton.connect("clicked(bool)", guard(session.stop_import))
        ui.excludeButton.connect("clicked(bool)", guard(self.exclude))
        ui.caseTable.connect("itemSelectionChanged()", self._show_exclusion)
        self._show_recent()
        self.show()

    # ------------------------------------------------------------------ actions

    def open(self, folder: Path) -> None:
        """Open a project, or make one in an empty folder."""
        self._closing()
        self._session.open(folder)
        self._settings.remember(folder)
        self._show_recent()
        with silent(self._ui.projectPathEdit):
            self._ui.projectPathEdit.currentPath = str(folder)
        self._opened()

    def _open_recent(self) -> None:
        folder = chosen(self._ui.recentBox)
        if folder:
            self.open(Path(folder))

    def add_folder(self) -> None:
        self._session.add_folder(Path(self._ui.scansPathEdit.currentPath))
        self.show()

    def add_volume(self) -> None:
        """Copy a volume of the scene into the project; the checking is a job."""
        node = self._ui.sceneVolumeSelector.currentNode()
        project = self._session.project
        if node is None or project is None:
            return
        if node in self._shown():
            raise SceneError(_("{name} is shown by this module; it is no further scan.").format(name=node.GetName()))
        with slicer.util.WaitCursor():
            path = project.folder / "cache" / "from-scene" / f"{make_id(node.GetName(), ())}.nrrd"
            write_volume(path, volume_of(node), compress=False)
        self._session.add_files([path])
        self.show()

    def exclude(self) -> None:
        """Leave the selected case out of the project's work, or take it in again."""
        project, case = self._session.project, self._selected()
        if project is None or case is None:
            return
        if case.role is Role.EXCLUDED:
            project.include(case.id)
            self._banner.show(_("{case} takes part again.").format(case=case.id))
        else:
            project.exclude(case.id)
            text = _("{case} is left out: it is not trained on, predicted or exported. Its label and review are kept.")
            self._banner.show(text.format(case=case.id))
        self.show()

    def _selected(self) -> Case | None:
        """The case of the selected row of the table."""
        project, row = self._session.project, self._ui.caseTable.currentRow()
        cases = project.state.cases if project is not None else ()
        return cases[row] if 0 <= row < len(cases) else None

    # ------------------------------------------------------------------ show

    def show(self) -> None:
        """Bring everything up to date: called on each tick, so it only touches what changed."""
        ui, session = self._ui, self._session
        no_path = [] if ui.projectPathEdit.currentPath else [_("Name a project folder.")]
        explain(ui.projectOpenReasonLabel, (ui.openProjectButton, no_path))
        adding = session.reasons_against_adding()
        no_folder = [] if ui.scansPathEdit.currentPath else [_("Name the folder of scans.")]
        no_volume = [] if ui.sceneVolumeSelector.currentNode() else [_("Choose a loaded volume.")]
        explain(
            ui.projectReasonLabel,
            (ui.addFolderButton, adding or no_folder),
            (ui.addVolumeButton, adding or no_volume),
        )
        self._show_import()
        self._show_exclusion()
        ui.locateButton.enabled = bool(session.project is not None and session.project.state.cases)
        if session.project is None:
            ui.projectLabel.text = _("No project is open.")
            self._table.show([])
            return
        rows = session.rows()
        name = session.project.state.name
        ui.projectLabel.text = _("Project {name}: {count} scans.").format(name=name, count=len(rows))
        self._table.show([(r.case, r.size, r.spacing, r.role, r.state) for r in rows])
        self._show_skipped()

    def _show_recent(self) -> None:
        """Asked for when a project is opened, not on each tick: a folder may lie on a share that is away."""
        entries = [(Path(one).name, one) for one in self._settings.recent]
        fill_box(self._ui.recentBox, [(_("choose..."), ""), *entries])

    def _show_exclusion(self) -> None:
        case = self._selected()
        excluded = case is not None and case.role is Role.EXCLUDED
        text = _("Take it in again") if excluded else _("Leave it out")
        if self._ui.excludeButton.text != text:
            self._ui.excludeButton.text = text
        reasons = [] if case is not None else [_("Select a scan in the table.")]
        explain(self._ui.excludeReasonLabel, (self._ui.excludeButton, reasons))

    def _show_import(self) -> None:
        watched = self._session.import_job
        active = watched is not None and watched.seen.state.active
        self._ui.stopImportButton.enabled = active
        self._ui.importBar.visible = active
        self._ui.stopImportButton.visible = active
        if active and watched is not None:
            self._ui.importBar.value = round(1000 * watched.seen.fraction)

    def _show_skipped(self) -> None:
        project = self._session.project
        skipped = project.state.skipped if project is not None else ()
        shown = [f"{one.name}: {one.reason}" for one in skipped[:20]]
        if len(skipped) > len(shown):
            shown.append(_("... and {count} more").format(count=len(skipped) - len(shown)))
        text = "\n".join([_("Not used ({count}):").format(count=len(skipped)), *shown]) if skipped else ""
        if self._ui.skippedLabel.text != text:
            self._ui.skippedLabel.text = text
            self._ui.skippedLabel.visible = bool(text)

    @property
    def up_to_date(self) -> bool:
        """Whether the whole table is written."""
        return self._table.finished
