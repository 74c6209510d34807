"""The commands of the shell."""

from . import loop_commands, method_commands, review_commands
from .commands import app

method_commands.add_to(app)
review_commands.add_to(app)
loop_commands.add_to(app)

__all__ = ["app"]
