"""A training that is killed again and again, and resumed each time, reaches what an undisturbed one reaches.

SEMISAMO1_KILLS says how often it is killed (3 when not set); SEMISAMO1_KILL_SEED chooses other moments.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from job_helpers import events_of, labelled_project, make_training, wait_for_end, wait_until

from SemiSAMO1Lib import files
from SemiSAMO1Lib.image_io import read_volume
from SemiSAMO1Lib.job import JobFolder, State, kill, observe, resume, start

KILLS = int(os.environ.get("SEMISAMO1_KILLS", "3"))
SEED = int(os.environ.get("SEMISAMO1_KILL_SEED", "1"))

#: Longest wait between a place in the run and the kill, seconds: about the time from one place to the next.
LONGEST_DELAY_S = 0.25

#: Endings of the files that a run reads back.
READ_BACK = (".json", ".npy", ".pt", ".nrrd", ".seg.nrrd", ".jsonl", ".html")


class Onlooker(threading.Thread):
    """Reads every JSON file and every complete line of a job folder over and over, as the panel does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.read = 0
        self.damaged: list[str] = []
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            self.look()
            time.sleep(0.01)

    def look(self) -> None:
        for folder, _, names in os.walk(self.folder):
            for name in names:
                if not name.startswith(".") and name.endswith((".json", ".jsonl")):
                    self._parse(Path(folder) / name)

    def _parse(self, path: Path) -> None:
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return  # removed meanwhile, as superseded files are
        whole = text[: text.rfind(b"\n") + 1].splitlines() if path.suffix == ".jsonl" else [text]
        try:
            for part in whole:
                json.loads(part)
            self.read += 1
        except ValueError as error:
            self.damaged.append(f"{path.name}: {error}")

    def end(self) -> None:
        self._ended.set()
        self.join()


@dataclass
class Killed:
    """What a training went through."""

    job: JobFolder
    onlooker: Onlooker
    kills: list[str] = field(default_factory=list)
    states: list[State] = field(default_factory=list)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    """The training of `finished`, killed at random moments; each time it is left with rubbish of half-written files."""
    project, _ = labelled_project(tmp_path_factory.mktemp("killed"))
    job = make_training(project)
    onlooker = Onlooker(job.path)
    onlooker.start()
    run = Killed(job, onlooker)
    chance = random.Random(SEED)
    start(job)
    try:
        for place in moments(chance):
            wait_until(lambda place=place: reached(job, place), f"the run came to {place}")
            leave_rubbish(job)  # for the life that runs to trip over
            time.sleep(chance.uniform(0, LONGEST_DELAY_S if place is not None else 0.05))
            if not kill(job):
                break  # finished meanwhile
            run.states.append(observe(job).state)
            run.kills.append("a checkpoint" if place is None else f"{place:.2f}")
            leave_rubbish(job)  # and for the next one
            with open(job.events, "ab") as stream:
                stream.write(b'{"kind": "half a li')
            resume(job)
        wait_for_end(job)
    finally:
        kill(job)
        onlooker.end()
    yield run


def moments(chance: random.Random) -> list[float | None]:
    """Fractions of the run, growing; one of them is None: in the middle of a round's training."""
    early = sorted(chance.uniform(0, 0.3) for _ in range(KILLS // 2))
    late = sorted(chance.uniform(0.3, 0.65) for _ in range(KILLS - KILLS // 2 - 1))
    return [*early, None, *late]


def reached(job: JobFolder, place: float | None) -> bool:
    """True when the worker that runs now has come to this place of the run, or when it has ended."""
    if not observe(job).state.active:
        return True
    events = events_of(job)
    lives = [number for number, event in enumerate(events) if event["kind"] == "handshake"]
    mine = events[lives[-1] :] if lives else []
    if not mine or mine[0]["pid"] != observe(job).pid:
        return False  # this life has not begun: a checkpoint may still be the one before's
    if place is None:
        return any((job.work / "checkpoints").glob("round-*.pt"))
    return max([event.get("fraction") or 0.0 for event in mine]) >= place


def leave_rubbish(job: JobFolder) -> None:
    """What a writer that is killed in the middle leaves: a temporary file that holds nothing whole, of every kind."""
    for folder in {path.parent for path in job.path.rglob("*") if path.is_file()}:
        for ending in READ_BACK:
            (folder / f".writing-rubbish{ending}").write_bytes(b"\x00rubbish")


def test_it_was_killed_indeed(killed: Killed) -> None:
    assert len(killed.kills) == KILLS, f"the moments must fall into the run, killed at {killed.kills}"


def test_a_round_went_on_from_its_checkpoint(killed: Killed) -> None:
    notes = [event["text"] for event in events_of(killed.job, "note")]
    assert any("going on from iteration" in note for note in notes), f"killed at {killed.kills}, notes {notes}"


def test_a_killed_training_is_seen_as_interrupted(killed: Killed) -> None:
    assert set(killed.states) == {State.INTERRUPTED}


def test_it_finishes(killed: Killed) -> None:
    seen = observe(killed.job)
    assert seen.state is State.FINISHED, f"killed at {killed.kills}: {seen.message}\n{killed.job.log_tail()}"


def weights(job: JobFolder) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of every weights file."""
    return {
        path.name: dict(tensors(torch.load(path, weights_only=True)))
        for path in sorted((job.work / "weights").glob("round-*.pt"))
    }


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from tensors(one, f"{name}/{key}")


def test_the_weights_are_bitwise_those_of_the_undisturbed_run(finished: JobFolder, killed: Killed) -> None:
    expected, found = weights(finished), weights(killed.job)
    assert len(expected) == 2 and {k: set(v) for k, v in found.items()} == {k: set(v) for k, v in expected.items()}
    different = [
        f"{file}{name}"
        for file, ones in expected.items()
        for name, one in ones.items()
        if not torch.equal(one, found[file][name])
    ]
    assert different == [], f"killed at {killed.kills}"


def test_the_predictions_are_those_of_the_undisturbed_run(finished: JobFolder, killed: Killed) -> None:
    assert answers(killed.job) == answers(finished), f"killed at {killed.kills}"


def answers(job: JobFolder) -> dict[str, str]:
    """Case -> hash of its prediction file."""
    return {row["case"]: row["sha256"] for row in files.read_json(job.index)["cases"]}


def test_the_uncertainty_is_that_of_the_undisturbed_run(finished: JobFolder, killed: Killed) -> None:
    for row in files.read_json(finished.index)["cases"]:
        expected, found = (read_volume(job.results / row["uncertainty"]).array for job in (finished, killed.job))
        assert np.array_equal(expected, found), f"{row['case']}, killed at {killed.kills}"


def test_the_scores_are_those_of_the_undisturbed_run(finished: JobFolder, killed: Killed) -> None:
    expected, found = ([row["scores"] for row in files.read_json(j.index)["cases"]] for j in (finished, killed.job))
    assert found == expected


def test_the_same_files_are_left(finished: JobFolder, killed: Killed) -> None:
    expected, found = (
        {
            p.relative_to(j.path).as_posix()
            for p in j.path.rglob("*")
            if p.is_file() and not p.name.startswith(".writing-") and "curves" not in p.parts  # a file for every life
        }
        for j in (finished, killed.job)
    )
    assert found == expected, "a resumed run leaves neither more nor less"


def test_half_written_files_are_swept_away(killed: Killed) -> None:
    left = [path.name for folder in (killed.job.work, killed.job.results) for path in folder.rglob(".writing-*")]
    assert left == [], "each may be as large as a scan; nobody would ever remove them"


def test_every_json_file_could_be_read_at_every_moment(killed: Killed) -> None:
    assert killed.onlooker.damaged == [] and killed.onlooker.read > 100, f"{killed.onlooker.read} files were read"


def test_every_life_begins_with_a_handshake(killed: Killed) -> None:
    pids = [event["pid"] for event in events_of(killed.job, "handshake")]
    assert len(pids) == len(set(pids)) == len(killed.kills) + 1


def test_it_ends_once(killed: Killed) -> None:
    assert [event["state"] for event in events_of(killed.job, "end")] == ["finished"]
