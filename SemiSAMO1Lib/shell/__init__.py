"""The commands of the shell."""

from .commands import app
from .method_commands import add_to

add_to(app)

__all__ = ["app"]
