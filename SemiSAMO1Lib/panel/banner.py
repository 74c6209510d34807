"""One line at the top of the panel for what happened meanwhile: never a window in the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .widgets import guarded


class Banner:
    """A message, and at most one thing to do about it."""

    def __init__(self, ui: Any) -> None:
        self._ui = ui
        self._action: Callable[[], None] | None = None
        ui.bannerButton.connect("clicked(bool)", self._act)
        ui.bannerCloseButton.connect("clicked(bool)", self.hide)
        self.hide()

    @property
    def text(self) -> str:
        return self._ui.bannerLabel.text if self._ui.bannerFrame.isVisibleTo(self._ui.bannerFrame.parent()) else ""

    def show(self, text: str, button: str = "", action: Callable[[], None] | None = None) -> None:
        self._ui.bannerLabel.text = text
        self._ui.bannerButton.text = button
        self._ui.bannerButton.visible = action is not None
        self._action = action
        self._ui.bannerFrame.visible = True

    def hide(self) -> None:
        self._ui.bannerFrame.visible = False
        self._action = None

    def _act(self) -> None:
        action, self._action = self._action, None
        self.hide()
        if action is not None:
            guarded(self.show)(action)()
