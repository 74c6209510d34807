"""What a front end works on: one open project and its jobs, looked at again and again without waiting.

No window is known here: the panel shows what the session says, another front end could as well.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..job import JobError, JobFolder, JobKind, Observed, State, cancel, kill, observe, resume, start
from ..job.tail import JobTail
from ..job.watch import all_jobs
from .advising import FEWEST as FEWEST_SCANS
from .advising import read_advice, request_advice
from .advisor import Ranked
from .cases import Case, Role
from .drafts import painted_in_drafts
from .export import request_bundle, request_export, request_predictions, request_report
from .label_table import LabelTable
from .queue import Advice, Score, Waiting, advice, queue, score
from .results import (
    PastTraining,
    Quality,
    goes_on_predicting,
    left_out,
    past_trainings,
    predictions,
    quality,
    read_once,
    values_of_training,
)
from .reviews import use_training
from .store import Project, ProjectError
from .training import reasons_against_training, request_training

#: Kind of a job -> what it is called in a sentence.
_WHAT = {
    "train": "The training",
    "import": "Adding scans",
    "advise": "Looking for a template",
    "export": "The export",
    "predict": "Segmenting further scans",
    "report": "The report",
    "bundle": "Writing the model",
}

#: Jobs that write something for people outside of the project; one at a time.
_OUTPUTS = (JobKind.EXPORT, JobKind.PREDICT, JobKind.REPORT, JobKind.BUNDLE)

#: How long a change waits for somebody else's: a window would be frozen meanwhile.
PATIENCE_S = 1.0

#: Seconds after which it is looked again why no training can be started: scans may have come back.
_REASONS_HOLD_S = 5.0

#: Events and lines that are kept for somebody who takes them late.
MOST_KEPT = 20_000


@dataclass(frozen=True)
class CaseRow:
    """A line of the table of cases."""

    case: str
    name: str
    size: str
    spacing: str
    role: str
    state: str


@dataclass
class Watched:
    """A job that is looked at: its last state, its new events and log lines."""

    job: JobFolder
    tail: JobTail
    seen: Observed
    events: list[dict[str, Any]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.job.id.partition("-")[2]

    def look(self) -> None:
        """Observe the job and read a little of what it has newly written."""
        self.seen = observe(self.job)
        events, log = self.tail.poll()
        self.events = [*self.events, *events][-MOST_KEPT:]
        self.log = [*self.log, *log][-MOST_KEPT:]

    def take(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Events and log lines that were not taken yet."""
        found = self.events, self.log
        self.events, self.log = [], []
        return found


@dataclass
class Session:
    """An open project.

    Attributes:
        python: the worker's Python; None: this one.
        environment: variables for the worker; None: those of this process.
        unreadable: jobs whose files are damaged or cannot be read, and why: they are not watched.
    """

    python: Path | None = None
    environment: Mapping[str, str] | None = None
    project: Project | None = None
    import_job: Watched | None = None
    training: Watched | None = None
    advice_job: Watched | None = None
    output_job: Watched | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    _stamp: tuple[int, int] | None = None
    _jobs_stamp: int | None = None
    _reasons: list[str] | None = None
    _reasons_at: float = 0.0
    _ranking: list[Ranked] = field(default_factory=list)
    _results_stamp: tuple[Any, ...] | None = None
    _standing: tuple[Score | None, Advice | None] | None = None
    _waiting: tuple[tuple[Any, ...], list[Waiting]] | None = None
    _predicted: dict[str, dict[str, Any]] = field(default_factory=dict)
    _quality: Quality = field(default_factory=lambda: Quality({}, 0.0, 0))

    # ------------------------------------------------------------------ open and close

    def open(self, folder: Path) -> Project:
        """Open a project, or make one in a folder that is empty or not there. Raises ProjectError."""
        folder = Path(folder)
        if (folder / "project.json").exists():
            project = Project(folder, PATIENCE_S)
        elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise ProjectError(f"{folder} holds other files. Choose an empty folder for the project, or a project.")
        else:
            Project.create(folder)
            project = Project(folder, PATIENCE_S)
        self.close()
        self.project = project
        self._stamp = self._file_stamp()
        self._find_jobs()
        return project

    def close(self) -> None:
        self.project = self.import_job = self.training = self.advice_job = None
        self.output_job = self._results_stamp = None
        self._ranking, self.unreadable = [], {}
        self._stamp = self._jobs_stamp = self._reasons = self._waiting = None

    # ------------------------------------------------------------------ look again

    def poll(self) -> bool:
        """Look at the project file and the jobs; True when the project changed. Reads little, never waits."""
        if self.project is None:
            return False
        stamp = self._file_stamp()
        changed = stamp != self._stamp
        if changed:
            self._reasons = self._standing = None
            self.project.refresh()
            self._stamp = stamp
        self._find_jobs()
        for one in (self.import_job, self.training, self.advice_job, self.output_job):
            if one is not None:
                was = one.seen.state
                one.look()
                if one.seen.state is not was:
                    self._reasons = None
                    self._ended(one)
        return changed

    def _ended(self, job: Watched) -> None:
        """What follows by itself when a job has ended: after adding scans an advice, after that its ranking."""
        if job is self.import_job and not job.seen.state.active and not self.reasons_against_advice():
            self.start_advice()
        if job is self.advice_job and job.seen.state is State.FINISHED:
            self._ranking = read_advice(self._opened)

    def _find_jobs(self) -> None:
        """Watch the newest training, import and advice, and an export under way, whoever started them: this panel
        before Slicer was closed, another one, a shell."""
        jobs = self._opened.jobs
        try:
            stamp = jobs.stat().st_mtime_ns
        except OSError:
            return
        if stamp == self._jobs_stamp and not self.unreadable:
            return
        self._jobs_stamp = stamp
        for job in all_jobs(jobs):
            try:
                self._take_in(job)
                self.unreadable.pop(job.id, None)
            except (OSError, ValueError) as error:  # damaged, or just being written: it is looked at again
                self.unreadable[job.id] = str(error)

    def _take_in(self, job: JobFolder) -> None:
        kind = job.id.partition("-")[2]
        if kind == JobKind.TRAIN and (self.training is None or self.training.job.id < job.id):
            self.training, self._reasons = self._watch(job), None
        elif kind == JobKind.IMPORT and (self.import_job is None or self.import_job.job.id < job.id):
            self.import_job = self._watch(job)
        elif kind == JobKind.ADVISE and (self.advice_job is None or self.advice_job.job.id < job.id):
            self.advice_job = self._watch(job)
            self._ranking = read_advice(self._opened)
        elif kind in _OUTPUTS and (self.output_job is None or self.output_job.job.id < job.id):
            found = self._watch(job)
            silent_elsewhere = found.seen.state is State.NOT_RESPONDING and not found.seen.here
            if found.seen.state.active and not silent_elsewhere:  # what has ended was told of when it did
                self.output_job = found

    def _file_stamp(self) -> tuple[int, int] | None:
        try:
            found = self._opened.file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size

    @property
    def _opened(self) -> Project:
        if self.project is None:
            raise ProjectError("no project is open")
        return self.project

    def _watch(self, job: JobFolder) -> Watched:
        return Watched(job, JobTail(job), observe(job))

    # ------------------------------------------------------------------ scans

    def rows(self) -> list[CaseRow]:
        """All cases, as a person reads them."""
        return [_row(case) for case in self.project.state.cases] if self.project is not None else []

    def reasons_against_removing(self, value: int) -> list[str]:
        """Why a label cannot be taken out of the project: somebody painted it, or a training's predictions name it."""
        project = self._opened
        name = project.refresh().labels.name_of(value)
        if value in project.painted_labels():
            return [f"{name} is painted in saved labels."]
        if value in painted_in_drafts(project):
            return [f"{name} is painted in a draft."]
        if self.busy or value in values_of_training(project):
            return [f"{name} is among the labels of a training."]
        return []

    def remove_label(self, value: int) -> None:
        """Take a label out of the project; its value is not given again. Raises ProjectError saying what stands against
        it."""
        if reasons := self.reasons_against_removing(value):
            raise ProjectError(" ".join(reasons))
        self._opened.retire_labels([value])
        if value in self._opened.state.labels.values:  # somebody saved it this very moment
            raise ProjectError(" ".join(self.reasons_against_removing(value)))

    def reasons_against_adding(self) -> list[str]:
        if self.project is None:
            return ["Open or make a project first."]
        if self.import_job is not None and self.import_job.seen.state.active:
            return ["Scans are being checked; wait, or stop it."]
        return []

    def add_folder(self, folder: Path) -> Watched:
        """Start the job that checks the scans of a folder and adds those that can be used."""
        if not folder.is_dir():
            raise ProjectError(f"{folder} is not a folder. Give the folder that holds the scans.")
        return self._start_import({"images": str(folder.resolve())})

    def add_files(self, paths: list[Path]) -> Watched:
        """Start the job that takes single files into the project's own images."""
        return self._start_import({"files": [str(path) for path in paths]})

    def _start_import(self, parameters: dict[str, Any]) -> Watched:
        job = JobFolder.create(self._opened.jobs, JobKind.IMPORT, parameters, [])
        start(job, self.python, True, self.environment)
        self.import_job = self._watch(job)
        return self.import_job

    def stop_import(self) -> None:
        """Stop adding scans; those that are added stay."""
        if self.import_job is not None and self.import_job.seen.state.active:
            self.import_job.seen = cancel(self.import_job.job)

    # ------------------------------------------------------------------ which scan to label

    def reasons_against_advice(self) -> list[str]:
        """Why no template can be recommended, or need not be."""
        if self.project is None:
            return ["Open or make a project first."]
        if self.advice_job is not None and self.advice_job.seen.state.active:
            return ["The scans are being looked at."]
        if self.project.state.with_role(Role.TEMPLATE):
            return ["There is a template."]
        if len(self.project.state.cases) < FEWEST_SCANS:
            return [f"At least {FEWEST_SCANS} scans are needed to recommend one."]
        return []

    def start_advice(self) -> Watched:
        """Start the job that recommends a template. Raises ProjectError or JobError."""
        job = request_advice(self._opened)
        start(job, self.python, True, self.environment)
        self.advice_job = self._watch(job)
        return self.advice_job

    def ranking(self) -> list[Ranked]:
        """The project's scans as templates, the recommended one first, without those that were left out since; empty
        before there is an advice."""
        if not self._ranking or self.project is None:
            return []
        cases = self.project.state.cases
        left_out = {case.id for case in cases if case.role is Role.EXCLUDED}
        return [one for one in self._ranking if one.case not in left_out]

    # ------------------------------------------------------------------ training

    def reasons_against_training(self) -> list[str]:
        """Why Train cannot be pressed; looked up anew after a change, and every few seconds."""
        if self.project is None:
            return ["Open or make a project first."]
        if self._reasons is None or time.monotonic() - self._reasons_at > _REASONS_HOLD_S:
            self._reasons_at = time.monotonic()
            self._reasons = [_sentence(reason) for reason in reasons_against_training(self.project, thorough=False)]
        return self._reasons

    def train(self, parameters: dict[str, Any]) -> Watched:
        """Start a training in the background. Raises ProjectError or JobError."""
        job = request_training(self._opened, parameters)
        start(job, self.python, True, self.environment)
        self._reasons = None
        self.training = self._watch(job)
        return self.training

    def stop_training(self) -> None:
        """Ask the training to stop at the next safe point; it keeps what it has."""
        if self.training is not None and self.training.seen.state.active:
            self.training.seen = cancel(self.training.job)

    def end_training(self) -> None:
        """End a training that does not answer, with all its processes. It can be resumed."""
        if self.training is not None and self.training.seen.state.active:
            cancel(self.training.job)
            kill(self.training.job)
            self.training.seen = observe(self.training.job)

    def reasons_against_resuming(self) -> list[str]:
        if self.training is None:
            return ["There is no training yet."]
        state = self.training.seen.state
        if state is State.FINISHED:
            return ["The training is finished."]
        if state is State.NOT_RESPONDING and not self.training.seen.here:
            return []  # it may be taken over
        if state.active:
            return ["The training is under way."]
        return []

    def resume_training(self, elsewhere: bool = False) -> Watched:
        """Go on with a training that was stopped or interrupted; with `elsewhere`, one of another computer too.

        Raises RanElsewhere or JobError.
        """
        if self.training is None:
            raise JobError("there is no training to resume")
        resume(self.training.job, self.python, True, self.environment, elsewhere)
        self.training.seen = observe(self.training.job)
        self._reasons = None
        return self.training

    @property
    def busy(self) -> bool:
        """Whether a training of this project is under way."""
        return self.training is not None and self.training.seen.state.active

    # ------------------------------------------------------------------ what leaves the project

    def reasons_against_output(self) -> list[str]:
        """Why nothing can be exported, nor the training applied."""
        if self.project is None:
            return ["Open or make a project first."]
        if self.output_job is not None and self.output_job.seen.state.active:
            return [f"{_WHAT[self.output_job.kind]} is under way; wait, or stop it."]
        return []

    def reasons_against_report(self) -> list[str]:
        """Why no report of the current training can be written."""
        if self.current_training is None or not self.predicted():
            return ["There are no predictions yet. Train first."]
        if self._settings() is None:
            return ["Of this training the predictions alone are here, not its network. Train first."]
        return []

    def reasons_against_applying(self) -> list[str]:
        """Why the current training cannot be applied to further scans."""
        if reasons := self.reasons_against_report():
            return reasons
        rounds = (self._settings() or {}).get("rounds", 0)
        weights = JobFolder(self._opened.jobs / str(self.current_training)).work / "weights" / f"round-{rounds}.pt"
        return ["This training was not finished; resume it first."] if rounds and not weights.is_file() else []

    def reasons_against_bundle(self) -> list[str]:
        """Why the trained networks cannot be written as a file."""
        if reasons := self.reasons_against_applying():
            return reasons
        return [] if (self._settings() or {}).get("rounds") else ["This training has no network (0 rounds)."]

    def _settings(self) -> dict[str, Any] | None:
        """Every parameter of the current training; None where its working files are not here."""
        path = JobFolder(self._opened.jobs / str(self.current_training)).work / "config.json"
        found: dict[str, Any] | None = read_once(path)
        return found

    def export(self, folder: Path, kind: str, dicom: Path | None = None) -> Watched:
        """Start the job that writes all segmentations. Raises ProjectError or JobError."""
        return self._start_output(request_export(self._opened, folder, kind, dicom))

    def apply(self, images: Path, folder: Path, kind: str) -> Watched:
        """Start the job that segments further scans with the current training. Raises ProjectError or JobError."""
        return self._start_output(request_predictions(self._opened, images, folder, kind))

    def write_report(self) -> Watched:
        """Start the job that writes the current training's report anew. Raises ProjectError or JobError."""
        return self._start_output(request_report(self._opened))

    def write_bundle(self, path: Path) -> Watched:
        """Start the job that writes the trained networks as one .zip file. Raises ProjectError or JobError."""
        return self._start_output(request_bundle(self._opened, path))

    def _start_output(self, job: JobFolder) -> Watched:
        start(job, self.python, True, self.environment)
        self.output_job = self._watch(job)
        return self.output_job

    def stop_output(self) -> None:
        """Stop it; what is written stays."""
        if self.output_job is not None and self.output_job.seen.state.active:
            self.output_job.seen = cancel(self.output_job.job)

    def output_in_words(self) -> str:
        """Where the last output that this session saw was written to; empty before one has finished."""
        written = self.output_written()
        return f"Written to {written}" if written is not None else ""

    def output_written(self) -> Path | None:
        """The folder or file that the last finished export, application, report or bundle of this session wrote."""
        watched = self.output_job
        if watched is None or watched.seen.state is not State.FINISHED:
            return None
        return Path(watched.job.spec()["parameters"]["output"])

    # ------------------------------------------------------------------ results

    @property
    def current_training(self) -> str | None:
        """The training whose predictions count."""
        return self.project.state.current_training if self.project is not None else None

    @property
    def made(self) -> tuple[str, int, int] | None:
        """Changes when other predictions count: another training's, or the next round's of one that was resumed."""
        current = self.current_training
        return (current, *_changed_at(JobFolder(self._opened.jobs / current).index)) if current is not None else None

    @property
    def predicting(self) -> str | None:
        """The training whose predictions count, while it goes on and replaces them with each round."""
        watched, current = self.training, self.current_training
        if watched is None or watched.job.id != current:
            return None
        return current if goes_on_predicting(watched.job, watched.seen.state) else None

    def past_trainings(self) -> list[PastTraining]:
        """The trainings whose predictions could count, oldest first."""
        return past_trainings(self.project) if self.project is not None else []

    def use_training(self, name: str) -> None:
        """Let the predictions of another training count. Raises ProjectError."""
        use_training(self._opened, name)

    def predicted(self) -> dict[str, dict[str, Any]]:
        """Case -> its row in the current results, as `results.predictions` says; read once for each index."""
        self._look_at_results()
        return self._predicted

    def left_out(self) -> dict[str, str]:
        """Scan -> why the current training left it out."""
        return left_out(self.project) if self.project is not None else {}

    def rated(self) -> Quality:
        """Likely quality of the current predictions; computed anew after a training and after a decision."""
        self._look_at_results()
        return self._quality

    def waiting(self) -> list[Waiting]:
        """Predicted cases that nobody decided about, in the order in which they are offered."""
        rated = self.rated()
        if not rated.estimates:
            return []
        known = (self._opened.state, self._results_stamp)
        if self._waiting is None or self._waiting[0] != known:
            self._waiting = known, queue(self._opened, rated)
        return self._waiting[1]

    def standing(self) -> tuple[Score | None, Advice | None]:
        """How good the predictions are, from the cases drawn at random, and what to do next; nothing before any."""
        rated = self.rated()
        if not rated.estimates:
            return None, None
        if self._standing is None:
            self._standing = score(self._opened, rated), advice(self._opened, rated)
        return self._standing

    def _look_at_results(self) -> None:
        current = self.project.state.current_training if self.project is not None else None
        if current is None:
            self._results_stamp, self._predicted, self._quality = None, {}, Quality({}, 0.0, 0)
            return
        written = (current, _changed_at(JobFolder(self._opened.jobs / current).index))
        reviewed = _changed_at(self._opened.reviews)
        if (written, reviewed) == self._results_stamp:
            return
        if self._results_stamp is None or written != self._results_stamp[0]:
            self._predicted = predictions(self._opened)
        self._quality = quality(self._opened, self._predicted)
        self._results_stamp, self._standing = (written, reviewed), None


def _changed_at(path: Path) -> tuple[int, int]:
    """Changes when a file is written; a file that is not there has a stamp of its own."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def template_gaps(counts: Mapping[int, int], table: LabelTable, overlaps: list[tuple[str, str, int]]) -> list[str]:
    """What a template still lacks, in words: an empty table, unpainted labels, voxels that two labels claim.

    Args:
        counts: label value -> painted voxels.
        table: the labels that the project knows.
        overlaps: pairs of names with shared voxels.
    """
    if not table.labels:
        return ["There is no label. Add one for each structure."]
    gaps = [f"{label.name} is not painted." for label in table if not counts.get(label.value)]
    return gaps + in_sentences(overlaps)


def in_sentences(overlaps: Sequence[tuple[str, str, int]]) -> list[str]:
    """Pairs of labels' names with the voxels that both claim."""
    return [f"{a} and {b} share {n} voxels; a voxel has one label." for a, b, n in overlaps]


def training_parameters(
    preset: str, device: str, learner: str, generalist: str, changes: Mapping[str, int | None]
) -> dict[str, Any]:
    """The parameters of a training; what is None is left to the preset."""
    parameters: dict[str, Any] = {"preset": preset, "device": device, "learner": learner, "generalist": generalist}
    return parameters | {key: value for key, value in changes.items() if value is not None}


def ended_in_words(watched: Watched) -> str:
    """How a job ended, for a banner; a person's stop is no error."""
    state, what = watched.seen.state, _WHAT.get(watched.kind, "The job")
    if state is State.FINISHED:
        return f"{what} is finished."
    if watched.seen.stopped:
        return f"{what} was stopped. What was done is kept."
    if state is State.INTERRUPTED:
        then = "It can be resumed." if watched.kind == JobKind.TRAIN else "Start it again."
        return f"{what} was interrupted (the computer went off, or the process was ended). {then}"
    return f"{what} failed: {watched.seen.message}"


def _row(case: Case) -> CaseRow:
    z, y, x = case.geometry.shape
    spacing = " × ".join(f"{value:.3g}" for value in case.geometry.spacing[::-1])
    return CaseRow(case.id, case.name, f"{x} × {y} × {z}", spacing, str(case.role), case.review.replace("_", " "))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
