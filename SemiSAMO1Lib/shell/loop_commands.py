"""semisamo1 advise, export, simulate: the steps before and after the review."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .. import files
from ..job import JobFolder, JobKind, start
from ..project import Project, ProjectError
from ..project.advising import read_advice, request_advice
from ..project.export import TABLE, require_output
from .console import WRONG_USE, Bar, exit_for, fail, follow, guarded, next_step, out, say

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


@guarded
def simulate(
    project: ProjectPath,
    references: Annotated[Path, typer.Option(help="Folder of label files with the scans' names.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder for the copies, effort.json and effort.png.")],
    orders: Annotated[str, typer.Option(help="Orders, with commas between: queue, random, entropy.")] = "queue,random",
    steps: Annotated[str, typer.Option(help="Corrected cases before each further training.")] = "3,10",
    preset: Annotated[str, typer.Option(help="quick, standard or thorough.")] = "quick",
    rounds: Annotated[int | None, typer.Option(help="Training rounds.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Optimizer steps a round.")] = None,
    seed: Annotated[int, typer.Option(help="Of every training.")] = 0,
    config: Annotated[Path | None, typer.Option(help="JSON file with further parameters.")] = None,
    go_on: Annotated[bool, typer.Option("--continue", help="Begin with the weights of the training before.")] = False,
    as_json: Json = False,
) -> None:
    """Play the reviewer with reference labels: what is a correction worth? The project itself is not changed."""
    from ..engine.evaluation.effort import effort_figure
    from ..tasks.simulate import Plan
    from ..tasks.simulate import simulate as play

    try:
        counts = [int(word) for word in steps.split(",")]
    except ValueError as error:
        raise fail(f"--steps {steps}: give growing numbers with commas between, e.g. 3,10", WRONG_USE) from error
    if counts != sorted(set(counts)) or counts[0] < 1:
        raise fail(f"--steps {steps}: give growing numbers with commas between, e.g. 3,10", WRONG_USE)
    if output.resolve() == project.resolve():
        raise ProjectError(f"{output} is the project. Give the copies a folder of their own.")
    parameters = {**(files.read_json(config) if config else {}), "preset": preset, "seed": seed}
    parameters |= {key: value for key, value in (("rounds", rounds), ("iterations", iterations)) if value is not None}
    plan = Plan(orders.split(","), counts, parameters, go_on)
    with Bar("simulate", as_json) as bar:
        found = play(Project(project), references, output, plan, bar)
    files.write_json(output / "effort.json", found)
    effort_figure(found["curves"], found["common_cases"]).savefig(output / "effort.png", dpi=110)
    if not as_json:
        table = Table("order", "corrected", "Dice, never corrected by any order", "Dice, not corrected so far")
        for order, rows in found["curves"].items():
            for row in rows:
                table.add_row(order, str(row["corrected"]), f"{row['common']:.4f}", f"{row['untouched']:.4f}")
        out.print(table)
    say({"output": str(output), **found}, as_json, f"{output / 'effort.png'}")


@guarded
def export(
    project: ProjectPath,
    output: Annotated[Path, typer.Option(help="Folder for the segmentations and volumes.csv.", show_default=False)],
    format_: Annotated[str, typer.Option("--format", help="nrrd, nifti or dicom-seg.")] = "nrrd",
    dicom: Annotated[Path | None, typer.Option(help="For dicom-seg: folder of the original series.")] = None,
    as_json: Json = False,
) -> None:
    """Write all segmentations, labels first, then predictions, and a table of volumes, origins and scores."""
    opened = Project(project)
    require_output(opened, output, format_)
    where = {"output": str(output.resolve()), "dicom": str(dicom.resolve()) if dicom else None}
    job = JobFolder.create(opened.jobs, JobKind.EXPORT, {**where, "format": format_}, [])
    start(job)
    exit_for(job, follow(job, as_json))
    table = list(csv.DictReader(io.StringIO((output / TABLE).read_text(encoding="utf-8"))))
    left_out = list(csv.DictReader(io.StringIO((output / "left_out.csv").read_text(encoding="utf-8"))))
    exported = {row["case"]: row["what"] for row in table}
    value = {"output": str(output), "exported": exported, "left_out": {r["case"]: r["reason"] for r in left_out}}
    labels = sum(what == "label" for what in exported.values())
    lines = [f"{len(exported)} segmentations in {output}: {labels} labels, {len(exported) - labels} predictions"]
    lines += [f"  left out {row['case']}: {row['reason']}" for row in left_out]
    say(value, as_json, "\n".join(lines))


def add_to(app: typer.Typer) -> None:
    """Put these commands into the shell."""
    examples: dict[Callable[..., None], str] = {
        advise: "semisamo1 advise ~/study",
        export: "semisamo1 export ~/study --output ~/segmentations --format nifti",
        simulate: "semisamo1 simulate ~/study --references ~/truth --output ~/effort --steps 3,10",
    }
    for command, example in examples.items():
        app.command(epilog=f"Example: {example}")(command)
