"""The training job: inputs in, a set of predictions with uncertainty and scores out, round by round."""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from importlib import metadata
from typing import Any

import monai
import numpy as np
import torch

from .. import __version__, files
from ..engine.cases import CaseResult, EngineCase, LabelledCase
from ..engine.config import BEFORE, TrainingConfig, make_config
from ..engine.data.store import Store
from ..engine.devices import make_fabric, require_device
from ..engine.memory import usable_memory
from ..engine.observer import stop_if_asked
from ..engine.planning import Plan, plan_to_json, taken_over
from ..engine.propagation.registration import FINEST_BELOW
from ..engine.ranks import Ranks, threads_each
from ..engine.round_training import EARLIER
from ..engine.rounds import run
from ..engine.sampling import require_shares
from ..engine.surroundings import FILE, margin_of, template_shows_all
from ..image_io import write_volume
from ..job.folder import JobFolder, usable_cores
from ..project import Project, Review
from ..project.history import decisions
from ..project.label_writer import write_segmentation
from ..project.results import IN_FORCE, is_as_made, prediction_seen, values_of_training
from ..project.reviews import finish_training
from .compare import compare
from .curves import WithCurves
from .inputs import Inputs, read_inputs
from .report import write_report
from .reporter import Reporter

#: Working files of a training: bytes per voxel of the training grid; per voxel, class and round, for each of two maps.
_BYTES_PER_VOXEL, _BYTES_PER_PROBABILITY = 20, 2

#: Bytes of a link to a neighbour: displacement, trust and fit at a node.
_BYTES_PER_LINK = 10


#: Parameters of a training job that are not the engine's.
_NOT_OF_THE_ENGINE = ("keep_rounds", "continue_from", "if_possible")

#: Settings that decide the shape of the network, what it sees and what its optimizer remembers: a training goes on from
#: one that has the same.
_SHAPE = ("learner", "specialist", "optimizer", "filters", "training_voxels", "patch_voxels", "patch", "normalise")


class ResumeError(RuntimeError):
    """A training cannot go on here as it began."""


def train(job: JobFolder, reporter: Reporter) -> None:
    """Run or resume a training job."""
    spec = job.spec()
    config = config_of(job)
    versions = _prepare_torch(spec, config, reporter.together)
    ranks = Ranks(make_fabric(config.device, "32-true", reporter.together))
    reporter.handshake(library=__version__, device=config.device, processes=ranks.count, **versions)
    if ranks.first:
        _sweep(job)
    inputs = read_inputs(job)
    if ranks.first:
        _same_versions(job, versions, config)
        files.write_json(job.work / "config.json", config.model_dump(mode="json"))
        inputs = _settle_skipped(job, inputs, reporter)
        _require_disk(job, inputs, config)
        _begin_with(job, inputs, config, ranks.count, reporter)
    ranks.wait()
    if not ranks.first:
        inputs = _settle_skipped(job, inputs, reporter)
    _segment(job, inputs, config, reporter, ranks)
    if ranks.first:
        _finish(job, inputs, reporter)


def _segment(job: JobFolder, inputs: Inputs, config: TrainingConfig, reporter: Reporter, ranks: Ranks) -> None:
    """Run the engine; results are written by the first process alone."""
    keep_rounds = bool(job.spec()["parameters"].get("keep_rounds"))
    writer = ResultWriter(job, inputs, keep_rounds) if ranks.first else None
    complete = completed_round(job)
    store = Store(job.work)
    to_look_again = config.rounds > 0 and len(inputs.labelled) > 1 and not store.has("labelled.json")
    if ranks.as_first(complete >= config.rounds and not to_look_again and store.has("library.json")):
        return  # a worker was killed after all that
    features = job.project / "cache" / "features"
    with WithCurves(reporter, job.path / "curves") if ranks.first else nullcontext(reporter) as seen:
        for result in run(
            inputs.cases,
            inputs.labelled,
            inputs.class_map.classes,
            config,
            store,
            seen,
            complete,
            features,
            together=reporter.together,
        ):
            assert writer is not None, "results come in the first process alone"
            writer.add(result)


def _finish(job: JobFolder, inputs: Inputs, reporter: Reporter) -> None:
    """What was learned about labelled cases, the new predictions in force, the report; working files go."""
    store = Store(job.work)
    if store.has("labelled.json"):
        rows = store.json("labelled.json")
        values = [str(value) for value in inputs.class_map.values[1:]]
        pairs = {case: zip(values, dice, strict=True) for case, dice in rows.items()}
        named = {case: {value: one for value, one in mine if one is not None} for case, mine in pairs.items()}
        files.write_json(job.results / "labelled.json", named)
    if (job.project / "project.json").exists() and not store.has(IN_FORCE):  # once, also when resumed after it
        project = Project(job.project)
        rows = files.read_json(job.inputs / "cases.json")["cases"]
        rejected = {row["id"] for row in rows if row.get("review") == Review.REJECTED}
        rejected |= {case.id for case in project.state.cases if case.review == Review.REJECTED}
        files.write_json(job.results / "rejected.json", beside_what_was_rejected(job, project, rejected))
        if not finish_training(project, job.id):
            newer = project.state.current_training
            text = f"the predictions of {newer}, which is newer, go on counting; use {job.id} where its are wanted"
            reporter.event("note", text=text)
        store.save_json({}, IN_FORCE)
    write_report(job, job.path / "report.html")
    if not job.spec()["parameters"].get("keep_rounds"):
        store.keep_what_is_needed()


def beside_what_was_rejected(job: JobFolder, project: Project, rejected: Collection[str]) -> dict[str, float]:
    """Case -> mean Dice of its new prediction with the one that was rejected last, over the labels that both trainings
    know; nothing of one that is not there any more, not as it was made, or the new one itself."""
    made, found = decisions(project), {}
    new = {row["case"]: {**row, "training": job.id} for row in files.read_json(job.index)["cases"]}
    for case in sorted(new.keys() & set(rejected)):
        refused = [one.began for one in made.get(case, ()) if one.after is Review.REJECTED][-1:]
        if not refused or refused[0].is_that_of(new[case]):
            continue
        with suppress(ValueError, OSError):  # it is said by the way: nothing that is damaged there ends a training
            row = prediction_seen(project, case, refused[0])
            if row is not None and row["prediction"] is not None and row["prediction"].is_file() and is_as_made(row):
                known = values_of_training(project, row["training"]) & values_of_training(project, job.id)
                pair = {case: job.results / new[case]["prediction"]}, {case: row["prediction"]}
                found[case] = compare(*pair, distances=False, values=sorted(known))["mean_dice"]
    return found


def completed_round(job: JobFolder) -> int:
    """The last round whose results are all written; -1 before there is one."""
    return int(files.read_json(job.index)["round"]) if job.index.exists() else -1


def _begin_with(job: JobFolder, inputs: Inputs, config: TrainingConfig, processes: int, reporter: Reporter) -> None:
    """Take over plan and weights of the earlier training that this one goes on from.

    Raises:
        ResumeError: its network is another one; with the parameter `if_possible` the training begins from scratch.
    """
    start = job.inputs / "start"
    if not start.is_dir() or (job.work / "plan.json").exists():
        return
    earlier = TrainingConfig.model_validate({**BEFORE, **files.read_json(start / "config.json")})
    plan = Plan.model_validate(files.read_json(start / "plan.json"))
    pairs = {name: (getattr(earlier, name), getattr(config, name)) for name in _SHAPE}
    pairs["number of labels"] = (plan.classes - 1, inputs.class_map.classes - 1)
    pairs["what is seen"] = what_is_seen(start.joinpath(*FILE).exists(), inputs.labelled, config)
    differences = [f"{name} {was}, now {now}" for name, (was, now) in pairs.items() if was != now]
    if differences and job.spec()["parameters"].get("if_possible"):
        reporter.event("note", text=f"from scratch, not from the earlier training: {'; '.join(differences)}")
        return
    if differences:
        raise ResumeError(
            f"this training cannot go on from the earlier one: {'; '.join(differences)}. Give the same preset and "
            "parameters as then, or train from scratch."
        )
    with files.atomic_path(job.work / "weights" / EARLIER) as temporary:
        shutil.copyfile(start / "weights.pt", temporary)
    kind, number = require_device(config.device)
    memory = usable_memory(torch.device(f"{kind}:{number}" if number else kind), processes)
    files.write_json(job.work / "plan.json", plan_to_json(taken_over(plan, config, kind, memory, processes)))


def what_is_seen(was_cut: bool, labelled: Sequence[LabelledCase], config: TrainingConfig) -> tuple[str, str]:
    """Which part of scans an earlier training saw, and which one that goes on from it would; alike where they agree."""
    is_cut = margin_of(labelled, config) is not None
    was, now = ("the labels' surroundings alone" if one else "whole scans" for one in (was_cut, is_cut))
    if was_cut and not is_cut and not template_shows_all(labelled):
        now += " (another labelled scan shows what the template does not)"
    return was, now


def require_shares_of(job: JobFolder, processes: int) -> None:
    """Raise ValueError when so many processes cannot go on with a training: its plan says how many patches there are.
    Nothing is changed; others may go on with it."""
    if (path := job.work / "plan.json").exists():
        require_shares(Plan.model_validate(files.read_json(path)), processes)


def config_of(job: JobFolder) -> TrainingConfig:
    """The whole configuration of a training: as it was written down at its first start, else from job.json.

    Raises:
        pydantic.ValidationError: it names what is wrong.
    """
    path = job.work / "config.json"
    if path.exists():
        # a training that began before some parameters existed goes on without what they do
        return TrainingConfig.model_validate({**BEFORE, **files.read_json(path)})
    return make_config(**{k: v for k, v in job.spec()["parameters"].items() if k not in _NOT_OF_THE_ENGINE})


class ResultWriter:
    """Writes results/<round>/<case>/ and, once a round is complete, switches the whole set in index.json."""

    def __init__(self, job: JobFolder, inputs: Inputs, keep_rounds: bool) -> None:
        self.job = job
        self.inputs = inputs
        self.keep_rounds = keep_rounds
        self._rows: list[dict[str, Any]] = []
        self.complete = completed_round(job)
        self._remove_superseded()

    def add(self, result: CaseResult) -> None:
        """Write one case; the last of a round switches the set."""
        if result.round <= self.complete:
            return  # a resumed run: this round is on disk
        folder = self.job.results / str(result.round) / result.case_id
        prediction = self.inputs.class_map.to_values(result.prediction)
        write_segmentation(folder / "prediction.seg.nrrd", prediction, self.inputs.table, Review.NOT_SEEN)
        write_volume(folder / "uncertainty.nrrd", result.uncertainty)
        scores = self._named(result.scores)
        files.write_json(folder / "scores.json", scores)
        relative = f"{result.round}/{result.case_id}"
        self._rows.append(
            {
                "case": result.case_id,
                "round": result.round,
                "scores": scores,
                "prediction": f"{relative}/prediction.seg.nrrd",
                "uncertainty": f"{relative}/uncertainty.nrrd",
                "sha256": files.sha256(folder / "prediction.seg.nrrd"),
            }
        )
        if len(self._rows) == len(self.inputs.cases):
            self._switch(result.round)

    def _named(self, scores: dict[str, Any]) -> dict[str, Any]:
        """Scores of classes under their label values."""
        values = self.inputs.class_map.values
        by_value = {str(values[int(index)]): row for index, row in scores["classes"].items()}
        return {**{key: value for key, value in scores.items() if key != "classes"}, "labels": by_value}

    def _switch(self, number: int) -> None:
        files.write_json(self.job.index, {"round": number, "cases": self._rows, "skipped": self.inputs.skipped})
        self._rows, self.complete = [], number
        self._remove_superseded()

    def _remove_superseded(self) -> None:
        """Earlier rounds keep their scores only; also those that a killed run had no time to remove."""
        if self.keep_rounds:
            return
        for earlier in range(self.complete):
            for path in (self.job.results / str(earlier)).glob("*/*.nrrd"):
                path.unlink()


def _sweep(job: JobFolder) -> None:
    """Remove what a killed worker left half-written; nobody else writes here while we hold the trainer's lock."""
    for folder in (job.work, job.results):
        for path in folder.rglob(".writing-*"):
            path.unlink(missing_ok=True)


def _settle_skipped(job: JobFolder, inputs: Inputs, reporter: Reporter) -> Inputs:
    """Cases that could not be read when the training began stay out for all of it, also when it is resumed."""
    listed: list[dict[str, str]] = list(inputs.skipped)
    usable: list[EngineCase] = []
    path = job.work / "skipped.json"
    if path.exists():
        listed = files.read_json(path)
        names = {row["name"] for row in listed}
        if gone := {row["name"] for row in inputs.skipped} - names:
            raise ResumeError(
                f"images of {sorted(gone)} are missing or changed since this training began; bring them back"
            )
        usable = [case for case in inputs.cases if case.id not in names]
    else:
        for position, case in enumerate(inputs.cases):
            stop_if_asked(reporter)
            reporter.event("progress", stage="checking scans", done=position, of=len(inputs.cases), fraction=0.0)
            reason = _unreadable(case)
            if reason is None:
                usable.append(case)
            else:
                listed.append({"name": case.id, "reason": reason})
        files.write_json(path, listed)
    for row in listed:
        reporter.event("skipped", **row)
    if not usable:
        raise ValueError(f"none of the scans can be read: {listed[:3]}")
    return Inputs(inputs.table, inputs.class_map, inputs.labelled, usable, listed)


def _unreadable(case: EngineCase) -> str | None:
    try:
        case.load()
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _prepare_torch(spec: dict[str, Any], config: TrainingConfig, together: bool) -> dict[str, str]:
    """Determinism, and the threads of one process, as job.json fixes them; returns the versions in use. Processes that
    share a training share the threads that their computer has now."""
    threads = threads_each(usable_cores(), config.threads) if together else config.threads or int(spec["threads"])
    torch.set_num_threads(threads)
    if spec["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on a GPU
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "numpy": np.__version__,
        "scipy": metadata.version("scipy"),
        "SimpleITK": metadata.version("SimpleITK"),
        "lightning-fabric": metadata.version("lightning-fabric"),
        "semisamo1": __version__,
    }


def _same_versions(job: JobFolder, versions: dict[str, str], config: TrainingConfig) -> None:
    """A resumed training reaches the same weights only with the versions it began with."""
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    now = {**versions, "device": device}
    path = job.work / "environment.json"
    if not path.exists():
        files.write_json(path, now)
        return
    began = files.read_json(path)
    if differences := [
        f"{key}: began with {began.get(key, 'nothing')}, now {now[key]}" for key in now if began.get(key) != now[key]
    ]:
        raise ResumeError(
            "this training was begun in another environment (" + "; ".join(differences) + "). "
            "Resume it there, or start a new training."
        )


def _require_disk(job: JobFolder, inputs: Inputs, config: TrainingConfig) -> None:
    """Compare the need of disk with the free space before anything is written."""
    classes = inputs.class_map.classes
    need = 200 << 20
    for case in inputs.cases:
        voxels = min(case.geometry.voxels, 2 * config.training_voxels)
        need += voxels * (_BYTES_PER_VOXEL + _BYTES_PER_PROBABILITY * classes * 2 * (config.rounds + 1))
        need += case.geometry.voxels * 2
        linked_on = 1 if voxels < FINEST_BELOW else 1 / 8  # links of larger scans lie on every second voxel
        need += int(voxels * _BYTES_PER_LINK * config.neighbours * linked_on)
    need -= sum(path.stat().st_size for path in job.path.rglob("*") if path.is_file())  # a resumed run has them already
    free = files.free_bytes(job.path)
    if free < need:
        raise OSError(errno.ENOSPC, f"the training needs about {need >> 20} MiB, the disk has {free >> 20} MiB free")
