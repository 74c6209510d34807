"""semisamo1 advise, locate, apply, bundle, export, simulate: the steps before and after the review."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .. import files
from ..project import Project, ProjectError
from ..project.advising import read_advice, request_advice
from ..project.export import TABLE, request_export, request_predictions
from .console import (
    FAILED,
    WRONG_USE,
    Bar,
    Json,
    ProjectPath,
    counted,
    ending_as_ctrl_c,
    fail,
    guarded,
    next_step,
    out,
    read_parameters,
    register,
    run_job,
    say,
)


@guarded
def advise(project: ProjectPath, as_json: Json = False) -> None:
    """Recommend the scan to label: the one that looks most like the others. Scans that do not fit are named."""
    opened = Project(project)
    job = request_advice(opened)
    run_job(job, as_json)
    ranking = read_advice(opened)
    first = ranking[0]
    value = {"recommended": first.case, "ranking": [one.to_json() for one in ranking]}
    if not as_json:
        table = Table("case", "similarity", "warning")
        for one in ranking:
            table.add_row(one.case, f"{one.centrality:.2f}", one.warning)
        out.print(table)
    step = next_step("template", project, "--case", first.case, "--labels", "FILE")
    text = f"Label {first.case}: {first.reason}. {step}"
    say(value, as_json, "No scan looks like the others: choose the template yourself." if first.warning else text)


@guarded
def simulate(
    project: ProjectPath,
    references: Annotated[Path, typer.Option(help="Folder of label files with the scans' names.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the copies, effort.json and effort.png; the project's name with -effort, not given."
        ),
    ] = None,
    orders: Annotated[str, typer.Option(help="Orders, with commas between.")] = "queue,random,entropy",
    steps: Annotated[str, typer.Option(help="Corrected cases before each further training.")] = "3,10",
    preset: Annotated[str | None, typer.Option(help="quick (when not given), standard or thorough.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Training rounds.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Optimizer steps a round.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every training; 0 when not given.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with further parameters; options win.")] = None,
    go_on: Annotated[
        bool, typer.Option("--continue/--from-scratch", help="Begin with the weights of the training before, or anew.")
    ] = True,
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
    project = project.resolve()
    output = output or project.with_name(f"{project.name}-effort")
    if output.is_dir() and any(output.iterdir()) and not (output / "plan.json").is_file():
        raise ProjectError(
            f"{output} holds other files. Give the copies an empty folder, or that of an earlier simulation."
        )
    given = {"preset": preset, "seed": seed, "rounds": rounds, "iterations": iterations}
    parameters = {"preset": "quick", "seed": 0, **read_parameters(config)}
    parameters |= {key: value for key, value in given.items() if value is not None}
    plan = Plan(orders.split(","), counts, parameters, go_on)
    with Bar("simulate", as_json) as bar, ending_as_ctrl_c():
        found = play(Project(project), references, output, plan, bar)
    files.write_json(output / "effort.json", found)
    effort_figure(found["curves"], found["common_cases"]).savefig(output / "effort.png", dpi=110)
    if not as_json:
        table = Table("order", "corrected", "Dice, never corrected by any order", "Dice, not corrected so far")
        for order, rows in found["curves"].items():
            for row in rows:
                shown = ["none left" if one is None else f"{one:.4f}" for one in (row["common"], row["untouched"])]
                table.add_row(order, str(row["corrected"]), *shown)
        out.print(table)
        for one in found["differences"]:
            interval = f"{one['mean']:+.4f} (95 %: {one['low']:+.4f} to {one['high']:+.4f})"
            out.print(f"{one['order']} less {one['against']} after {one['corrected']}: {interval}", soft_wrap=True)
    say({"output": str(output), **found}, as_json, f"{output / 'effort.png'}")


@guarded
def locate(
    project: ProjectPath,
    folder: Annotated[Path, typer.Option(help="Where the scans lie now, at any depth.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Find the scans of a project that was moved: by their names, and only where they are unchanged."""
    opened = Project(project)
    found = opened.moved_scans(folder)
    opened.relink(found)
    missing = opened.missing()
    names = {path.name for path in folder.rglob("*")} if missing else set()
    lines = [f"{len(found)} scans found in {folder}" if found or missing else "No scan is missing"]
    for case in missing:
        changed = "; a file of its name is there, with other contents" if Path(case.absolute).name in names else ""
        lines.append(f"  still missing: {case.id}{changed}")
    say({"found": list(found), "missing": [case.id for case in missing]}, as_json, "\n".join(lines))
    if missing:
        raise typer.Exit(FAILED)


@guarded
def export(
    project: ProjectPath,
    output: Annotated[Path, typer.Option(help="Folder for the segmentations and volumes.csv.", show_default=False)],
    format_: Annotated[str, typer.Option("--format", help="nrrd, nifti or dicom-seg.")] = "nrrd",
    dicom: Annotated[Path | None, typer.Option(help="For dicom-seg: folder of the original series.")] = None,
    as_json: Json = False,
) -> None:
    """Write all segmentations, labels first, then predictions, and a table of volumes, origins and scores.

    An earlier export of the same format in this folder is replaced.
    """
    job = request_export(Project(project), output, format_, dicom)
    run_job(job, as_json)
    table, left_out = _table(output / TABLE), _table(output / "left_out.csv")
    exported = {row["case"]: row["what"] for row in table}
    value = {"output": str(output), "exported": exported, "left_out": {r["case"]: r["reason"] for r in left_out}}
    labels = sum(what == "label" for what in exported.values())
    lines = [f"{output}: {counted(labels, 'label')}, {counted(len(exported) - labels, 'prediction')}"]
    lines += [f"  left out {row['case']}: {row['reason']}" for row in left_out]
    say(value, as_json, "\n".join(lines))


@guarded
def bundle(
    project: ProjectPath,
    output: Annotated[Path, typer.Option(help="The bundle: one .zip file.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Write the trained networks as one portable file, a MONAI bundle that runs without this program."""
    from ..tasks.bundle import write_bundle

    card = write_bundle(Project(project), output)
    value = {"output": str(output), "name": card["name"], "description": card["description"]}
    say(value, as_json, f"{output}\nSegment with it: unzip it, then python segment.py SCAN OUTPUT")


@guarded
def apply(
    project: ProjectPath,
    images: Annotated[Path, typer.Option(help="Folder of further scans of the same kind.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder for segmentations, uncertainty maps and predictions.csv.")],
    format_: Annotated[str, typer.Option("--format", help="nrrd or nifti.")] = "nrrd",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")] = "auto",
    as_json: Json = False,
) -> None:
    """Segment a folder of further scans with the current training; they do not become cases of the project. What an
    earlier call wrote into the output folder is removed."""
    job = request_predictions(Project(project), images, output, format_, device)
    training = job.spec()["parameters"]["training"]
    run_job(job, as_json)
    table, left_out = _table(output / "predictions.csv"), _table(output / "left_out.csv")
    warnings = {row["scan"]: row["warning"] for row in table if row["warning"]}
    files_written = {row["scan"]: row["file"] for row in table}
    value = {"output": str(output), "training": training, "segmented": files_written, "warnings": warnings}
    value["left_out"] = {row["scan"]: row["reason"] for row in left_out}
    lines = [f"{counted(len(files_written), 'scan')} segmented by {training} in {output}"]
    lines += [f"  warning, {scan}: {text}" for scan, text in warnings.items()]
    lines += [f"  left out {row['scan']}: {row['reason']}" for row in left_out]
    say(value, as_json, "\n".join(lines))


def _table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def add_to(app: typer.Typer) -> None:
    """Put these commands into the shell."""
    examples: dict[Callable[..., None], str] = {
        advise: "semisamo1 advise ~/study",
        locate: "semisamo1 locate ~/study --folder ~/moved_scans",
        apply: "semisamo1 apply ~/study --images ~/new_scans --output ~/new_segmentations",
        bundle: "semisamo1 bundle ~/study --output model.zip",
        export: "semisamo1 export ~/study --output ~/segmentations --format nifti",
        simulate: "semisamo1 simulate ~/study --references ~/truth",
    }
    register(app, examples)
