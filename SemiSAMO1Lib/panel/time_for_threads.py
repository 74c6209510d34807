"""Lets a thread run while a window waits for events: Slicer's main thread does not give Python up by itself then."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import qt

#: Milliseconds between two gifts, and seconds of each.
EVERY_MS, GIFT_S = 20, 0.005


class TimeForThreads:
    """While a thread works at something the main thread sleeps for a moment every now and then: then, and while Python
    code runs in it, other threads have their turn."""

    def __init__(self) -> None:
        self._work: Future[Any] | None = None
        self._timer = qt.QTimer()
        self._timer.setInterval(EVERY_MS)
        self._timer.connect("timeout()", self._give)

    def give(self, work: Future[Any]) -> None:
        """Until `work` is done."""
        self._work = work
        self._timer.start()

    def _give(self) -> None:
        if self._work is None or self._work.done():
            self._timer.stop()
        else:
            time.sleep(GIFT_S)
