"""A long training by two processes: one of them dies, or all are asked to stop; others go on with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from job_helpers import events_of
from together_helpers import HAS_PROC, TINY, children, done, environment, new_project, together, training_of

from SemiSAMO1Lib import files
from SemiSAMO1Lib.job import JobFolder, State, observe


@pytest.fixture
def under_way(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], JobFolder]]:
    """A long training by two processes, somewhere in its first round; and the process that started them."""
    project = new_project(tmp_path)
    files.write_json(tmp_path / "long.json", {**TINY, "iterations": 3000, "rounds": 1, "checkpoint_seconds": 1})
    command = together(2, "train", project, "--config", tmp_path / "long.json")
    with open(tmp_path / "log", "wb") as log:
        starter = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    job = training_of(project)
    deadline = time.monotonic() + 120
    while not (job.work / "checkpoints" / "round-1.pt").exists():  # whole, not the file that becomes it
        assert starter.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
        time.sleep(0.2)
    yield starter, job
    starter.terminate()
    starter.wait(60)


@pytest.mark.skipif(not HAS_PROC, reason="finds the other process by /proc, which Linux has")
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
