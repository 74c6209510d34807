"""semisamo1 advise: the steps before and after the review."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..job import start
from ..project import Project
from ..project.advising import read_advice, request_advice
from .console import exit_for, follow, guarded, next_step, out, say

ProjectPath = Annotated[Path, typer.Argument(help="The project folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


@guarded
def advise(project: ProjectPath, as_json: Json = False) -> None:
    """Recommend the scan to label: the one that looks most like the others. Scans that do not fit are named."""
    opened = Project(project)
    job = request_advice(opened)
    start(job)
    exit_for(job, follow(job, as_json))
    ranking = read_advice(opened)
    first = ranking[0]
    value = {"recommended": first.case, "ranking": [one.to_json() for one in ranking]}
    if not as_json:
        table = Table("case", "similarity", "warning")
        for one in ranking:
            table.add_row(one.case, f"{one.centrality:.2f}", one.warning)
        out.print(table)
    step = next_step("template", project, "--case", first.case, "--labels", "FILE")
    say(value, as_json, f"Label {first.case}: {first.reason}. {step}")


def add_to(app: typer.Typer) -> None:
    """Put these commands into the shell."""
    examples: dict[Callable[..., None], str] = {
        advise: "semisamo1 advise ~/study",
    }
    for command, example in examples.items():
        app.command(epilog=f"Example: {example}")(command)
