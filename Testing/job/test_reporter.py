"""The worker's side of the job folder: heartbeat, events, time left, the last word."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from job_helpers import empty_job, events_of, wait_until

from SemiSAMO1Lib import files
from SemiSAMO1Lib.job import JobFolder, State, launcher, observe
from SemiSAMO1Lib.tasks import reporter as reporter_module
from SemiSAMO1Lib.tasks.reporter import Reporter


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    return empty_job(tmp_path)


@pytest.fixture
def fast_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter_module, "HEARTBEAT_S", 0.02)


def heartbeat(job: JobFolder) -> float:
    return float(files.read_json(job.status)["heartbeat"])


def test_a_working_reporter_is_seen_as_running(job: JobFolder) -> None:
    with Reporter(job):
        assert observe(job).state is State.RUNNING


def test_the_status_is_written_with_the_workers_own_pid(job: JobFolder) -> None:
    with Reporter(job):
        assert observe(job).pid == os.getpid()


@pytest.mark.usefixtures("fast_beat")
def test_the_heart_beats_while_the_worker_is_busy(job: JobFolder) -> None:
    with Reporter(job):
        first = heartbeat(job)
        wait_until(lambda: heartbeat(job) > first, "the heartbeat moved on by itself", 10)


@pytest.mark.usefixtures("fast_beat")
def test_the_heart_stops_with_the_job(job: JobFolder) -> None:
    with Reporter(job) as reporter:
        reporter.end(State.FINISHED)
    last = heartbeat(job)
    time.sleep(0.2)
    assert heartbeat(job) == last


@pytest.mark.usefixtures("fast_beat")
def test_the_heart_beats_on_after_a_write_that_failed(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    really, refusals = files.write_json, [1, 2]

    def refuse(path: Path, value: object) -> None:
        if refusals and path == job.status:
            refusals.pop()
            raise OSError(28, "No space left on device")
        really(path, value)

    with Reporter(job):
        first = heartbeat(job)
        monkeypatch.setattr(files, "write_json", refuse)
        wait_until(lambda: heartbeat(job) > first, "the heart beat again after two failures", 10)


def test_the_heartbeat_interval_leaves_room_before_it_is_stale() -> None:
    from SemiSAMO1Lib.job.watch import HEARTBEAT_S, STALE_S

    assert STALE_S >= 10 * HEARTBEAT_S


def test_the_first_line_is_the_handshake(job: JobFolder) -> None:
    with Reporter(job) as reporter:
        reporter.handshake(library="0.1.0", device="cpu")
        reporter.event("note", text="hello")
    first = events_of(job)[0]
    assert (first["kind"], first["schema"], first["pid"], first["device"]) == ("handshake", 1, os.getpid(), "cpu")


def losses(reporter: Reporter, iteration: int, of: int = 1000) -> None:
    reporter.event("losses", round=1, iteration=iteration, of=of, losses={"total": 1.0})


def test_at_most_one_training_event_a_second(job: JobFolder) -> None:
    with Reporter(job) as reporter:
        started = time.monotonic()
        for iteration in range(1, 200):
            losses(reporter, iteration)
        seconds = time.monotonic() - started
    assert 1 <= len(events_of(job, "losses")) <= 1 + seconds


def test_a_second_later_the_next_training_event_is_written(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
    now = [1000.0]
    monkeypatch.setattr(reporter_module, "time", clock)
    with Reporter(job) as reporter:
        for now[0] in (1000.0, 1000.9, 1001.1):
            losses(reporter, int(now[0] * 10))
    assert [event["iteration"] for event in events_of(job, "losses")] == [10000, 10011]


def test_the_last_iteration_is_always_written(job: JobFolder) -> None:
    with Reporter(job) as reporter:
        for iteration in (998, 999, 1000):
            losses(reporter, iteration)
    assert events_of(job, "losses")[-1]["iteration"] == 1000


def test_the_time_left_is_what_the_rest_takes_at_this_speed(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(reporter_module, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    with Reporter(job) as reporter:
        for now[0], fraction in ((1000.0, 0.2), (1030.0, 0.5)):
            reporter.event("progress", stage="training 1", done=1, of=2, fraction=fraction)
        reporter._write()
        assert observe(job).eta_s == pytest.approx(50, abs=0.2), "30 s for 0.3, so 50 s for 0.5"


def test_a_resumed_job_does_not_count_what_others_did(job: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(reporter_module, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    with Reporter(job) as reporter:
        now[0] = 1100.0  # imports
        reporter.event("progress", stage="training 1", done=1, of=2, fraction=0.8)
        reporter._write()
        assert observe(job).eta_s is None, "nothing is known of the speed yet"


def test_what_a_resumed_job_finds_finished_says_nothing_of_its_speed(
    job: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(reporter_module, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))

    def left_after(reporter: Reporter, *steps: tuple[float, float]) -> float | None:
        for now[0], fraction in steps:
            reporter.event("progress", stage="training 1", done=1, of=2, fraction=fraction)
        reporter._write()
        return observe(job).eta_s

    with Reporter(job) as reporter:
        left_after(reporter, (1000.0, 0.0), (1100.0, 0.5))
    with Reporter(job) as reporter:  # killed again on its way to where it was
        left_after(reporter, (2000.0, 0.0), (2001.0, 0.2))
    with Reporter(job) as reporter:
        assert left_after(reporter, (3000.0, 0.0), (3001.0, 0.2), (3002.0, 0.4)) is None, "it is not yet where it was"
        assert left_after(reporter, (3003.0, 0.5), (3053.0, 0.75)) == pytest.approx(50, abs=0.2), "50 s for 0.25"


def test_a_job_that_is_started_again_knows_where_it_was(job: JobFolder) -> None:
    with Reporter(job) as reporter:
        reporter.event("progress", stage="training 1", done=1, of=2, fraction=0.5)
        reporter.end(State.INTERRUPTED)
    launcher.start(job)
    assert job.reached() == 0.5
    wait_until(lambda: not observe(job).state.active, "nothing is left of the worker")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "running", "heartbeat": 1, "reached": null}'])
def test_a_status_that_says_nothing_is_no_progress(job: JobFolder, text: str) -> None:
    job.status.write_text(text)
    assert job.reached() == 0


def test_progress_is_seen_in_the_status(job: JobFolder) -> None:
    with Reporter(job) as reporter:
        reporter.event("progress", stage="registration", done=2, of=3, fraction=0.25)
        reporter._write()
        assert (observe(job).stage, observe(job).fraction) == ("registration 2/3", 0.25)


def test_a_cancel_request_is_seen(job: JobFolder) -> None:
    with Reporter(job) as reporter:
        before = reporter.should_stop()
        job.cancel_request.touch()
        assert (before, reporter.should_stop()) == (False, True)


def test_a_finished_job_is_at_its_end(job: JobFolder) -> None:
    with Reporter(job) as reporter:
        reporter.end(State.FINISHED)
    seen = observe(job)
    assert (seen.state, seen.fraction, seen.eta_s) == (State.FINISHED, 1.0, None)


def test_a_failed_job_keeps_where_it_was_and_why(job: JobFolder) -> None:
    with Reporter(job) as reporter:
        reporter.event("progress", stage="registration", done=2, of=3, fraction=0.25)
        reporter.end(State.FAILED, "no memory")
    seen = observe(job)
    assert (seen.state, seen.stage, seen.message) == (State.FAILED, "registration 2/3", "no memory")


def test_the_last_event_is_the_end(job: JobFolder) -> None:
    with Reporter(job) as reporter:
        reporter.handshake()
        reporter.end(State.FAILED, "no memory")
    last = events_of(job)[-1]
    assert (last["kind"], last["state"], last["message"]) == ("end", "failed", "no memory")


def test_half_a_line_of_a_killed_worker_is_mended_first(job: JobFolder) -> None:
    job.events.write_bytes(b'{"kind": "handshake"}\n{"kind": "lo')
    with Reporter(job) as reporter:
        reporter.event("note", text="resumed")
    assert [event["kind"] for event in events_of(job)] == ["handshake", "note"]


def test_skipped_cases_are_in_the_log_too(job: JobFolder, capfd: pytest.CaptureFixture[str]) -> None:
    with Reporter(job) as reporter:
        reporter.event("skipped", name="case_7", reason="cut short")
    assert "case_7" in capfd.readouterr().out, "standard output is the worker's log"
