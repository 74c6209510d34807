"""Questions to a person: few, and each answer is a button that says what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import qt
import slicer
from slicer.i18n import tr as _

from ..project import LabelTable


class Dialogs:
    """Message boxes; a test gives another object with the same methods."""

    def choose(self, title: str, text: str, answers: Sequence[str], escape: int = 0) -> int:
        """Ask; returns the number of the answer. The first one is the default. `escape` is what the key and closing the
        question mean: an answer that loses nothing and begins nothing."""
        box = qt.QMessageBox(slicer.util.mainWindow())
        box.setWindowTitle(title)
        box.setText(text)
        buttons = [box.addButton(answer, qt.QMessageBox.ActionRole) for answer in answers]
        box.setDefaultButton(buttons[0])
        box.setEscapeButton(buttons[escape])
        box.exec_()
        clicked = box.clickedButton()
        return buttons.index(clicked) if clicked in buttons else escape

    def color(self, rgb: tuple[int, int, int]) -> tuple[int, int, int] | None:
        """Let a person choose a colour; None when it was cancelled."""
        found = qt.QColorDialog.getColor(qt.QColor(*rgb), slicer.util.mainWindow())
        return (found.red(), found.green(), found.blue()) if found.isValid() else None

    def folder(self, title: str) -> Path | None:
        """Let a person choose a folder; None when it was cancelled."""
        found = qt.QFileDialog.getExistingDirectory(slicer.util.mainWindow(), title)
        return Path(found) if found else None

    def new_file(self, title: str, name: str, kind: str) -> Path | None:
        """Let a person name a file to be written, with a name to begin with and one kind of file, such as
        `Model (*.zip)`; None when it was cancelled. Qt itself asks before a file of that name is replaced."""
        found = qt.QFileDialog.getSaveFileName(slicer.util.mainWindow(), title, name, kind)
        return Path(found) if found else None


def ask_absent(dialogs: Dialogs, table: LabelTable, counts: Mapping[int, int]) -> list[int] | None:
    """Labels without a voxel, once a person said that they are not in this scan; None where there is more to paint."""
    missing = [label for label in table if not counts.get(label.value)]
    if not missing:
        return []
    names = ", ".join(label.name for label in missing)
    text = _("Not found in this scan: {names}. Are they really not there?").format(names=names)
    answers = [_("Go on painting"), _("They are not in this scan")]
    return [label.value for label in missing] if dialogs.choose(_("Labels"), text, answers) == 1 else None
