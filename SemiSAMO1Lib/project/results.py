"""The results of a project's trainings as their readers need them: rows with whole paths, and likely quality."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..job.folder import JobFolder
from ..job.watch import State, is_under_way, observe, trainings
from ..quality import ENOUGH, HIGH, MEDIUM, QualityModel, Reviewed, level, refitted, shipped
from .began import Began
from .cases import Review
from .history import Decision, decisions
from .label_table import LabelTable
from .store import Project, ProjectError

#: Below a training's working files: its predictions came into force, once.
IN_FORCE = "in-force.json"


def current_training(project: Project) -> JobFolder:
    """The training whose predictions count. Raises ProjectError when none is finished."""
    name = project.refresh().current_training
    if name is None or not (project.jobs / name / "job.json").exists():
        raise ProjectError("this project has no finished training. Train first.")
    return JobFolder(project.jobs / name)


def prediction_files(project: Project) -> dict[str, Path]:
    """Case id -> its prediction by the current training. Raises ProjectError when none is finished."""
    training = current_training(project).id
    rows = predictions(project, training)
    return {case: row["prediction"] for case, row in rows.items() if row["prediction"] is not None}


def predictions(project: Project, training: str | None = None) -> dict[str, dict[str, Any]]:
    """Case id -> its row in the results of a training, the current one unless said; empty before the first one.

    Rows have the files as whole paths (None where an older program wrote none) and the training beside the scores;
    they are read once, so do not change them. Raises ValueError for a damaged index.
    """
    training = training or project.refresh().current_training
    if training is None:
        return {}
    known = {case.id for case in project.state.cases}
    rows = read_once(project.jobs / training / "results" / "index.json", _rows) or {}
    return {case: row for case, row in rows.items() if case in known}


def prediction_seen(project: Project, case: str, began: Began) -> dict[str, Any] | None:
    """The row of the prediction that a person's painting began from; None where it began from none, or where the
    training has made another one since."""
    row = predictions(project, began.training).get(case) if began.training else None
    return row if began.is_that_of(row) else None


def _rows(index: Path) -> dict[str, dict[str, Any]]:
    results = index.parent
    JobFolder(results.parent).spec()  # refuses that of a newer program
    found = {}
    for row in files.read_json(index)["cases"]:
        places = {key: results / row[key] if row.get(key) else None for key in ("prediction", "uncertainty")}
        found[row["case"]] = {**row, **places, "training": results.parent.name}
    return found


def is_as_made(row: dict[str, Any]) -> bool:
    """Whether the file of a prediction still is what the training wrote: the machine's word is not mended in place.

    True where an older program did not write down what it made, and where the file is not there.
    """
    path, made = row["prediction"], row.get("sha256")
    return made is None or path is None or not path.is_file() or files.sha256(path) == made


def left_out(project: Project, training: str | None = None) -> dict[str, str]:
    """Scan -> why a training, the current one unless said, could not read it and left it out."""
    training = training or project.refresh().current_training
    if training is None:
        return {}
    index = read_once(project.jobs / training / "results" / "index.json") or {}
    return {row["name"]: row["reason"] for row in index.get("skipped", ())}


@dataclass(frozen=True)
class PastTraining:
    """A training that made predictions, finished or stopped: what `reviews.use_training` takes.

    Attributes:
        name: of its job, such as 0002-train.
        begun: local date and time, to the minute.
        round: the last one that it completed; 0 is before any network.
    """

    name: str
    begun: str
    round: int


def past_trainings(project: Project) -> list[PastTraining]:
    """All trainings of a project that have predictions, oldest first. One that is under way replaces its own with each
    round: it is none of them; nor is one whose files cannot be read."""
    found = []
    for job in trainings(project.jobs):
        with suppress(OSError, ValueError, KeyError, TypeError):
            index = read_once(job.index)
            if index is not None and not is_under_way(job):
                begun = job.spec()["created"][:16].replace("T", " ")
                found.append(PastTraining(job.id, begun, int(index["round"])))
    return found


def goes_on_predicting(job: JobFolder, state: State | None = None) -> bool:
    """Whether a training replaces its predictions with each round: one that somebody works on, until they are final
    and its report alone is left. Of one that is silent nobody knows; nothing waits for it.

    Args:
        job: the training.
        state: its state, where that was looked at already.
    """
    if (job.work / IN_FORCE).exists() or (state is None and not is_under_way(job)):
        return False
    state = state or observe(job).state
    return state.active and state is not State.NOT_RESPONDING


def values_of_training(project: Project, training: str | None = None) -> frozenset[int]:
    """The label values that a training knows, the current one unless said; none before the first one."""
    training = training or project.refresh().current_training
    if training is None:
        return frozenset()
    return frozenset(LabelTable.from_json(JobFolder(project.jobs / training).spec()["labels"]).values)


def asked_about(project: Project, case: str, training: str | None) -> frozenset[int]:
    """The labels that must be in a scan, or be said to be absent, when a person decides about a training's prediction:
    those that the training knows. Labels added later are unknown there unless they are painted. Without a prediction:
    all."""
    values = frozenset(project.refresh().labels.values)
    predicted = training is not None and case in predictions(project, training)
    return values & values_of_training(project, training) if predicted else values


def read_once(path: Path, reader: Callable[[Path], Any] = files.read_json) -> Any:
    """A file that is looked at often: one that is as it was is not read again. None where there is none. Not to be
    changed."""
    try:
        written = path.stat()
    except OSError:
        return None
    return _as_it_was(path, reader, written.st_mtime_ns, written.st_size)


@lru_cache(maxsize=64)
def _as_it_was(path: Path, reader: Callable[[Path], Any], changed_ns: int, size: int) -> Any:
    del changed_ns, size
    return reader(path)


@dataclass(frozen=True)
class Estimate:
    """How good a prediction probably is.

    Attributes:
        likely: Dice, mean over the labels that are in the table; None where nothing was found, which is the worst.
        labels: label value -> likely Dice.
        signals: label value -> the signals that it was computed from; empty for results of an older program.
    """

    likely: float | None
    labels: Mapping[int, float]
    signals: Mapping[int, Mapping[str, float | None]]

    @property
    def level(self) -> str:
        """low, medium or high."""
        return "low" if self.likely is None else level(self.likely)


@dataclass(frozen=True)
class Quality:
    """Likely quality of a training's predictions.

    Attributes:
        estimates: case id -> estimate.
        error: mean absolute error of a likely Dice.
        reviewed: cases that a person decided about and the model learned from.
    """

    estimates: Mapping[str, Estimate]
    error: float
    reviewed: int

    @property
    def checked(self) -> bool:
        """Whether enough cases of this project were reviewed for the figures to hold here."""
        return self.reviewed >= ENOUGH

    def worst_first(self) -> list[str]:
        """Cases by likely quality, the worst first, ties by id; where nothing was found comes first."""
        likely = {case: one.likely for case, one in self.estimates.items()}
        return sorted(likely, key=lambda case: (-1.0 if (value := likely[case]) is None else value, case))


def quality(project: Project, predicted: Mapping[str, dict[str, Any]]) -> Quality:
    """Estimate every predicted case, with a model that has learned from the project's own reviews."""
    lessons = [lesson for made in decisions(project).values() if made and (lesson := _lesson(made)) is not None]
    model = refitted(shipped(), lessons)
    return Quality(_ESTIMATED.of(predicted, model), model.error, len(lessons))


@dataclass(frozen=True)
class Change:
    """What a training made of a case that a person had reviewed.

    Attributes:
        case: its id.
        before: mean Dice, with the same label, of the answer of the training before that learned from it; else of the
            prediction that the person saw when it was drawn; None where neither is: an accepted prediction is its own
            label.
        now: mean Dice of the new networks' answer with the label in force, which they have learned from; of a rejected
            case, which has none, with the prediction that was rejected.
        rejected: the case was.
    """

    case: str
    before: float | None
    now: float
    rejected: bool = False

    @property
    def in_words(self) -> str:
        if self.rejected:
            return f"{self.case} Dice {self.now:.3f} with what was rejected"
        if self.before is None:
            return f"{self.case} Dice {self.now:.3f}"
        change = round(self.now, 3) - round(self.before, 3)  # of the numbers that are shown
        return f"{self.case} Dice {self.before:.3f} to {self.now:.3f} ({change:+.3f})"


def changes(project: Project, training: str | None = None) -> list[Change]:
    """The reviewed cases that a training learned from, those that changed most first, then the rejected ones that it
    predicted anew, then those without a figure of before; the current training's."""
    training = training or project.refresh().current_training
    if training is None:
        return []
    learned = _learned(project, training)
    refused = read_once(project.jobs / training / "results" / "rejected.json") or {}
    if not learned and not refused:
        return []
    history, labels = decisions(project), labels_of_training(project, training)
    names = sorted((job.name for job in project.jobs.iterdir() if job.name < training), reverse=True)
    earlier = [(labels_of_training(project, one), then) for one in names if (then := _learned(project, one))]
    found = []
    for case, now in learned.items():
        drawn = [one for one in history.get(case, []) if one.training != training and one.after != Review.ACCEPTED]
        if case in labels:  # what was seen was measured with this very label, not with one before or after it
            drawn = [one for one in drawn if one.label == labels[case]]
        seen = [one.mean_dice for one in drawn if one.dice]
        # the last training that knew this very label
        known = [then[case] for versions, then in earlier if case in then and versions.get(case) == labels.get(case)]
        before = known[0] if known else seen[-1] if seen else None
        found.append(Change(case, before, now))
    found += [Change(case, None, dice, True) for case, dice in refused.items()]
    return sorted(found, key=_most_first)


def _most_first(change: Change) -> tuple[int, float, str]:
    if change.rejected:
        return 1, change.now, change.case
    if change.before is None:
        return 2, 0.0, change.case
    return 0, -abs(change.now - change.before), change.case


def _learned(project: Project, training: str) -> dict[str, float]:
    """Case -> mean Dice of a training's answer with its label then; empty where nothing was looked at again."""
    rows = read_once(project.jobs / training / "results" / "labelled.json") or {}
    return {case: float(np.mean(list(dice.values()))) for case, dice in rows.items() if dice}


def labels_of_training(project: Project, training: str | None) -> dict[str, int]:
    """Case -> version of the label that a training learned from; none before the first training."""
    if training is None:
        return {}
    rows = (read_once(project.jobs / training / "inputs" / "cases.json") or {}).get("labelled", [])
    return {row["id"]: row["version"] for row in rows if "version" in row}


def _estimates(predicted: Mapping[str, dict[str, Any]], model: QualityModel) -> dict[str, Estimate]:
    """All cases at once: the queue waits for it."""
    signals = {}
    for case, row in predicted.items():
        labels = row["scores"].get("labels", {}).items()
        signals[case] = {int(value): one["signals"] for value, one in labels if one.get("signals")}
    likely = iter(model.likely([one for rows in signals.values() for one in rows.values()]))
    found = {}
    for case, rows in signals.items():
        dice = {value: next(likely) for value in rows}
        doubt = predicted[case]["scores"].get("label_uncertainty")
        if doubt is None:
            found[case] = Estimate(None, {}, rows)
        elif not rows:  # results of an older program: certainty alone, which ranks, is all there is
            found[case] = Estimate(1.0 - doubt, {}, {})
        else:
            found[case] = Estimate(sum(dice.values()) / len(dice), dice, rows)
    return found


class _Estimated:
    """The estimates that were made last: most decisions teach nothing, and the queue is asked for after each."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._model: QualityModel | None = None
        self._found: dict[str, Estimate] = {}

    def of(self, predicted: Mapping[str, dict[str, Any]], model: QualityModel) -> dict[str, Estimate]:
        """Those of the same rows by the same model again, else new ones."""
        rows = list(predicted.values())
        same = len(rows) == len(self._rows) and all(map(operator.is_, rows, self._rows))
        if not same or model is not self._model:
            self._rows, self._model, self._found = rows, model, _estimates(predicted, model)
        return dict(self._found)


_ESTIMATED = _Estimated()


def _lesson(made: Sequence[Decision]) -> Reviewed | None:
    """What the decisions about a case teach about the estimate: the last one that does counts; None without one."""
    return next((lesson for one in reversed(made) if (lesson := _taught_by(one)) is not None), None)


@lru_cache(maxsize=8192)
def _taught_by(decision: Decision) -> Reviewed | None:
    """What a decision teaches about the estimate; None without signals.

    An accepted prediction need not be perfect: it says that it is at least good enough, so it teaches a Dice of `HIGH`
    where less was expected, and what was expected elsewhere. A rejected one teaches at most `MEDIUM` in the same way.
    """
    rejected = decision.after == Review.REJECTED
    values = [value for value in decision.signals if rejected or value in decision.dice]
    if not values:
        return None
    signals = tuple(decision.signals[value] for value in values)
    if decision.after == Review.ACCEPTED:
        return Reviewed(signals, tuple(max(one, HIGH) for one in shipped().likely(signals)), False)
    if rejected:
        return Reviewed(signals, tuple(min(one, MEDIUM) for one in shipped().likely(signals)), False)
    return Reviewed(signals, tuple(decision.dice[value] for value in values))
