"""semisamo1 init, template, train, status, cancel, resume, predict, evaluate, report, demo, doctor: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import __version__, files
from ..job import JobError, JobFolder, JobKind, cancel, kill, observe, resume, running_training, start
from ..job.watch import all_jobs, latest_training
from ..project import Project, ProjectError, Role
from .console import WRONG_USE, Bar, exit_for, fail, follow, guarded, out, say

app = typer.Typer(
    help="One labelled volume in, a segmented cohort out.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ProjectPath = Annotated[Path, typer.Argument(help="The project folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One labelled volume in, a segmented cohort out."""
    del version


@app.command(epilog="Example: semisamo1 init ~/hippocampus --images ~/scans")
@guarded
def init(
    project: ProjectPath,
    images: Annotated[Path, typer.Option(help="Folder of NIfTI, NRRD, MetaImage, DICOM or HDF5 scans.")],
    as_json: Json = False,
) -> None:
    """Make a project from a folder of scans, or add further scans to one."""
    if not images.is_dir():
        raise NotADirectoryError(f"{images} is not a folder. Give the folder that holds the scans.")
    one = Project(project) if (project / "project.json").exists() else Project.create(project)
    parameters = {"images": str(images.resolve())}
    job = JobFolder.create(one.jobs, JobKind.IMPORT, parameters, [])
    start(job)
    exit_for(job, follow(job, as_json))
    state = one.refresh()
    skipped = [{"name": s.name, "reason": s.reason} for s in state.skipped]
    value = {"project": str(project), "cases": [case.id for case in state.cases], "skipped": skipped}
    lines = [f"{len(state.cases)} scans in {project}"]
    lines += [f"  skipped {s['name']}: {s['reason']}" for s in skipped]
    lines.append(f"Next: semisamo1 template {project} --case {state.cases[0].id} --labels FILE")
    say(value, as_json, "\n".join(lines))


@app.command(epilog="Example: semisamo1 template ~/hippocampus --case hippocampus_001 --labels drawn.seg.nrrd")
@guarded
def template(
    project: ProjectPath,
    case: Annotated[str, typer.Option(help="The labelled scan.")],
    labels: Annotated[Path | None, typer.Option(help="Its labels: .seg.nrrd, label map, or .h5.")] = None,
    remove: Annotated[bool, typer.Option(help="Take the case's label out of force.")] = False,
    absent: Annotated[
        list[int] | None, typer.Option(help="A label value that is not in this scan (repeatable).")
    ] = None,
    add_labels: Annotated[bool, typer.Option(help="Take unknown label values into the label table.")] = False,
    priority: Annotated[str | None, typer.Option(help="Which label wins where segments overlap, e.g. 2,1.")] = None,
    as_json: Json = False,
) -> None:
    """Give a case its label; the first one is the template, later ones are further labelled cases."""
    one = Project(project)
    if remove == (labels is not None):
        raise fail("give either --labels FILE or --remove", WRONG_USE)
    if labels is None:
        removed = one.remove_label(case)
        say({"case": removed.id, "role": str(removed.role)}, as_json, f"{removed.id} has no label in force any more")
        return
    if not labels.is_file():
        raise FileNotFoundError(f"{labels} does not exist")
    others = [c for c in one.state.with_role(Role.TEMPLATE) if c.id.lower() != case.lower()]
    role = Role.LABELLED if others else Role.TEMPLATE
    order = None if priority is None else [int(word) for word in priority.split(",")]
    reading = one.add_label(case, _as_volume_file(labels, one, case), "template", role, absent or (), add_labels, order)
    found = one.state.case(case)
    names = {label.value: label.name for label in one.state.labels}
    value = {
        "case": found.id,
        "role": str(found.role),
        "version": found.label_version,
        "labels": names,
        "exact": reading.exact,
        "notes": list(reading.notes),
    }
    shown = ", ".join(f"{v} {n}" for v, n in names.items())
    text = "\n".join([f"{found.id} is {found.role}, label version {found.label_version}: {shown}", *reading.notes])
    say(value, as_json, text)


def _as_volume_file(labels: Path, project: Project, case: str) -> Path:
    """The label file itself, or the labels of a file of the HDF5 layout, written beside the project's cache."""
    if labels.suffix != ".h5":
        return labels
    from ..engine.data.hdf5_layout import read_case
    from ..image_io import write_volume

    read = read_case(labels, with_label=True)
    assert read.label is not None, "asked for"
    path = project.folder / "cache" / f"{project.state.case(case).id}-label.nrrd"
    write_volume(path, read.label)
    return path


@app.command(epilog="Example: semisamo1 train ~/hippocampus --preset quick --device auto --seed 1")
@guarded
def train(
    project: ProjectPath,
    preset: Annotated[str | None, typer.Option(help="quick, standard (when not given) or thorough.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Training rounds; 0 = registration alone.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Optimizer steps a round.")] = None,
    learner: Annotated[str | None, typer.Option(help="How the specialist learns, e.g. mean_teacher.")] = None,
    generalist: Annotated[
        str | None, typer.Option(help="Who carries the label: registration, sam-med3d, mind or fused.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="SAM-Med3D's file, when it is not in its usual place.")] = None,
    preprocessing: Annotated[str | None, typer.Option(help="For SAM-Med3D: official or released.")] = None,
    coverage: Annotated[str | None, typer.Option(help="For SAM-Med3D: full, or centre as in the paper.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (when not given), cpu, cuda or cuda:0.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same result; 0 when not given.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with further parameters; options win.")] = None,
    detach: Annotated[bool, typer.Option(help="Return at once; the training goes on in the background.")] = False,
    keep_rounds: Annotated[bool, typer.Option(help="Keep the predictions of every round.")] = False,
    as_json: Json = False,
) -> None:
    """Train on the template and segment all other scans, in the background."""
    from ..engine.config import PRESETS, make_config
    from ..engine.learners import learner_named
    from ..engine.propagation.registry import require_generalists
    from ..project.training import request_training

    parameters: dict[str, Any] = files.read_json(config) if config else {}
    if not isinstance(parameters, dict):
        raise fail(f'{config} must hold one JSON object, for example {{"rounds": 2}}', WRONG_USE)
    given: dict[str, Any] = {"preset": preset, "rounds": rounds, "iterations": iterations, "learner": learner}
    given |= {"device": device, "seed": seed, "generalist": generalist}
    frozen = {"checkpoint": checkpoint, "preprocessing": preprocessing, "coverage": coverage}
    if frozen := {key: value for key, value in frozen.items() if value is not None}:
        named = parameters.get("generalists", {})
        given["generalists"] = {**named, **frozen} if isinstance(named, dict) else named
    parameters.update({key: value for key, value in given.items() if value is not None})
    if parameters.setdefault("preset", "standard") not in PRESETS:
        raise fail(f"unknown preset {parameters['preset']!r}; there are: {', '.join(PRESETS)}", WRONG_USE)
    wanted = make_config(**parameters)  # what is wrong or missing is named before anything starts
    require_generalists(wanted)
    learner_named(wanted.learner).require(wanted)
    one = Project(project)
    if (other := running_training(one.jobs)) is not None:
        raise JobError(f"training {other.id} is under way in this project. Wait for it, or stop it: semisamo1 cancel")
    job = request_training(one, {**parameters, "keep_rounds": keep_rounds})
    start(job)
    _watch(job, detach, as_json)


@app.command("resume", epilog="Example: semisamo1 resume ~/hippocampus")
@guarded
def resume_command(
    project: ProjectPath,
    job: Annotated[str | None, typer.Option(help="The job; the newest training when not given.")] = None,
    detach: Annotated[bool, typer.Option(help="Return at once.")] = False,
    as_json: Json = False,
) -> None:
    """Go on with a training that was stopped or interrupted."""
    found = _job(project, job)
    resume(found)
    _watch(found, detach, as_json)


def _watch(job: JobFolder, detach: bool, as_json: bool) -> None:
    if detach:
        say({"job": job.id, "folder": str(job.path)}, as_json, f"{job.id} runs in the background: {job.path}")
        return
    exit_for(job, follow(job, as_json))
    index = files.read_json(job.index)
    value = {"job": job.id, "results": str(job.results), "round": index["round"], "cases": len(index["cases"])}
    value["report"] = str(job.path / "report.html")
    folder = job.results / str(index["round"])
    say(value, as_json, f"{len(index['cases'])} scans segmented: {folder}\nReport: {job.path / 'report.html'}")


@app.command(epilog="Example: semisamo1 status ~/hippocampus --json")
@guarded
def status(
    project: ProjectPath,
    job: Annotated[str | None, typer.Option(help="The job; the newest when not given.")] = None,
    as_json: Json = False,
) -> None:
    """Say what the newest job of a project is doing."""
    found = _job(project, job, any_kind=True)
    seen = observe(found)
    text = f"{found.id}: {seen.state}, {seen.stage}, {seen.fraction:.0%}"
    if seen.message:
        text += f"\n{seen.message}"
    say({"job": found.id, **seen.to_json()}, as_json, text)


@app.command("cancel", epilog="Example: semisamo1 cancel ~/hippocampus")
@guarded
def cancel_command(
    project: ProjectPath,
    job: Annotated[str | None, typer.Option(help="The job; the newest training when not given.")] = None,
    now: Annotated[bool, typer.Option(help="End the worker and its children at once.")] = False,
    as_json: Json = False,
) -> None:
    """Stop a training; what it finished is kept and it can be resumed."""
    found = _job(project, job)
    seen = cancel(found)
    if now:
        kill(found)
        seen = observe(found)
    say({"job": found.id, **seen.to_json()}, as_json, f"{found.id} is {seen.state}")


@app.command(epilog="Example: semisamo1 predict ~/hippocampus --input new.nii.gz --output new.seg.nrrd")
@guarded
def predict(
    project: ProjectPath,
    input_file: Annotated[Path, typer.Option("--input", help="A scan of the same kind.")],
    output: Annotated[Path, typer.Option(help="Where the segmentation goes (.seg.nrrd or any volume format).")],
    uncertainty: Annotated[Path | None, typer.Option(help="Where the uncertainty map (0-100 %) goes.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")] = "auto",
    as_json: Json = False,
) -> None:
    """Segment a further scan with the project's current training."""
    from ..tasks.predict import predict_file

    one = Project(project)
    with Bar("predict", as_json) as bar:
        scores = predict_file(one, input_file, output, uncertainty, device, bar)
    say({"output": str(output), **scores}, as_json, f"{output}")


@app.command(epilog="Example: semisamo1 evaluate ~/hippocampus ~/references --json")
@guarded
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="A project, or a folder of predictions.", show_default=False)],
    references: Annotated[Path, typer.Argument(help="Folder of label files with the same names.", show_default=False)],
    distances: Annotated[bool, typer.Option(help="Compute surface distances too.")] = True,
    as_json: Json = False,
) -> None:
    """Compare predictions with references: Dice, Jaccard, 95HD and ASD in mm."""
    from ..tasks.compare import compare, label_files
    from ..tasks.report import predictions_of

    for folder in (predictions, references):
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
    is_project = (predictions / "project.json").exists()
    values = None
    if is_project:
        one = Project(predictions)
        found, values = predictions_of(one), one.state.labels.values
    else:
        found = label_files(predictions)
    with Bar("evaluate", as_json) as bar:
        value = compare(found, label_files(references), distances, values, bar)
    if as_json:
        print(json.dumps(value))
        return
    names = ["mean_dice", "mean_jaccard"] + (["mean_hd95_mm", "mean_asd_mm"] if distances else [])
    table = Table("case", *[name.removeprefix("mean_") for name in names])
    for row in [*value["cases"], {"case": "mean", **value}]:
        table.add_row(row["case"], *["-" if row[n] is None else f"{row[n]:.3f}" for n in names])
    out.print(table)


@app.command(epilog="Example: semisamo1 report ~/hippocampus --references ~/references")
@guarded
def report(
    project: ProjectPath,
    references: Annotated[Path | None, typer.Option(help="Folder of label files: adds Dice and distances.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the HTML file goes; else into the job folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write the report of the current training: one self-contained HTML file."""
    from ..tasks.report import current_training, write_report

    job = current_training(Project(project))
    path = output or job.path / "report.html"
    with Bar("report", as_json) as bar:
        write_report(job, path, references, bar)
    say({"report": str(path)}, as_json, str(path))


@app.command(epilog="Example: semisamo1 demo demo-output")
@guarded
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the phantoms and the project go.")] = Path("demo-output"),
    as_json: Json = False,
) -> None:
    """Run the main job on a phantom cohort: label one, segment the others, compare with the truth."""
    from .demo import run_demo

    value = run_demo(folder, as_json)
    lines = [
        f"Dice on {value['cases']} phantoms that nobody labelled: {value['mean_dice']:.3f} "
        f"(registration alone {value['registration_dice']:.3f})",
        f"Report: {value['report']}",
    ]
    say(value, as_json, "\n".join(lines))


@app.command(epilog="Example: semisamo1 doctor")
def doctor(as_json: Json = False) -> None:
    """Say what this computer has for the work, what is missing, and how to get it."""
    from ..doctor import OPTIONAL, examine

    found = examine()
    if as_json:
        print(json.dumps(found))
        raise typer.Exit(0 if found["ready"] else 1)
    table = Table("what", "found")
    table.add_row("Python", f"{found['python']['version']} ({found['python']['executable']})")
    memory = found["system"]["memory_bytes"]
    table.add_row("computer", f"{found['system']['name']}, {found['system']['cores']} cores")
    table.add_row("memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB")
    disk = found["free_disk_bytes"]
    table.add_row("free disk", "unknown" if disk is None else f"{disk / 2**30:.1f} GiB")
    for device in found["devices"]:
        table.add_row("device", ", ".join(f"{k} {v}" if k != "name" else str(v) for k, v in device.items()))
    for place, access in found["write_access"].items():
        table.add_row(place, "writable" if access["writable"] else f"[red]not writable[/] {access['error']}")
    for name, one in found["packages"].items():
        absent = "[yellow]absent (optional)[/]" if name in OPTIONAL else "[red]absent[/]"
        table.add_row(name, one.get("version", absent))
    out.print(table)
    for one in found["missing"]:
        out.print(f"[red]missing[/] {one['package']}, needed for {one['for']}: {one['get']}")
    raise typer.Exit(0 if found["ready"] else 1)


def _job(project: Path, name: str | None, any_kind: bool = False) -> JobFolder:
    jobs = Project(project).jobs
    if name is not None:
        if not (jobs / name / "job.json").exists():
            raise ProjectError(f"no job {name!r}; there are: {', '.join(j.id for j in all_jobs(jobs)) or 'none'}")
        return JobFolder(jobs / name)
    every = all_jobs(jobs)
    found = (every[-1] if every else None) if any_kind else latest_training(jobs)
    if found is None:
        raise ProjectError("this project has no job yet. Start one with: semisamo1 train")
    return found
