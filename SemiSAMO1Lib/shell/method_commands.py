"""semisamo1 reproduce, test, export-h5, import-h5, checkpoint: for those who compare methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import files
from ..job import JobFolder, JobKind
from ..project import Project
from .console import Bar, Json, guarded, out, read_parameters, run_job, say

Root = Annotated[Path, typer.Option("--root", help="Folder with data/<case>.h5, train.txt, test.txt.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")]


class Lines(Bar):
    """A progress bar that prints notes and warnings above itself, and keeps them in a log."""

    def __init__(self, title: str, hidden: bool, log: Path) -> None:
        super().__init__(title, hidden)
        self._hidden = hidden
        self._log = log

    def event(self, kind: str, **fields: Any) -> None:
        super().event(kind, **fields)
        if kind in ("note", "warning", "judged"):
            text = fields.get("text") or ", ".join(f"{key} {value}" for key, value in fields.items())
            if not self._hidden:
                out.print(f"{kind}: {text}", soft_wrap=True)
        if kind != "progress":
            files.append_line(self._log, {"kind": kind, **fields})


@guarded
def reproduce(
    root: Root,
    learner: Annotated[
        str | None,
        typer.Option(
            help="mt (when not given), uamt, dan, dtc, semisam, semisam-uamt, semisam+, supervised or pseudo."
        ),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Training rounds; 3 when not given.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Optimizer steps a round; 15000 when not given.")] = None,
    patch: Annotated[
        tuple[int, int, int] | None, typer.Option(help="Voxels along the file's axes; 128 128 128 when not given.")
    ] = None,
    knn_k: Annotated[int | None, typer.Option(help="K of the vote between rounds; 5 when not given.")] = None,
    uncertainty_quantile: Annotated[
        float | None, typer.Option(help="Volumes from here on are refined; 0.9 when not given.")
    ] = None,
    labeled_num: Annotated[int, typer.Option(help="Cases of train.txt, from the first, whose label is read.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Of everything; 1337 when not given.")] = None,
    generalist: Annotated[
        str | None, typer.Option(help="sam-med3d (when not given), registration, mind or fused.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="SAM-Med3D's file; random: random weights.")] = None,
    coverage: Annotated[str | None, typer.Option(help="centre (the paper's crop, when not given) or full.")] = None,
    validate: Annotated[Path | None, typer.Option(help="List of labelled cases that choose the weights.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with further parameters; options win.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (when not given), cpu, cuda or cuda:0.")] = None,
    output: Annotated[Path | None, typer.Option(help="Weights, log and summary go here.")] = None,
    as_json: Json = False,
) -> None:
    """Run the published protocol on the HDF5 layout. Started again with the same output, it goes on."""
    from ..tasks.protocol import Protocol
    from ..tasks.protocol import reproduce as run

    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a folder")
    asked: dict[str, Any] = {
        "learner": learner,
        "rounds": rounds,
        "iterations": iterations,
        "patch": patch,
        "neighbours": knn_k,
    }
    asked |= {"uncertain_quantile": uncertainty_quantile, "seed": seed, "generalist": generalist}
    given = {key: value for key, value in asked.items() if value is not None}
    further = {key: value for key, value in read_parameters(config).items() if key not in given}
    named = further.get("generalists", {})
    if isinstance(named, dict):
        frozen = {"checkpoint": checkpoint, "coverage": coverage}
        named = {**named, **{key: value for key, value in frozen.items() if value is not None}}
        if coverage not in (None, "centre"):
            named = {"label_cells": "share", "upsampling": "trilinear", **named}
    further["generalists"] = named
    if device is not None:
        further["device"] = device
    protocol = Protocol(root=root, labelled=labeled_num, further=further, validate=validate, **given)
    settings = protocol.config()  # wrong values are named before anything is written
    rounds = settings.rounds
    folder = output or Path(f"reproduce-{learner or further.get('learner', 'mt')}-{settings.seed}")
    with Lines("reproduce", as_json, folder / "log.jsonl") as lines:
        summary = run(protocol, folder, lines)
    text = f"{summary['seconds']:.0f} s. Weights: {folder / 'weights'}; summary: {folder / 'summary.json'}\n"
    if rounds:
        text += f"Next: semisamo1 test --root {root} --weights {folder / 'weights' / f'round-{rounds}.pth'}"
    say({"output": str(folder), **summary}, as_json, text)


@guarded
def test(
    root: Root,
    weights: Annotated[Path, typer.Option(help="weights/round-<n>.pth of a run, or a published file.")],
    cases: Annotated[str, typer.Option("--list", help="test, val, train, or a .txt file.")] = "test",
    patch: Annotated[
        tuple[int, int, int] | None, typer.Option(help="Window along the file's axes; that of the run when not given.")
    ] = None,
    save_predictions: Annotated[Path | None, typer.Option(help="Folder for NRRD files with geometry.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure weights on labelled cases: Dice, Jaccard, 95HD and ASD as mean ± standard deviation."""
    from ..tasks.measure import measure_weights

    if not weights.is_file():
        raise FileNotFoundError(f"{weights} does not exist")
    with Bar("test", as_json) as bar:
        value = measure_weights(root, weights, cases, device, patch, save_predictions, bar)
    table = Table("measure", "mean ± standard deviation")
    for name, title in (
        ("dice", "Dice"),
        ("jaccard", "Jaccard"),
        ("hd95_voxels", "95HD, voxels (as published)"),
        ("asd_voxels", "ASD, voxels (as published)"),
        ("hd95_mm", "95HD, mm"),
        ("asd_mm", "ASD, mm"),
    ):
        table.add_row(title, f"{value[name]['mean']:.4f} ± {value[name]['std']:.4f}")
    if as_json:
        say(value, True, "")
    else:
        out.print(table)


@guarded
def export_h5(
    project: Annotated[Path, typer.Argument(help="The project folder.", show_default=False)],
    root: Annotated[Path, typer.Argument(help="A new folder for the layout.", show_default=False)],
    predictions: Annotated[bool, typer.Option(help="Predictions as labels of cases that nobody labelled.")] = False,
    references: Annotated[Path | None, typer.Option(help="Labels to measure against: they go to test.txt.")] = None,
    as_json: Json = False,
) -> None:
    """Write a project as the published HDF5 layout, with geometry and axis order as attributes."""
    from ..tasks.convert import export_layout

    with Bar("export", as_json) as bar:
        value = export_layout(Project(project), root, predictions, bar, references)
    text = f"{value['cases']} cases in {root}, labelled: {', '.join(value['labelled']) or 'none'}"
    say(value, as_json, f"{text}, to be measured: {len(value['test'])}")


@guarded
def import_h5(
    root: Annotated[Path, typer.Argument(help="Folder of the layout.", show_default=False)],
    project: Annotated[Path, typer.Argument(help="A new project folder.", show_default=False)],
    labeled_num: Annotated[int, typer.Option(help="Cases of train.txt, from the first, whose label is taken.")] = 1,
    as_json: Json = False,
) -> None:
    """Make a project from the published HDF5 layout; the first case of train.txt becomes the template."""
    from ..tasks.convert import label_imported, labelled_names

    if not (root / "data").is_dir():
        raise NotADirectoryError(f"{root / 'data'} is not a folder; expected data/<case>.h5 and train.txt in {root}")
    names = labelled_names(root, labeled_num)  # what is wrong is named before anything is written
    one = Project.create(project)
    run_job(JobFolder.create(one.jobs, JobKind.IMPORT, {"images": str(root.resolve())}, []), as_json)
    labelled = label_imported(one, root, names)
    state = one.refresh()
    skipped = [{"name": s.name, "reason": s.reason} for s in state.skipped]
    text = f"{len(state.cases)} scans in {project}, labelled: {', '.join(labelled) or 'none'}"
    value = {"project": str(project), "cases": len(state.cases), "labelled": labelled, "skipped": skipped}
    say(value, as_json, "\n".join([text, *(f"  skipped {s['name']}: {s['reason']}" for s in skipped)]))


checkpoint_app = typer.Typer(help="The published weights of SAM-Med3D.", no_args_is_help=True)


@checkpoint_app.command(epilog="Example: semisamo1 checkpoint fetch")
@guarded
def fetch(
    url: Annotated[str | None, typer.Option(help="Another place to fetch from.")] = None,
    as_json: Json = False,
) -> None:
    """Download the checkpoint (384 MiB); a download that was cut short goes on."""
    from ..engine.generalists.sam_med3d import checkpoint

    target = checkpoint.places()[0]
    with Bar("fetch", as_json) as bar:

        def tell(done: int, of: int) -> None:
            fraction = done / of if of else 0.0
            bar.event("progress", stage="MiB", done=done >> 20, of=of >> 20, fraction=fraction)

        path, digest = checkpoint.fetch(target, url or checkpoint.CARD.url, tell)
    licence = checkpoint.CARD.licence
    say(
        {"path": str(path), "sha256": digest, "licence": licence},
        as_json,
        f"{path}\nsha256 {digest}\nlicence {licence}",
    )


@checkpoint_app.command(epilog="Example: semisamo1 checkpoint show --checkpoint sam_med3d_turbo.pth")
@guarded
def show(
    checkpoint: Annotated[str | None, typer.Option(help="The file; it is looked for when not given.")] = None,
    as_json: Json = False,
) -> None:
    """Say where the checkpoint lies, its hash, and whether it can be loaded."""
    from ..engine.generalists.sam_med3d import checkpoint as published
    from ..engine.generalists.sam_med3d.generalist import load_model

    path = published.find(checkpoint)
    loaded = load_model(str(path), "full")
    genuine = published.is_published(loaded.identity)
    value = {"path": str(path), "sha256": loaded.identity, "published": genuine, "notes": list(loaded.notes)}
    lines = [str(path), f"sha256 {loaded.identity}", "the published file" if genuine else "NOT the published file"]
    say(value, as_json, "\n".join([*lines, *loaded.notes]))


def add_to(app: typer.Typer) -> None:
    """Put these commands into the shell."""
    examples = "semisamo1 reproduce --root LA_h5 --learner uamt --generalist registration"
    app.command(epilog=f"Example: {examples}")(reproduce)
    app.command(epilog="Example: semisamo1 test --root LA_h5 --weights reproduce-mt-1337/weights/round-3.pth")(test)
    app.command("export-h5", epilog="Example: semisamo1 export-h5 ~/hippocampus ~/hippocampus_h5")(export_h5)
    app.command("import-h5", epilog="Example: semisamo1 import-h5 ~/LA_h5 ~/left_atrium")(import_h5)
    app.add_typer(checkpoint_app, name="checkpoint", epilog="Example: semisamo1 checkpoint fetch")
