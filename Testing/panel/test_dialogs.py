"""Questions in real message boxes, answered as a person does who only wants them gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from PySide6.QtCore import Qt
from PySide6.QtTest import QTest
from slicer_harness import module


@pytest.fixture
def dialogs(widget: Any) -> Any:
    """The panel's own, not a stand-in."""
    return widget.panel.dialogs


def while_asked(act: Callable[[Any], None]) -> None:
    """Do something with the next message box as soon as it is open."""
    import qt

    timer = qt.QTimer(module.QAPPLICATION)
    timer.setInterval(20)

    def look() -> None:
        box = module.QAPPLICATION.activeModalWidget()
        if box is not None:
            timer.stop()
            act(box)

    timer.connect("timeout()", look)
    timer.start()


def press_escape(box: Any) -> None:
    QTest.keyClick(box, Qt.Key.Key_Escape)


def close(box: Any) -> None:
    box.close()


@pytest.mark.parametrize("leave", [press_escape, close])
class TestLeftAlone:
    """By the key, or by the frame's X."""

    def test_a_question_that_is_closed_has_its_first_answer(self, dialogs: Any, leave: Callable[[Any], None]) -> None:
        while_asked(leave)
        assert dialogs.choose("Undo", "Discard what is painted?", ["Keep it", "Discard it"]) == 0

    def test_or_the_one_that_begins_nothing(self, dialogs: Any, leave: Callable[[Any], None]) -> None:
        while_asked(leave)
        assert dialogs.choose("Set-up", "Install?", ["Install", "Cancel"], escape=1) == 1


def test_a_button_is_its_answer(dialogs: Any) -> None:
    while_asked(lambda box: next(one for one in box.buttons() if one.text == "Discard it").click())
    assert dialogs.choose("Undo", "Discard what is painted?", ["Keep it", "Discard it"]) == 1


def test_enter_is_the_first_answer(dialogs: Any) -> None:
    while_asked(lambda box: QTest.keyClick(box, Qt.Key.Key_Return))
    assert dialogs.choose("Undo", "Discard what is painted?", ["Keep it", "Discard it"]) == 0
