"""Read what a job has newly written, a little at a time: a window never waits. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .folder import JobFolder

#: Bytes read at once at most.
AT_ONCE = 256 * 1024

#: Of a longer history, only this much of the end is read at first.
HISTORY = 4 * AT_ONCE


@dataclass
class Tail:
    """New complete lines of a growing file; `poll` reads at most AT_ONCE bytes.

    A file that is longer than HISTORY at first is begun near its end; `skipped` says so. A line that is not finished
    yet waits for the next poll, one longer than AT_ONCE is left out.
    """

    path: Path
    offset: int | None = None
    skipped: bool = False

    def poll(self) -> list[str]:
        try:
            size = self.path.stat().st_size
        except OSError:
            return []
        if self.offset is None:
            self.offset = max(0, size - HISTORY)
            self.skipped = self.offset > 0
        if size < self.offset:  # the file was written anew
            self.offset = 0
        if size == self.offset:
            return []
        with open(self.path, "rb") as stream:
            begun_inside = False
            if self.offset > 0:
                stream.seek(self.offset - 1)
                begun_inside = stream.read(1) != b"\n"
            content = stream.read(AT_ONCE)
        end = content.rfind(b"\n") + 1
        if end == 0:
            if len(content) == AT_ONCE:
                self.offset += AT_ONCE
            return []
        self.offset += end
        lines = content[:end].decode("utf-8", errors="replace").splitlines()
        return lines[1:] if begun_inside else lines

    @property
    def behind(self) -> bool:
        """Whether there is more to read at once."""
        try:
            return self.path.stat().st_size - (self.offset or 0) >= AT_ONCE
        except OSError:
            return False


@dataclass
class JobTail:
    """New events and log lines of a job."""

    job: JobFolder
    events: Tail = field(init=False)
    log: Tail = field(init=False)

    def __post_init__(self) -> None:
        self.events, self.log = Tail(self.job.events), Tail(self.job.log)

    def poll(self) -> tuple[list[dict[str, Any]], list[str]]:
        """(events, log lines) since the last poll; a damaged line is left out."""
        found = []
        for line in self.events.poll():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "kind" in event:
                found.append(event)
        return found, self.log.poll()
