"""Small habits of all steps: a disabled button says why, boxes are filled without noise, tables change by the row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import qt

#: Rows of a table that are written at once; the others follow with the next ticks.
ROWS_AT_ONCE = 60


def explain(label: Any, *buttons: tuple[Any, Sequence[str]]) -> None:
    """Enable buttons, or disable them and say why: in the tooltip of each, and together in the text under them."""
    said: list[str] = []
    for button, reasons in buttons:
        text = " ".join(reasons)
        button.enabled = not reasons
        if button.toolTip != text:
            button.toolTip = text
        said += [reason for reason in reasons if reason not in said]
    say(label, " ".join(said))


def say(label: Any, text: str) -> None:
    """Text of a label; one that has nothing to say is not shown."""
    if label.text != text:
        label.text = text
    label.visible = bool(text)


@contextmanager
def silent(*widgets: Any) -> Iterator[None]:
    """Change widgets without their signals."""
    before = [one.blockSignals(True) for one in widgets]
    try:
        yield
    finally:
        for one, was in zip(widgets, before, strict=True):
            one.blockSignals(was)


def fill_box(box: Any, entries: Sequence[tuple[str, str]]) -> bool:
    """Put (text, data) entries into a combo box; what was chosen stays chosen where it still is there. Returns whether
    anything changed."""
    now = [(box.itemText(n), box.itemData(n)) for n in range(box.count)]
    if now == list(entries):
        return False
    chosen = box.itemData(box.currentIndex) if box.currentIndex >= 0 else None
    with silent(box):
        box.clear()
        for text, data in entries:
            box.addItem(text, data)
        found = box.findData(chosen) if chosen is not None else -1
        box.setCurrentIndex(max(found, 0) if entries else -1)
    return True


def chosen(box: Any) -> str | None:
    """The data of the chosen entry of a combo box."""
    return box.itemData(box.currentIndex) if box.currentIndex >= 0 else None


def choose(box: Any, data: str) -> None:
    """Choose the entry with this data, without a signal; nothing where there is none."""
    found = box.findData(data)
    if found >= 0:
        with silent(box):
            box.setCurrentIndex(found)


class Rows:
    """A table of text that is brought up to date a few rows at a time, only where something changed."""

    def __init__(self, table: Any, titles: Sequence[str], widths: Sequence[int] = ()) -> None:
        self.table = table
        self._shown: list[tuple[str, ...]] = []
        self._wanted: list[tuple[str, ...]] = []
        table.setColumnCount(len(titles))
        table.setHorizontalHeaderLabels(list(titles))
        table.setWordWrap(False)
        for column, width in enumerate(widths):
            table.setColumnWidth(column, width)
        table.verticalHeader().setVisible(False)
        table.horizontalHeader().setStretchLastSection(True)

    def show(self, rows: Sequence[tuple[str, ...]]) -> None:
        self._wanted = list(rows)
        self.go_on()

    @property
    def finished(self) -> bool:
        return self._shown == self._wanted

    def go_on(self) -> None:
        """Write up to ROWS_AT_ONCE rows that differ."""
        if self.finished:
            return
        if len(self._wanted) < len(self._shown):
            self.table.setRowCount(len(self._wanted))
            del self._shown[len(self._wanted) :]
        written = 0
        for number, row in enumerate(self._wanted):
            if written == ROWS_AT_ONCE:
                return
            if number < len(self._shown) and self._shown[number] == row:
                continue
            if number == len(self._shown):
                self.table.setRowCount(number + 1)
                self._shown.append(())
            self._write(number, row, self._shown[number])
            self._shown[number] = row
            written += 1

    def _write(self, number: int, row: tuple[str, ...], before: tuple[str, ...]) -> None:
        for column, text in enumerate(row):
            if column < len(before) and before[column] == text:
                continue
            item = self.table.item(number, column)
            if item is None:
                self.table.setItem(number, column, qt.QTableWidgetItem(text))
            else:
                item.setText(text)


def append_lines(view: Any, lines: Sequence[str]) -> None:
    """Add lines to a log view, all at once; a view that has nothing to say is not shown."""
    if lines:
        view.appendPlainText("\n".join(lines))
        view.visible = True


def guarded(show: Callable[[str], None]) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Wrap a button's function: an error becomes a message that names what to do, never a traceback."""

    def wrap(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                function()
            except (RuntimeError, OSError, ValueError) as error:  # ours, and those of slicer.util
                show(str(error))

        return run

    return wrap
