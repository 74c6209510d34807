"""A training by several processes on one machine (gloo): the same answer as by one, also when they were killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from job_helpers import events_of
from together_helpers import HAS_PROC, TINY, children, done, environment, new_project, together, training_of

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.evaluation.metrics import dice
from SemiSAMO1Lib.image_io import read_volume
from SemiSAMO1Lib.job import JobFolder, State, observe

#: Processes of the trainings that are compared.
COUNTS = (1, 2, 3)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> dict[int, JobFolder]:
    """The same training by one, two and three processes."""
    found = {}
    for count in COUNTS:
        folder = tmp_path_factory.mktemp(f"by{count}")
        project = new_project(folder)
        files.write_json(folder / "tiny.json", TINY)
        ended = done(together(count, "train", project, "--config", folder / "tiny.json", "--keep-rounds"))
        job = training_of(project)
        assert ended.returncode == 0, f"{count} processes: {ended.stdout[-2000:]}{ended.stderr[-4000:]}"
        found[count] = job
    return found


def predictions(job: JobFolder, number: int) -> dict[str, np.ndarray]:
    folders = sorted((job.results / str(number)).iterdir())
    return {folder.name: read_volume(folder / "prediction.seg.nrrd").array for folder in folders}


def as_srun(number: int, count: int) -> dict[str, str]:
    """What srun tells task `number` of `count` on one node."""
    told = {
        "JOB_ID": str(os.getpid()),
        "JOB_NAME": "study",
        "NODELIST": "127.0.0.1",
        "NNODES": 1,
        "STEP_NUM_NODES": 1,
        "NTASKS": count,
        "STEP_NUM_TASKS": count,
        "NTASKS_PER_NODE": count,
        "CPUS_PER_TASK": 1,
        "NODEID": 0,
        "PROCID": number,
        "LOCALID": number,
    }
    return {f"SLURM_{name}": str(value) for name, value in told.items()}


def test_tasks_of_srun_share_a_training_as_processes_of_torchrun_do(
    trainings: dict[int, JobFolder], tmp_path: Path
) -> None:
    """The same command and the variables of SLURM, without SLURM."""
    project = new_project(tmp_path)
    files.write_json(tmp_path / "tiny.json", {**TINY, "rounds": 1})
    command = together(1, "train", project, "--config", tmp_path / "tiny.json", "--keep-rounds")
    tasks = []
    for number in range(2):
        with open(tmp_path / f"log-{number}", "wb") as log:
            told = {**environment(), **as_srun(number, 2)}
            tasks.append(subprocess.Popen(command, env=told, stdout=log, stderr=log))
    ended = [task.wait(300) for task in tasks]
    job = training_of(project)
    assert ended == [0, 0], "".join((tmp_path / f"log-{number}").read_text()[-3000:] for number in range(2))
    assert [path.name for path in (project / "jobs").iterdir() if "train" in path.name] == [job.path.name]
    assert observe(job).state is State.FINISHED and events_of(job)[0]["processes"] == 2
    for path in sorted((trainings[2].work / "pseudo" / "1").iterdir()):
        assert path.read_bytes() == (job.work / "pseudo" / "1" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("count", COUNTS[1:])
def test_the_training_is_finished_and_says_how_many_worked_on_it(trainings: dict[int, JobFolder], count: int) -> None:
    first = events_of(trainings[count])[0]
    assert observe(trainings[count]).state is State.FINISHED and first["processes"] == count


@pytest.mark.parametrize("count", COUNTS[1:])
def test_the_first_pseudo_labels_are_the_same_bit_for_bit(trainings: dict[int, JobFolder], count: int) -> None:
    for name in ("probabilities/0", "pseudo/1"):
        for path in sorted((trainings[1].work / name).iterdir()):
            other = trainings[count].work / name / path.name
            assert path.read_bytes() == other.read_bytes(), (
                f"{name}/{path.name} differs between 1 and {count} processes"
            )


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("number", [1, 2])
def test_later_rounds_agree(trainings: dict[int, JobFolder], count: int, number: int) -> None:
    alone, shared = predictions(trainings[1], number), predictions(trainings[count], number)
    assert sorted(alone) == sorted(shared) and len(alone) == 3
    found = [dice(alone[case] == value, shared[case] == value) for case in alone for value in (1, 2, 3)]
    assert np.mean(found) >= 0.99, f"round {number}: Dice {np.mean(found):.3f} between 1 and {count} processes"


@pytest.mark.parametrize("count", COUNTS[1:])
def test_what_was_learned_of_labelled_scans_agrees(trainings: dict[int, JobFolder], count: int) -> None:
    """Who looks at them again has a share of them; one alone writes it down."""
    alone, shared = (files.read_json(trainings[n].results / "labelled.json") for n in (1, count))
    assert list(alone) == list(shared) == ["phantom_004"]
    assert list(shared["phantom_004"].values()) == pytest.approx(list(alone["phantom_004"].values()), abs=0.02)


@pytest.mark.parametrize("count", COUNTS[1:])
def test_losses_agree_for_one_global_batch(trainings: dict[int, JobFolder], count: int) -> None:
    def last(job: JobFolder) -> dict[str, float]:
        ends = [e for e in events_of(job) if e["kind"] == "losses" and e["round"] == 1]
        losses: dict[str, float] = ends[-1]["losses"]
        return losses

    assert last(trainings[count]) == pytest.approx(last(trainings[1]), rel=1e-3)


def killed_at_the_first_file_of(folder: Path, command: list[str], job: JobFolder, log: Path) -> dict[str, int]:
    """Starts processes and kills them all as soon as one writes a working file of that kind; the finished files there,
    with the times at which they were written."""
    with open(log, "wb") as stream:
        starter = subprocess.Popen(command, env=environment(), stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 120
        while not (folder.is_dir() and any(folder.iterdir())):
            assert starter.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.005)
    finally:
        for pid in [*children(starter.pid), starter.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        starter.wait(60)
    deadline = time.monotonic() + 60
    while observe(job).state is not State.INTERRUPTED:
        assert time.monotonic() < deadline, f"the job is {observe(job).state}"
        time.sleep(0.2)
    return written(folder)


def written(folder: Path) -> dict[str, int]:
    """When each finished file of a folder was written, ns."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if not path.name.startswith(".writing-")}


@pytest.mark.skipif(not HAS_PROC, reason="finds the other process by /proc, which Linux has")
def test_killed_among_cases_and_finished_by_others_the_results_are_the_same(
    trainings: dict[int, JobFolder], tmp_path: Path
) -> None:
    """Two processes die in the propagation, three others in the answers of the first round, one finishes."""
    project = new_project(tmp_path)
    files.write_json(tmp_path / "tiny.json", TINY)
    job = training_of(project)
    propagation, answers, log = job.work / "propagation", job.work / "answers" / "1", tmp_path / "log"
    train = together(2, "train", project, "--config", tmp_path / "tiny.json", "--keep-rounds")
    propagated = killed_at_the_first_file_of(propagation, train, job, log)
    assert len(propagated) < len(written(trainings[1].work / "propagation")), "killed too late: all were propagated"
    answered = killed_at_the_first_file_of(answers, together(3, "resume", project), job, log)
    learned = written(job.work / "weights")
    ended = done(together(1, "resume", project))
    assert ended.returncode == 0 and observe(job).state is State.FINISHED, ended.stderr[-4000:]
    once_more = {f"{case}.json" for case in files.read_json(job.work / "detours.json")["again"]}
    propagated = {name: when for name, when in propagated.items() if name not in once_more}
    for folder, before in ((propagation, propagated), (answers, answered), (job.work / "weights", learned)):
        after = written(folder)
        assert {name: after[name] for name in before} == before, f"what was finished in {folder.name} was done again"
    for path in sorted((trainings[1].work / "pseudo" / "1").iterdir()):
        assert path.read_bytes() == (job.work / "pseudo" / "1" / path.name).read_bytes(), path.name
    undisturbed, gone_on = predictions(trainings[1], 2), predictions(job, 2)
    assert list(undisturbed) == list(gone_on) and len(gone_on) == 3
    found = [dice(gone_on[case] == value, undisturbed[case] == value) for case in gone_on for value in (1, 2, 3)]
    assert np.mean(found) >= 0.99, f"Dice {np.mean(found):.3f} between killed twice and undisturbed"
