"""Step 5: all segmentations into a folder, the trained model applied to further scans or as a file, the report; all in
the background."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import qt
from slicer.i18n import tr as _

from ..job import JobKind, State
from ..project.session import Session, ended_in_words
from .banner import Banner
from .dialogs import Dialogs
from .widgets import chosen, explain, fill_box, guarded, say


class ExportStep:
    """Export, Apply, report and model, with their reasons and what became of them.

    Args:
        ui, session, banner, dialogs: of the panel.
    """

    def __init__(self, ui: Any, session: Session, banner: Banner, dialogs: Dialogs) -> None:
        self._ui, self._session, self._banner, self._dialogs = ui, session, banner, dialogs
        self._told: tuple[str, State] | None = None
        guard = guarded(banner.show)
        formats = [(_("NRRD segmentation"), "nrrd"), (_("NIfTI label map"), "nifti"), (_("DICOM SEG"), "dicom-seg")]
        fill_box(ui.formatBox, formats)
        for edit in (ui.exportPathEdit, ui.dicomPathEdit, ui.newScansPathEdit):
            edit.connect("currentPathChanged(QString)", lambda _path: self.show())
        ui.formatBox.connect("currentIndexChanged(int)", lambda _index: self.show())
        ui.exportButton.connect("clicked(bool)", guard(self.export))
        ui.applyButton.connect("clicked(bool)", guard(self.apply))
        ui.reportButton.connect("clicked(bool)", guard(self.write_report))
        ui.modelButton.connect("clicked(bool)", guard(self.save_model))
        ui.stopExportButton.connect("clicked(bool)", guard(session.stop_output))
        self.show()

    def export(self) -> None:
        """Write all segmentations of the project."""
        ui = self._ui
        dicom = Path(ui.dicomPathEdit.currentPath) if ui.dicomPathEdit.currentPath else None
        self._session.export(Path(ui.exportPathEdit.currentPath), chosen(ui.formatBox) or "nrrd", dicom)
        self.show()

    def apply(self) -> None:
        """Segment further scans with the current training."""
        ui = self._ui
        kind = chosen(ui.formatBox) or "nrrd"
        self._session.apply(Path(ui.newScansPathEdit.currentPath), Path(ui.exportPathEdit.currentPath), kind)
        self.show()

    def write_report(self) -> None:
        """Write the current training's report anew; once it is there, it can be opened."""
        self._session.write_report()
        self.show()

    def save_model(self) -> None:
        """Write the trained networks into a file that a person names."""
        title = _("Save the trained model")
        named = self._dialogs.new_file(title, "model.zip", _("MONAI bundle (*.zip)"))
        if named is None:
            return
        path = named if named.suffix else named.with_suffix(".zip")
        text = _("{path} is there already.").format(path=path)  # Qt asked about the name as it was given
        if path != named and path.exists() and self._dialogs.choose(title, text, [_("Keep it"), _("Replace it")]) != 1:
            return
        self._session.write_bundle(path)
        self.show()

    def show(self) -> None:
        """Buttons and progress: on each tick."""
        ui, session = self._ui, self._session
        busy = session.reasons_against_output()
        no_folder = [] if ui.exportPathEdit.currentPath else [_("Name a folder for the segmentations.")]
        no_scans = [] if ui.newScansPathEdit.currentPath else [_("Name the folder of further scans.")]
        dicom = chosen(ui.formatBox) == "dicom-seg"
        no_series = [_("Name the folder of the original DICOM series.")] if dicom else []
        no_series = [] if ui.dicomPathEdit.currentPath else no_series
        no_dicom = [_("Further scans are written as NRRD or NIfTI.")] if dicom else []
        ui.dicomPathEdit.enabled = dicom
        explain(
            ui.exportReasonLabel,
            (ui.exportButton, busy or no_folder or no_series),
            (ui.applyButton, busy or session.reasons_against_applying() or no_folder or no_scans or no_dicom),
            (ui.reportButton, busy or session.reasons_against_report()),
            (ui.modelButton, busy or session.reasons_against_bundle()),
        )
        watched = session.output_job
        active = watched is not None and watched.seen.state.active
        ui.stopExportButton.visible = ui.exportBar.visible = active
        if watched is None:
            return
        if active:
            ui.exportBar.value = round(1000 * watched.seen.fraction)
            self._told = (watched.job.id, watched.seen.state)
        elif self._told is not None and self._told[0] == watched.job.id and self._told[1].active:
            self._told = (watched.job.id, watched.seen.state)
            text, written = f"{ended_in_words(watched)} {session.output_in_words()}".strip(), session.output_written()
            if watched.kind == JobKind.REPORT and written is not None:
                self._banner.show(text, _("Open it"), partial(_open, written))
            else:
                self._banner.show(text)
        say(ui.exportLabel, "" if active else session.output_in_words())


def _open(path: Path) -> None:
    """Show a file in the program that the computer shows such files with."""
    if not qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(path))):
        raise OSError(_("{path} could not be opened. Open it in a browser.").format(path=path))
