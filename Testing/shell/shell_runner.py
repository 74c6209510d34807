"""Commands of the shell in this process, as the tests see them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from typer.testing import CliRunner

from SemiSAMO1Lib.shell import app


@dataclass(frozen=True)
class Shown:
    """What a command printed, on lines of its own and as one line, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return " ".join((self.out + self.err).split())

    def json(self) -> Any:
        return json.loads(self.out)


def shell(*arguments: object) -> Shown:
    """A command in this process; an error that gets as far as this is a traceback for a person."""
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"a traceback was shown to a person: {result.exception!r}") from result.exception
    assert "Traceback" not in result.output, result.output
    return Shown(result.exit_code, result.stdout, result.stderr)
