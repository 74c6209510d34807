"""A training by several processes on one machine (gloo): the same answer, each case once, killed and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from job_helpers import events_of

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.evaluation.metrics import dice
from SemiSAMO1Lib.engine.learners import LEARNERS
from SemiSAMO1Lib.engine.observer import Silent
from SemiSAMO1Lib.engine.ranks import Ranks, lost_another
from SemiSAMO1Lib.image_io import read_volume
from SemiSAMO1Lib.job import JobFolder, JobKind, State, observe
from SemiSAMO1Lib.phantoms import PhantomSettings, write_cohort
from SemiSAMO1Lib.project import Project
from SemiSAMO1Lib.tasks.together import PATIENCE_S, _wait_for_the_first

ROOT = Path(__file__).resolve().parents[2]

TINY = {
    "patch_voxels": 4096,
    "filters": 4,
    "device": "cpu",
    "precision": "32-true",
    "batch": 6,
    "labelled_batch": 6,
    "rounds": 2,
    "iterations": 12,
}

#: Processes of the trainings that are compared.
COUNTS = (1, 2, 3)


def together(count: int, *words: object) -> list[str]:
    """The command that starts `count` processes of the shell, as docs/scaling.md has it."""
    run = [sys.executable, "-m"]
    if count > 1:
        run += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    return [*run, "SemiSAMO1Lib.cli", *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def done(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)


def new_project(folder: Path) -> Path:
    """Five phantoms, the first and the last of them labelled."""
    write_cohort(folder / "cohort", 5, settings=PhantomSettings(spacing_mm=(4.5, 4.0, 4.0)))
    project = Project.create(folder / "project")
    done(together(1, "init", project.folder, "--images", folder / "cohort" / "images"))
    for case in ("phantom_000", "phantom_004"):
        label = folder / "cohort" / "labels" / f"{case}.nrrd"
        done(together(1, "template", project.folder, "--case", case, "--labels", label))
    return project.folder


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> dict[int, JobFolder]:
    """The same training by one, two and three processes."""
    found = {}
    for count in COUNTS:
        folder = tmp_path_factory.mktemp(f"by{count}")
        project = new_project(folder)
        files.write_json(folder / "tiny.json", TINY)
        ended = done(together(count, "train", project, "--config", folder / "tiny.json", "--keep-rounds"))
        job = JobFolder(project / "jobs" / "0002-train")
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
    job = JobFolder(project / "jobs" / "0002-train")
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


@pytest.fixture(scope="module")
def steps() -> dict[int, Any]:
    """Some steps of every learner by one and by three processes."""
    script, found = str(ROOT / "Testing" / "engine" / "steps_together.py"), {}
    for count in (1, 3):
        run = ["torch.distributed.run", "--standalone", "--nproc-per-node", "3", script]
        ended = done([sys.executable, "-m", *run] if count > 1 else [sys.executable, script])
        assert ended.returncode == 0, ended.stderr[-4000:]
        found[count] = json.loads(ended.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("learner", LEARNERS)
def test_every_learners_losses_do_not_depend_on_how_the_batch_is_shared(steps: dict[int, Any], learner: str) -> None:
    for alone, shared in zip(steps[1][learner]["losses"], steps[3][learner]["losses"], strict=True):
        assert shared == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_same_is_learned_however_the_batch_is_shared(steps: dict[int, Any], learner: str) -> None:
    """With SGD a wrong scale of the gradients would show: the average moves by far more than it may differ."""
    moved = steps[1][learner]["moved"]
    assert steps[3][learner]["average"] == pytest.approx(steps[1][learner]["average"], abs=0.02 * moved) and moved > 0


@pytest.mark.parametrize("learner", LEARNERS)
def test_every_process_has_the_same_average(steps: dict[int, Any], learner: str) -> None:
    assert steps[3][learner]["averages_apart"] == 0, "the running averages of the processes have gone apart"


# ---------------------------------------------------------------------- who does what

#: What is made of each case, by the process whose share the case is.
OF_A_CASE = (
    *("propagation", "transforms", "confidence", "signatures", "links", "images", "uncertainty/1"),
    *(f"{kind}/{number}" for number in (1, 2) for kind in ("pseudo", "weights-of-voxels")),
    *(f"{kind}/{number}" for number in range(3) for kind in ("probabilities", "answers", "neighbours")),
    *(f"{kind}/{number}" for number in (1, 2) for kind in ("passes", "behind-by-case", "checks", "checks-of-answers")),
    *(f"signals/{number}" for number in range(3)),
)

SHARING = 3


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small run by three processes: what each of them wrote, and how often."""
    script, folder = str(ROOT / "Testing" / "engine" / "shares_together.py"), tmp_path_factory.mktemp("shares")
    run = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(SHARING), script, str(folder / "store")]
    ended = done([sys.executable, "-m", *run])
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return found


def of_a_case(name: str) -> bool:
    return any(name.startswith(f"{kind}/phantom_") for kind in OF_A_CASE)


@pytest.mark.parametrize("kind", OF_A_CASE)
def test_every_case_is_done_by_the_process_whose_share_it_is(shares: dict[str, Any], kind: str) -> None:
    done_by: dict[str, list[int]] = {}
    for number, written in enumerate(shares["written"]):
        for name in written:
            if name.startswith(f"{kind}/phantom_"):
                done_by.setdefault(Path(name).stem, []).append(number)
    expected = {f"phantom_{n + 2:03d}": [n % SHARING] for n in range(5)}
    assert done_by == expected, f"{kind}: who did which case"


def test_nothing_is_written_twice(shares: dict[str, Any]) -> None:
    times: dict[str, int] = {}
    for written in shares["written"]:
        for name, count in written.items():
            times[name] = times.get(name, 0) + count
    assert [name for name, count in times.items() if count != 1] == []


def test_what_each_counted_of_its_cases_is_written_by_itself(shares: dict[str, Any]) -> None:
    """For the signals of quality: what its cases show in the template's space, and their volumes, in each round."""
    for process, written in enumerate(shares["written"]):
        counted = sorted(name for name in written if name.startswith("votes/"))
        assert counted == sorted(f"votes/{n}/{process}.{kind}" for n in (0, 1, 2) for kind in ("json", "npy"))


def test_all_else_is_written_by_the_first_alone(shares: dict[str, Any]) -> None:
    others = [name for written in shares["written"][1:] for name in written]
    assert [name for name in others if not of_a_case(name) and not name.startswith("votes/")] == []


def test_results_are_given_by_the_first_alone(shares: dict[str, Any]) -> None:
    """Five cases in rounds 0, 1 and 2."""
    assert shares["yielded"] == [15, 0, 0]


# ---------------------------------------------------------------------- killed, stopped, gone on with


@pytest.fixture
def under_way(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], JobFolder]]:
    """A long training by two processes, somewhere in its first round; and the process that started them."""
    project = new_project(tmp_path)
    files.write_json(tmp_path / "long.json", {**TINY, "iterations": 3000, "rounds": 1, "checkpoint_seconds": 1})
    command = together(2, "train", project, "--config", tmp_path / "long.json")
    with open(tmp_path / "log", "wb") as log:
        starter = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    job = JobFolder(project / "jobs" / "0002-train")
    deadline = time.monotonic() + 120
    while not (job.work / "checkpoints" / "round-1.pt").exists():  # whole, not the file that becomes it
        assert starter.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
        time.sleep(0.2)
    yield starter, job
    starter.terminate()
    starter.wait(60)


def children(pid: int) -> list[int]:
    """Processes that one started (Linux)."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for one in found]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the other process by /proc, which Linux has")
@pytest.mark.parametrize("which", ["the one that writes", "another"])
def test_a_process_that_dies_interrupts_the_training_which_others_go_on_with(
    under_way: tuple[subprocess.Popen[bytes], JobFolder], which: str
) -> None:
    starter, job = under_way
    first = files.read_json(job.status)["pid"]
    (other,) = [pid for pid in children(starter.pid) if pid != first]
    os.kill(other if which == "another" else first, signal.SIGKILL)
    assert starter.wait(60) != 0
    deadline = time.monotonic() + 60
    while observe(job).state is not State.INTERRUPTED:
        assert time.monotonic() < deadline, f"the job is {observe(job).state}"
        time.sleep(0.2)
    done_before = torch.load(job.work / "checkpoints" / "round-1.pt")["iteration"]
    config = files.read_json(job.work / "config.json")
    files.write_json(job.work / "config.json", {**config, "iterations": done_before + 5})  # the end is near
    ended = done(together(3, "resume", job.project))
    assert ended.returncode == 0 and observe(job).state is State.FINISHED, ended.stderr[-4000:]
    notes = [event["text"] for event in events_of(job) if event["kind"] == "note"]
    assert f"round 1: going on from iteration {done_before}" in notes


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


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the other process by /proc, which Linux has")
def test_killed_among_cases_and_finished_by_others_the_results_are_the_same(
    trainings: dict[int, JobFolder], tmp_path: Path
) -> None:
    """Two processes die in the propagation, three others in the answers of the first round, one finishes."""
    project = new_project(tmp_path)
    files.write_json(tmp_path / "tiny.json", TINY)
    job = JobFolder(project / "jobs" / "0002-train")
    propagation, answers, log = job.work / "propagation", job.work / "answers" / "1", tmp_path / "log"
    train = together(2, "train", project, "--config", tmp_path / "tiny.json", "--keep-rounds")
    propagated = killed_at_the_first_file_of(propagation, train, job, log)
    assert len(propagated) < len(written(trainings[1].work / "propagation")), "killed too late: all were propagated"
    answered = killed_at_the_first_file_of(answers, together(3, "resume", project), job, log)
    learned = written(job.work / "weights")
    ended = done(together(1, "resume", project))
    assert ended.returncode == 0 and observe(job).state is State.FINISHED, ended.stderr[-4000:]
    for folder, before in ((propagation, propagated), (answers, answered), (job.work / "weights", learned)):
        after = written(folder)
        assert {name: after[name] for name in before} == before, f"what was finished in {folder.name} was done again"
    for path in sorted((trainings[1].work / "pseudo" / "1").iterdir()):
        assert path.read_bytes() == (job.work / "pseudo" / "1" / path.name).read_bytes(), path.name
    undisturbed, gone_on = predictions(trainings[1], 2), predictions(job, 2)
    assert list(undisturbed) == list(gone_on) and len(gone_on) == 3
    found = [dice(gone_on[case] == value, undisturbed[case] == value) for case in gone_on for value in (1, 2, 3)]
    assert np.mean(found) >= 0.99, f"Dice {np.mean(found):.3f} between killed twice and undisturbed"


def test_all_stop_when_one_is_asked(under_way: tuple[subprocess.Popen[bytes], JobFolder]) -> None:
    starter, job = under_way
    done(together(1, "cancel", job.project))
    starter.wait(60)
    seen = observe(job)
    assert seen.state is State.INTERRUPTED and "stopped as asked" in seen.message

    plan = files.read_json(job.work / "plan.json")
    files.write_json(job.work / "plan.json", {**plan, "labelled": 1})
    refused = done(together(2, "resume", job.project))
    assert refused.returncode != 0 and "cannot be shared by 2 processes" in refused.stderr
    assert observe(job) == seen, "who cannot go on with it leaves it to others"


def test_an_error_of_gloo_is_known_for_what_it_is() -> None:
    """As torch words it when the other end is gone; the errors of our own work are none of these."""
    text = "[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:51896."
    assert lost_another(RuntimeError(text)) and lost_another(torch.distributed.DistBackendError("NCCL error"))
    assert not lost_another(RuntimeError("round 1: the loss is not a number"))


class OneOf:
    """A Fabric as one of several processes sees it, which are asked one after the other."""

    def __init__(self, number: int, count: int) -> None:
        self.global_rank, self.world_size, self.is_global_zero = number, count, number == 0
        self.device = torch.device("cpu")

    def all_gather(self, value: torch.Tensor) -> torch.Tensor:
        return value.expand(self.world_size)

    def barrier(self) -> None: ...


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_case_is_done_exactly_once(count: int) -> None:
    cases = [f"case_{number}" for number in range(5)]
    shares = [list(Ranks(OneOf(number, count)).share(cases, Silent())) for number in range(count)]  # type: ignore[arg-type]
    assert sorted(one for share in shares for one in share) == list(enumerate(cases))


def test_all_go_by_what_the_first_one_finds() -> None:
    """A stale view of a network folder must not send one process where the others do not wait for it."""

    class Apart(OneOf):
        def all_gather(self, value: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1, 0]) if value.item() in (0, 1) else value

    found = [Ranks(Apart(number, 2)).as_first(number == 0) for number in range(2)]  # type: ignore[arg-type]
    assert found == [True, True]


# ---------------------------------------------------------------------- the end of a follower


@pytest.fixture
def first_is(tmp_path: Path) -> Any:
    """Writes down how the first process' job stands."""
    job = JobFolder.create(tmp_path / "jobs", JobKind.TRAIN, {}, [])

    def stands(state: str, silent_s: float = 0.0) -> JobFolder:
        files.write_json(job.status, {"state": state, "heartbeat": time.time() - silent_s})
        return job

    return stands


def waited(job: JobFolder, seconds: float) -> bool:
    """Whether a follower that is done with its share still waits for the first process after some seconds."""
    thread = threading.Thread(target=_wait_for_the_first, args=(job,), daemon=True)
    thread.start()
    thread.join(seconds)
    return thread.is_alive()


def test_a_follower_waits_until_the_first_has_ended(first_is: Any) -> None:
    job = first_is("running")
    assert waited(job, 1.0)
    first_is("finished")
    assert not waited(job, 5.0)


def test_a_follower_does_not_wait_for_a_first_that_is_silent_for_long(first_is: Any) -> None:
    assert not waited(first_is("running", silent_s=PATIENCE_S + 1), 5.0)
    first_is("failed")  # ends what else might wait


def test_without_a_status_there_is_nobody_to_wait_for(first_is: Any) -> None:
    job = first_is("running")
    job.status.unlink()
    assert not waited(job, 5.0)
