"""The only way in which the engine talks outwards."""

from __future__ import annotations

from typing import Any, Protocol


class Observer(Protocol):
    """Who watches a run: a background job, a shell, a test."""

    def event(self, kind: str, **fields: Any) -> None:
        """Something happened: 'progress', 'note', 'losses', 'round'... with JSON-able fields."""

    def should_stop(self) -> bool:
        """True once somebody asked the run to stop; it stops at the next safe point."""


class Stopped(Exception):
    """Raised at a safe point after `should_stop` said so; everything finished until then is on disk."""

    def __init__(self, text: str = "stopped as asked; finished work is kept") -> None:
        super().__init__(text)


class Silent:
    """An observer that listens to nothing and never stops a run."""

    def event(self, kind: str, **fields: Any) -> None:
        del kind, fields

    def should_stop(self) -> bool:
        return False


class PartOfMore:
    """An observer of a part of some work whose progress is another one's: it tells that one everything else."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def event(self, kind: str, **fields: Any) -> None:
        if kind != "progress":
            self._observer.event(kind, **fields)

    def should_stop(self) -> bool:
        return self._observer.should_stop()


def stop_if_asked(observer: Observer) -> None:
    """Raise Stopped when the observer asks for it."""
    if observer.should_stop():
        raise Stopped
