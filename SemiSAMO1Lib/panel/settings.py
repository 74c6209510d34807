"""What the module remembers between sessions, in Slicer's settings: recent projects, the worker's Python, its probe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import qt

from ..files import is_there

PREFIX = "SemiSAMO1/"

#: Projects that are remembered.
MOST_RECENT = 8


class Settings:
    """Values by name, as JSON text: settings files know no types."""

    def get(self, name: str, default: Any = None) -> Any:
        text = qt.QSettings().value(PREFIX + name, "")
        try:
            return json.loads(text) if text else default
        except (TypeError, ValueError):
            return default

    def put(self, name: str, value: Any) -> None:
        qt.QSettings().setValue(PREFIX + name, json.dumps(value))

    @property
    def recent(self) -> list[str]:
        """Folders of recent projects that are still there, the newest first."""
        return [one for one in self.get("recent", []) if is_there(Path(one) / "project.json")]

    def remember(self, folder: Path) -> None:
        """Put a project first. Others stay although they are not there now: their share may only be away."""
        newest = str(Path(folder).resolve())
        self.put("recent", [newest, *(one for one in self.get("recent", []) if one != newest)][:MOST_RECENT])
