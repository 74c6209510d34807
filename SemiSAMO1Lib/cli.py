"""The door for people: `semisamo1 COMMAND ...` (typer and rich). Every command says with --help how it is used."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script; says what to install when the shell's own packages are missing."""
    try:
        from .shell import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"the shell needs {error.name}: pip install 'semisamo1[shell]'", file=sys.stderr)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
