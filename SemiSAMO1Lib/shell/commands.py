"""semisamo1 init, template, train, status, cancel, resume, predict, evaluate, report, demo, doctor: the main job."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .. import __version__, files
from ..choices import PRESETS
from ..job import JobError, JobFolder, JobKind, Observed, State, cancel, kill, observe, resume, running_training, start
from ..job.launcher import RanElsewhere, require_resumable
from ..job.watch import all_jobs, trainings
from ..project import Project, ProjectError, Role
from ..project.advising import FEWEST
from ..project.estimate import in_words
from ..project.results import changes, current_training, prediction_files
from .console import (
    WRONG_USE,
    Bar,
    Json,
    ProjectPath,
    counted,
    existing_file,
    exit_for,
    fail,
    follow,
    guarded,
    next_step,
    out,
    read_parameters,
    run_job,
    say,
)
from .given_labels import as_volume_file, parsed_priority

app = typer.Typer(
    help="One labelled volume in, a segmented cohort out.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    one = _opened_or_made(project, images)
    before = {case.id for case in one.state.cases}
    parameters = {"images": str(images.resolve())}
    run_job(JobFolder.create(one.jobs, JobKind.IMPORT, parameters, []), as_json)
    state = one.refresh()
    known = ("the same file as case", "the same series as case")
    skipped = [{"name": s.name, "reason": s.reason} for s in state.skipped]
    value = {"project": str(project), "cases": [case.id for case in state.cases], "skipped": skipped}
    lines = [f"{len(state.cases)} scans in {project}, {sum(c.id not in before for c in state.cases)} of them new"]
    lines += [f"  {case.name} is case {case.id}" for case in state.cases if case.name != case.id]
    lines += [
        f"  skipped {s['name']}: {s['reason']}" for s in skipped if not (before and s["reason"].startswith(known))
    ]
    if labelled := state.with_role(Role.TEMPLATE):
        lines.append(f"The template is {labelled[0].id}. {next_step('train', project)}")
    elif len(state.cases) >= FEWEST:
        lines.append(f"Which scan is the best one to label? {next_step('advise', project)}")
    else:
        lines.append(next_step("template", project, "--case", state.cases[0].id, "--labels", "FILE"))
    say(value, as_json, "\n".join(lines))


def _opened_or_made(project: Path, images: Path) -> Project:
    """The project there, or a new one; a folder in which nothing could be found gets none."""
    from ..project.importing import candidates

    if images.resolve() == project.resolve():
        raise ProjectError(f"{images} cannot be both the project and the scans. Give the project a folder of its own.")
    if (images / "project.json").exists():
        raise ProjectError(f"{images} is a project. Give the folder that holds the scans.")
    if (project / "project.json").exists():
        return Project(project)
    if next(candidates(images, project), None) is None and not (images / "data").is_dir():
        raise ProjectError(f"no scan in {images}: no NIfTI, NRRD, MetaImage, DICOM or HDF5 file")
    return Project.create(project)


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
    sure: Annotated[bool, typer.Option("--sure", help="It is this case's, even if it looks like another's.")] = False,
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
    existing_file(labels)
    role = one.role_for_label(case)
    order = parsed_priority(priority)
    with as_volume_file(labels) as volume:
        reading = one.add_label(
            case,
            volume,
            role=role,
            absent=absent or (),
            add_labels=add_labels,
            priority=order,
            refuse_doubts=not sure,
        )
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
    lines = [f"{found.id} is {found.role}, label version {found.label_version}: {shown}"]
    lines += [f"note: {note}" for note in reading.notes]
    say(value, as_json, "\n".join([*lines, next_step("train", project)]))


@app.command(epilog="Example: semisamo1 train ~/hippocampus --preset quick --device auto --seed 1")
@guarded
def train(
    project: ProjectPath,
    preset: Annotated[
        str | None,
        typer.Option(help="quick (a look), standard (when not given) or thorough (about ten times standard)."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Training rounds; 0 = no network is trained.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Optimizer steps a round.")] = None,
    learner: Annotated[
        str | None,
        typer.Option(
            help="How the specialist learns: mt (when not given), uamt, dan, dtc, semisam, semisam-uamt, "
            "semisam+, supervised, pseudo, or the full name."
        ),
    ] = None,
    generalist: Annotated[
        str | None, typer.Option(help="Who carries the label: registration, sam-med3d, mind or fused.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="SAM-Med3D's file, when it is not in its usual place.")] = None,
    preprocessing: Annotated[str | None, typer.Option(help="For SAM-Med3D: official or released.")] = None,
    coverage: Annotated[str | None, typer.Option(help="For SAM-Med3D: full, or centre as in the paper.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (when not given), cpu, cuda or cuda:0.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same result; 0 when not given.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with further parameters; options win.")] = None,
    go_on: Annotated[
        bool | None,
        typer.Option(
            "--continue/--from-scratch",
            help="Begin with the current training's weights, or anew; when not given, with them where they fit.",
        ),
    ] = None,
    detach: Annotated[bool, typer.Option(help="Return at once; the training goes on in the background.")] = False,
    keep_rounds: Annotated[bool, typer.Option(help="Keep the predictions of every round.")] = False,
    as_json: Json = False,
) -> None:
    """Train on the labelled scans and segment all others; it goes on when the shell is closed."""
    from ..engine.config import make_config
    from ..engine.devices import require_device
    from ..engine.learners import learner_named
    from ..engine.propagation.registry import require_generalists
    from ..engine.ranks import started_together
    from ..engine.specialists import require_specialist
    from ..project.training import LAST, request_training

    parameters = read_parameters(config)
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
    require_specialist(wanted.specialist)
    require_device(wanted.device)
    require_generalists(wanted)
    learner_named(wanted.learner).require_files(wanted)
    one = Project(project)

    def request() -> JobFolder:
        if (other := running_training(one.jobs)) is not None:
            told = (
                f"training {other.id} is under way in this project. Wait for it, or stop it: semisamo1 cancel {project}"
            )
            if not observe(other).here:
                told += f". If the computer where it ran has surely ended it: semisamo1 resume {project} --elsewhere"
            raise JobError(told)
        earlier = LAST if go_on is None else current_training(one).id if go_on else None
        return request_training(one, {**parameters, "continue_from": earlier, "keep_rounds": keep_rounds})

    if started_together()[0] > 1:
        _do_together(request, wanted.device, as_json)
        return
    job = request()
    start(job)
    _watch(job, detach, as_json)


@app.command("resume", epilog="Example: semisamo1 resume ~/hippocampus")
@guarded
def resume_command(
    project: ProjectPath,
    job: Annotated[str | None, typer.Option(help="The job; the newest unfinished training when not given.")] = None,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="Take it over from another computer: it has surely ended there.")
    ] = False,
    detach: Annotated[bool, typer.Option(help="Return at once.")] = False,
    as_json: Json = False,
) -> None:
    """Go on with a training that was stopped or interrupted."""
    from ..engine.ranks import started_together
    from ..tasks.train import config_of, require_shares_of

    ended = (State.INTERRUPTED, State.FAILED)
    found = _job(
        project,
        job,
        lambda seen: seen.state in ended or (seen.state is State.NOT_RESPONDING and not seen.here),
    )
    if found.spec()["kind"] != JobKind.TRAIN:
        raise ProjectError(f"{found.id} is no training. Give its command again")
    if (processes := started_together()[0]) > 1:

        def ready() -> JobFolder:
            require_shares_of(found, processes)
            with _told_how_to_take_over(project):
                require_resumable(found, elsewhere)
            return found

        _do_together(ready, config_of(found).device, as_json)
        return
    with _told_how_to_take_over(project):
        resume(found, elsewhere=elsewhere)
    _watch(found, detach, as_json)


@contextmanager
def _told_how_to_take_over(project: Path) -> Iterator[None]:
    try:
        yield
    except RanElsewhere as error:
        raise JobError(f"{error} To take it over: semisamo1 resume {project} --elsewhere") from error


def _do_together(prepare: Callable[[], JobFolder], device: str, as_json: bool) -> None:
    """A training in this process and those that torchrun or srun started with it; the first says what came of it."""
    from ..tasks.together import work_together

    job, code = work_together(prepare, device)
    _watch(job, False, as_json)
    if code:
        raise typer.Exit(code)


def _watch(job: JobFolder, detach: bool, as_json: bool) -> None:
    if detach:
        say({"job": job.id, "folder": str(job.path)}, as_json, f"{job.id} runs in the background: {job.path}")
        return
    exit_for(job, follow(job, as_json))
    index = files.read_json(job.index)
    value = {"job": job.id, "results": str(job.results), "round": index["round"], "cases": len(index["cases"])}
    value["report"] = str(job.path / "report.html")
    folder = job.results / str(index["round"])
    project = Project(job.project)
    learned = changes(project, job.id)
    value["reviewed"] = [vars(one) for one in learned]
    value["left_out"] = {row["name"]: row["reason"] for row in index["skipped"]}
    lines = [f"{counted(len(index['cases']), 'scan')} segmented: {folder}", f"Report: {job.path / 'report.html'}"]
    lines += [f"  left out {name}: {reason}" for name, reason in value["left_out"].items()]
    lines += [f"Reviewed before, predicted anew: {one.in_words}" for one in learned]
    value["counts"] = project.state.current_training
    if value["counts"] != job.id:
        lines.append(f"The predictions of {value['counts']}, which is newer, go on counting, not these")
        lines.append(next_step("use", job.project, "--training", job.id))
    else:
        lines.append(next_step("queue", job.project))
    say(value, as_json, "\n".join(lines))


@app.command(epilog="Example: semisamo1 status ~/hippocampus --json")
@guarded
def status(
    project: ProjectPath,
    job: Annotated[
        str | None, typer.Option(help="The job; the one under way or the newest training if not given.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List all jobs of the project.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a project's job is doing: the one under way, else the newest training."""
    if every:
        _list_jobs(project, as_json)
        return
    found = _job(project, job, imports=True)
    seen = observe(found)
    text = f"{found.id}: {seen.state}"
    if seen.state is not State.FINISHED:
        text += f", {seen.stage}, {seen.fraction:.0%}"
    if seen.eta_s is not None and seen.state.active:
        text += f", {in_words(seen.eta_s)} left"
    if seen.state is State.INTERRUPTED:
        training = found.spec()["kind"] == JobKind.TRAIN
        text += f". {next_step('resume', project, '--job', found.id) if training else 'Give its command again'}"
    if seen.message:
        text += f"\n{seen.message}"
    if seen.state is State.FINISHED and found.index.exists():
        text += f"\nPredictions: {found.results / str(files.read_json(found.index)['round'])}"
        text += f"\nReport: {found.path / 'report.html'}"
    if missing := Project(project).missing():
        text += f"\n{len(missing)} scans are not where they were. {next_step('locate', project, '--folder', 'FOLDER')}"
    say({"job": found.id, **seen.to_json()}, as_json, text)


def _list_jobs(project: Path, as_json: bool) -> None:
    one = Project(project)
    rows = [(job, observe(job)) for job in all_jobs(one.jobs)]
    if as_json:
        print(json.dumps([{"job": job.id, **seen.to_json()} for job, seen in rows]))
        return
    table = Table("job", "state", "done", "begun", "predictions")
    for job, seen in rows:
        mark = "count" if job.id == one.state.current_training else ""
        begun = job.spec()["created"][:16].replace("T", " ")
        table.add_row(job.id, str(seen.state), f"{seen.fraction:.0%}", begun, mark)
    out.print(table)


@app.command("cancel", epilog="Example: semisamo1 cancel ~/hippocampus")
@guarded
def cancel_command(
    project: ProjectPath,
    job: Annotated[str | None, typer.Option(help="The job; the training under way when not given.")] = None,
    now: Annotated[bool, typer.Option(help="End the worker and its children at once.")] = False,
    as_json: Json = False,
) -> None:
    """Stop a training; what it finished is kept and it can be resumed."""
    found = _job(project, job, lambda seen: seen.state.active)
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
    text = f"{output}\nwarning: {scores['warning']}" if scores["warning"] else f"{output}"
    say({"output": str(output), **scores}, as_json, text)


@app.command(epilog="Example: semisamo1 evaluate ~/hippocampus ~/references --json")
@guarded
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="A project, or a folder of predictions.", show_default=False)],
    references: Annotated[Path, typer.Argument(help="Folder of label files with the same names.", show_default=False)],
    distances: Annotated[bool, typer.Option(help="Compute surface distances too.")] = True,
    as_json: Json = False,
) -> None:
    """Compare predictions with references: Dice, Jaccard, 95HD and ASD in mm."""
    from ..tasks.compare import compare, label_files, references_of

    for folder in (predictions, references):
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
    is_project = (predictions / "project.json").exists()
    values = None
    if is_project:
        one = Project(predictions)
        found, values, truth = prediction_files(one), one.state.labels.values, references_of(one, references)
    else:
        found, truth = label_files(predictions), label_files(references)
        # what `apply` writes beside each segmentation is no prediction
        found = {name: path for name, path in found.items() if not name.endswith("-uncertainty") or name in truth}
    with Bar("evaluate", as_json) as bar:
        value = compare(found, truth, distances, values, bar)
    if as_json:
        print(json.dumps(value))
        return
    names = ["mean_dice", "mean_jaccard"] + (["mean_hd95_mm", "mean_asd_mm"] if distances else [])
    table = Table("case", *[name.removeprefix("mean_") for name in names])
    for row in [*value["cases"], {"case": "mean", **value}]:
        table.add_row(row["case"], *["-" if row[n] is None else f"{row[n]:.3f}" for n in names])
    out.print(table)
    if absent := value["without_reference"]:
        some = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
        out.print(f"not compared, no reference of the same name ({len(absent)}): {some}", soft_wrap=True)


@app.command(epilog="Example: semisamo1 report ~/hippocampus --references ~/references")
@guarded
def report(
    project: ProjectPath,
    references: Annotated[Path | None, typer.Option(help="Folder of label files: adds Dice and distances.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the HTML file goes; else into the job folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write the report of the current training: one self-contained HTML file."""
    from ..tasks.report import write_report

    job = current_training(Project(project))
    path = output or job.path / ("report.html" if references is None else "report-with-references.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise fail(f"{path}: the report is an HTML file; give a name that ends in .html", WRONG_USE)
    if references is not None and not references.is_dir():
        raise NotADirectoryError(f"{references} is not a folder. Give the folder that holds the reference labels.")
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
        f"(before training {value['registration_dice']:.3f})",
        f"Report: {value['report']}",
        f"{next_step('queue', value['project'])}   (the predictions to review)",
        f"{next_step('init', 'PROJECT', '--images', 'FOLDER')}   (your own scans)",
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
        table.add_row(
            place, "writable" if access["writable"] else Text.assemble(("not writable", "red"), f" {access['error']}")
        )
    for name, one in found["packages"].items():
        absent = Text("absent (optional)", "yellow") if name in OPTIONAL else Text("absent", "red")
        table.add_row(name, one.get("version", absent))
    out.print(table)
    out.print(_checkpoint_line(), soft_wrap=True)
    lacking = Text.assemble(("not ready", "red"), ": something that is needed is missing")
    out.print("ready" if found["ready"] else lacking)
    for one in found["missing"]:
        out.print(Text.assemble(("missing", "red"), f" {one['package']}, needed for {one['for']}: {one['get']}"))
    raise typer.Exit(0 if found["ready"] else 1)


def _checkpoint_line() -> str:
    """Whether SAM-Med3D's weights are there; they are optional."""
    try:
        from ..engine.generalists.sam_med3d import checkpoint
    except ImportError:
        return "SAM-Med3D's checkpoint: not looked for, a package is missing"
    try:
        return f"SAM-Med3D's checkpoint: {checkpoint.find()}"
    except checkpoint.CheckpointError:
        return "SAM-Med3D's checkpoint: absent (optional); get it with: semisamo1 checkpoint fetch"


def _job(
    project: Path, name: str | None, wanted: Callable[[Observed], bool] | None = None, imports: bool = False
) -> JobFolder:
    """The job of this name; else the newest training that is `wanted`, else the newest training.

    With `imports`, another job comes first that is under way, and last the newest of any kind.
    """
    jobs = Project(project).jobs
    if name is not None:
        if not (jobs / name / "job.json").exists():
            raise ProjectError(f"no job {name!r}; there are: {', '.join(j.id for j in all_jobs(jobs)) or 'none'}")
        return JobFolder(jobs / name)
    every, own = all_jobs(jobs), trainings(jobs)
    under_way = [job for job in every if job.status.exists() and observe(job).state.active] if imports else []
    fitting = [job for job in own if wanted is not None and wanted(observe(job))]
    found = under_way or fitting or own or (every if imports else [])
    if not found:
        raise ProjectError("this project has no training yet. Start one with: semisamo1 train")
    return found[-1]
