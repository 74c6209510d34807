"""TensorBoard curves beside events.jsonl, where the extra `curves` is installed."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from ..engine.observer import Observer


class WithCurves:
    """An observer that passes everything on and writes losses as curves, one run a round. A context manager.

    Look at them with: tensorboard --logdir FOLDER
    """

    def __init__(self, observer: Observer, folder: Path) -> None:
        self.observer = observer
        self.folder = folder
        self._writers: dict[int, Any] = {}
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._make: Any = SummaryWriter
        except ImportError:
            self._make = None

    def __enter__(self) -> WithCurves:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()

    def event(self, kind: str, **fields: Any) -> None:
        self.observer.event(kind, **fields)
        if self._make is None or kind not in ("losses", "judged"):
            return
        writer = self._writer(fields["round"])
        values = fields["losses"] if kind == "losses" else {"validation Dice": fields["value"]}
        for name, value in values.items():
            writer.add_scalar(name, value, fields["iteration"])

    def should_stop(self) -> bool:
        return self.observer.should_stop()

    def _writer(self, number: int) -> Any:
        if number not in self._writers:
            self._writers[number] = self._make(str(self.folder / f"round-{number}"))
        return self._writers[number]
