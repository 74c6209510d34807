"""Driving the panel as a person does: press buttons, wait for what is shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slicer_harness import module


class Answers:
    """Answers the panel's questions in place of a person and keeps them for the test."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer = 0
        self.picked: tuple[int, int, int] | None = (1, 2, 3)
        self.found: Path | None = None
        self.named: Path | None = None

    def choose(self, title: str, text: str, answers: Sequence[str], escape: int = 0) -> int:
        self.asked.append(text)
        return min(self.answer, len(answers) - 1)

    def folder(self, title: str) -> Path | None:
        self.asked.append(title)
        return self.found

    def new_file(self, title: str, name: str, kind: str) -> Path | None:
        self.asked.append(title)
        return self.named

    def color(self, rgb: tuple[int, int, int]) -> tuple[int, int, int] | None:
        return self.picked


class Clock:
    """A clock that only goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def wait(panel: Any, until: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Let time and events pass, with the clock's ticks, until something is shown."""
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds} s for: {what}. Banner: {panel.banner.text!r}")
        module.QAPPLICATION.processEvents()
        panel.tick()
        time.sleep(0.02)
