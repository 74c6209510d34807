"""Lets threads run while a window waits for events: Slicer's main thread does not give Python up by itself then."""

from __future__ import annotations

import time

import qt

#: Milliseconds between two gifts, and seconds of each.
EVERY_MS, GIFT_S = 20, 0.005


class TimeForThreads:
    """While `give` was called and `keep` was not, the main thread sleeps for a moment every now and then: then, and
    while Python code runs in it, other threads have their turn."""

    def __init__(self) -> None:
        self._timer = qt.QTimer()
        self._timer.setInterval(EVERY_MS)
        self._timer.connect("timeout()", lambda: time.sleep(GIFT_S))

    def give(self) -> None:
        self._timer.start()

    def keep(self) -> None:
        self._timer.stop()
