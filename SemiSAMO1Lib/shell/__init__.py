"""The commands of the shell."""

from . import method_commands, review_commands
from .commands import app

method_commands.add_to(app)
review_commands.add_to(app)

__all__ = ["app"]
