"""Play the reviewer: correct cases with references, train again, and see what the untouched ones gain.

A benchmark. It works on copies of the project; the references stand for the labels that a person would draw.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..engine.evaluation.paired import paired_difference
from ..engine.observer import Observer, Silent, stop_if_asked
from ..job import JobError, JobFolder, State, cancel, kill, observe, running_training, start
from ..job.folder import usable_cores
from ..project import Project, ProjectError, Review, Role, reviews
from ..project.label_reader import LabelError, read_labels
from ..project.queue import queue, random_order
from ..project.results import predictions
from ..project.training import LAST, request_training
from .compare import compare, references_of

#: Looks for the end of a training this often, s.
_TICK_S = 0.5


def by_queue(project: Project) -> list[str]:
    """As the software offers them: the worst first, every fifth at random."""
    return [one.case for one in queue(project)]


def by_chance(project: Project) -> list[str]:
    """In an order that only chance decided, the same for every training."""
    waiting = {one.case for one in queue(project)}
    return [case for case in random_order((c.id for c in project.state.cases), "simulated reviewer") if case in waiting]


def by_entropy(project: Project) -> list[str]:
    """The least certain first."""
    rows = predictions(project)
    doubts = {one.case: rows[one.case]["scores"]["label_uncertainty"] for one in queue(project)}
    return sorted(doubts, key=lambda case: (-(1.0 if (doubt := doubts[case]) is None else doubt), case))


#: Orders in which a reviewer may take the cases.
ORDERS: dict[str, Callable[[Project], list[str]]] = {"queue": by_queue, "random": by_chance, "entropy": by_entropy}


@dataclass(frozen=True)
class Plan:
    """What to play.

    Attributes:
        orders: names in `ORDERS`.
        steps: cases that are corrected altogether before each further training, growing.
        parameters: of the trainings.
        go_on: begin each further training with the weights of the one before, where it has some.
    """

    orders: Sequence[str]
    steps: Sequence[int]
    parameters: Mapping[str, Any]
    go_on: bool = True


def simulate(
    project: Project, references: Path, folder: Path, plan: Plan, observer: Observer | None = None
) -> dict[str, Any]:
    """Play the reviewer in every order; steps that are in `folder` already are not done again.

    Returns:
        `curves`: order -> rows with `corrected`, `untouched` (mean Dice of the cases not corrected so far) and `common`
        (mean Dice of the cases that no order corrects), and the number of both. `differences`: after each step, the
        first order less each other one over the cases that no order corrects, with its 95 % bootstrap interval.

    Raises:
        ProjectError: there is no template, an unknown order, too few cases, or a training that failed.
        LabelError: a reference cannot be used; found out before the first training.
        NothingToCompare: no reference belongs to a case.
    """
    observer = observer or Silent()
    truth = references_of(project, references)
    if unknown := sorted(set(plan.orders) - set(ORDERS)):
        raise ProjectError(f"unknown order {unknown[0]!r}; there are: {', '.join(ORDERS)}")
    reviewed = [case.id for case in project.refresh().cases if case.review != Review.NOT_SEEN]
    if reviewed:
        raise ProjectError(
            f"{len(reviewed)} cases of this project were reviewed, {reviewed[0]} among them; a simulation begins "
            "before any review. Give a project with a template alone."
        )
    if not project.state.with_role(Role.TEMPLATE):
        raise ProjectError("no scan is labelled: label one as the template first")
    waiting = [case.id for case in project.state.with_role(Role.UNLABELLED) if case.id in truth]
    _require_enough(waiting, plan)
    _require_usable(project, {case: truth[case] for case in waiting})
    _require_same_plan(folder / "plan.json", plan, project, {case: truth[case] for case in waiting})
    start_folder = folder / "start"
    if not (start_folder / "done.json").exists():
        first = _copy(project, start_folder)
        _train(first, plan, observer, None)
        files.write_json(start_folder / "done.json", {})
    predicted = predictions(Project(start_folder))
    waiting = [case for case in waiting if case in predicted]  # a scan that cannot be read was left out
    _require_enough(waiting, plan)
    played = {}
    for order in plan.orders:
        played[order] = _play(Project(start_folder), folder / order, order, truth, plan, observer)
    touched = {case for rows in played.values() for row in rows for case in row["cases"]}
    curves = {
        order: [
            {
                "corrected": row["corrected"],
                "untouched": _mean(row["dice"], set(row["dice"]) - set(row["cases"])),
                "common": _mean(row["dice"], set(row["dice"]) - touched),
            }
            for row in rows
        ]
        for order, rows in played.items()
    }
    return {
        "curves": curves,
        "differences": _differences(played, set(waiting) - touched),
        "cases": len(waiting),
        "common_cases": len(set(waiting) - touched),
    }


def _require_enough(waiting: Sequence[str], plan: Plan) -> None:
    if len(waiting) <= plan.steps[-1]:
        raise ProjectError(
            f"{len(waiting)} cases have a reference; {plan.steps[-1]} corrected ones leave none untouched"
        )


def _require_usable(project: Project, truth: Mapping[str, Path]) -> None:
    """Raise LabelError for a reference that could not stand for a person's correction; an empty one can."""
    for case, path in truth.items():
        reading = read_labels(path, project.state.case(case).geometry, allow_empty=True)
        if not reading.exact:  # a person's correction may be resampled; what is measured against may not
            raise LabelError(f"{path} lies on another grid than the scan of {case}; resample it first")
        if unknown := sorted(set(np.unique(reading.volume.array).tolist()) - {0, *project.state.labels.values}):
            raise LabelError(f"{path} has label {unknown[0]}, which the template lacks; give references of its labels")


def _differences(played: Mapping[str, list[dict[str, Any]]], cases: Collection[str]) -> list[dict[str, Any]]:
    first, *others = played
    found = []
    for other in others if cases else ():
        for mine, theirs in zip(played[first][1:], played[other][1:], strict=True):
            untouched = {case: mine["dice"][case] for case in cases}
            between = paired_difference(untouched, theirs["dice"])
            numbers = {key: round(value, 4) for key, value in asdict(between).items()}
            found.append({"order": first, "against": other, "corrected": mine["corrected"], **numbers})
    return found


def _play(
    begin: Project, folder: Path, order: str, truth: Mapping[str, Path], plan: Plan, observer: Observer
) -> list[dict[str, Any]]:
    """One order: correct, train, score; a row for each step, kept as it is done."""
    kept = folder / "rows.json"
    rows: list[dict[str, Any]] = files.read_json(kept) if kept.exists() else []
    project = Project(folder) if rows else _copy(begin, folder)
    if not rows:
        rows = [{"corrected": 0, "cases": [], "dice": _scores(project, truth)}]
        files.write_json(kept, rows)
    for number, step in enumerate(plan.steps, start=1):
        if number < len(rows):
            continue
        done = _corrected(project)
        for case in [case for case in ORDERS[order](project) if case in truth][: step - len(done)]:
            _correct(project, case, truth[case])
        _train(project, plan, observer, LAST if plan.go_on else None)
        rows.append({"corrected": step, "cases": _corrected(project), "dice": _scores(project, truth)})
        files.write_json(kept, rows)
        observer.event(
            "note", text=f"{order}: {step} corrected, mean Dice {_mean(rows[-1]['dice'], rows[-1]['dice']):.4f}"
        )
    return rows


def _correct(project: Project, case: str, reference: Path) -> None:
    """Give a case its reference; labels that it lacks are declared absent, as a person would."""
    geometry = project.state.case(case).geometry
    found = set(np.unique(read_labels(reference, geometry, allow_empty=True).volume.array).tolist())
    absent = [value for value in project.state.labels.values if value not in found]
    reviews.correct(project, case, reference, absent, reviewer="simulated", sure=True)


def _corrected(project: Project) -> list[str]:
    return [case.id for case in project.refresh().cases if case.review == Review.CORRECTED]


def _scores(project: Project, truth: Mapping[str, Path]) -> dict[str, float]:
    """Case -> mean Dice of its current prediction."""
    rows = {case: row["prediction"] for case, row in predictions(project).items() if case in truth}
    found = compare(rows, {case: truth[case] for case in rows}, distances=False, values=project.state.labels.values)
    return {row["case"]: row["mean_dice"] for row in found["cases"]}


def _mean(dice: Mapping[str, float], cases: Collection[str]) -> float | None:
    """None where no case is left."""
    return round(float(np.mean([dice[case] for case in cases])), 4) if cases else None


def _require_same_plan(path: Path, plan: Plan, project: Project, truth: Mapping[str, Path]) -> None:
    """Steps of another plan, project or references are not mixed with these. Raises ProjectError."""
    labelled = [case for case in project.state.cases if case.label_version is not None]
    wanted: dict[str, Any] = {
        "steps": list(plan.steps),
        "parameters": dict(plan.parameters),
        "go_on": plan.go_on,
        "labels": {case.id: project.label_record(case)["sha256"] for case in labelled},
        "scans": {case.id: case.fingerprint for case in project.state.cases if case.role is not Role.EXCLUDED},
        "references": {case: files.sha256(file) for case, file in truth.items()},
    }
    if path.exists() and (found := files.read_json(path)) != wanted:
        differ = " and ".join(key for key in wanted if found.get(key) != wanted[key])
        hint = " (it was made with --from-scratch)" if wanted["go_on"] and found.get("go_on") is False else ""
        raise ProjectError(f"{path.parent} holds a simulation with other {differ}{hint}. Give another folder.")
    files.write_json(path, wanted)


def _train(project: Project, plan: Plan, observer: Observer, earlier: str | None) -> None:
    """One training in a worker of its own, waited for. Raises ProjectError when it does not finish."""
    going_on = {"continue_from": earlier} if earlier is not None else {}
    job = request_training(project, {**plan.parameters, **going_on})
    files.write_json(job.path / "job.json", {**job.spec(), "threads": usable_cores()})
    start(job)
    try:
        while (seen := observe(job)).state.active:
            stop_if_asked(observer)
            stage = f"{project.folder.name}: {seen.stage or 'waiting'}"
            observer.event("progress", stage=stage, done=0, of=1, fraction=seen.fraction)
            time.sleep(_TICK_S)
    except BaseException:  # nobody else knows of this training
        if not kill(job):
            with suppress(JobError):
                cancel(job)
        raise
    if seen.state is not State.FINISHED:
        raise ProjectError(f"the training of {project.folder} {seen.state}: {seen.message}")
    project.refresh()


def _copy(project: Project, folder: Path) -> Project:
    """The project without its old jobs, with the results of the current one; images stay where they are.

    Raises ProjectError where a training of an earlier simulation is under way in the folder.
    """
    if (other := running_training(folder / "jobs")) is not None:
        stop = shlex.join(["semisamo1", "cancel", str(folder)])
        raise ProjectError(f"{other.id} is under way in {folder}. Wait for it, or stop it: {stop}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("labels", "images"):
        if (project.folder / name).is_dir():
            shutil.copytree(project.folder / name, folder / name)
    current = project.refresh().current_training
    if current is not None:
        job = JobFolder(project.jobs / current)
        shutil.copytree(job.path, folder / "jobs" / current)
    shutil.copyfile(project.file, folder / "project.json")
    copy, places = Project(folder), {}
    for case in project.state.cases:
        with suppress(ProjectError):  # whoever needs it says so
            places[case.id] = project.image_path(case)
    copy.relink(places)
    return copy
