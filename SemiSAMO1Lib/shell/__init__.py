"""The commands of the shell."""

from .commands import app

__all__ = ["app"]
