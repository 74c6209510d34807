"""New lines of a growing file, a little at a time: nothing twice, nothing torn, never more than a window waits for."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from SemiSAMO1Lib.job import JobFolder
from SemiSAMO1Lib.job.tail import AT_ONCE, HISTORY, JobTail, Tail


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def test_a_file_that_is_not_there_has_no_lines(path: Path) -> None:
    assert Tail(path).poll() == []


def test_lines_come_once(path: Path) -> None:
    tail = Tail(path)
    path.write_text("one\ntwo\n")
    assert (tail.poll(), tail.poll()) == (["one", "two"], [])


def test_a_line_that_is_not_finished_waits(path: Path) -> None:
    tail = Tail(path)
    path.write_text("one\ntw")
    first = tail.poll()
    with path.open("a") as stream:
        stream.write("o\n")
    assert (first, tail.poll()) == (["one"], ["two"])


def test_letters_of_several_bytes_are_not_torn(path: Path) -> None:
    tail = Tail(path)
    text = "ä" * (AT_ONCE // 2 - 3) + "\n" + "ö" * 10 + "\n"
    path.write_bytes(text.encode())
    assert "".join([*tail.poll(), *tail.poll()]) == text.replace("\n", "")


def test_no_more_than_a_little_is_read_at_once(path: Path) -> None:
    tail = Tail(path)
    path.write_text("x" * 99 + "\n" + ("y" * 99 + "\n") * (3 * AT_ONCE // 100))
    read = sum(len(line) + 1 for line in tail.poll())
    assert read <= AT_ONCE and tail.behind


def test_of_a_long_history_the_end_is_read(path: Path) -> None:
    count = 3 * HISTORY // 10
    path.write_text("".join(f"{number:09d}\n" for number in range(count)))
    tail = Tail(path)
    lines: list[str] = []
    while got := tail.poll():
        lines += got
    assert tail.skipped and lines[-1] == f"{count - 1:09d}" and len(lines) * 10 <= HISTORY
    assert all(len(line) == 9 for line in lines), "the first line was begun in its middle"


def test_a_file_that_was_written_anew_is_read_from_its_beginning(path: Path) -> None:
    tail = Tail(path)
    path.write_text("a long first line\n")
    tail.poll()
    path.write_text("new\n")
    assert tail.poll() == ["new"]


def test_a_line_without_end_is_passed_over(path: Path) -> None:
    tail = Tail(path)
    path.write_text("z" * (2 * AT_ONCE) + "\nnext\n")
    lines: list[str] = []
    for _ in range(4):
        lines += tail.poll()
    assert lines[-1] == "next"


def test_damaged_events_are_left_out(tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    job.events.write_text('{"kind": "note"}\n{damaged\n[1]\n' + json.dumps({"kind": "end"}) + "\n")
    assert [event["kind"] for event in JobTail(job).poll()[0]] == ["note", "end"]


@pytest.mark.alone
def test_a_hundred_megabytes_take_no_time(path: Path) -> None:
    """The issue's bound of a tick is 50 ms; reading alone must be far below."""
    with path.open("wb") as stream:
        stream.write((b'{"kind": "losses", "losses": {"total": 0.5}}' + b" " * 55 + b"\n") * (1 << 20))
    tail = Tail(path)
    seconds = []
    for _ in range(20):
        began = time.process_time()
        tail.poll()
        seconds.append(time.process_time() - began)
    assert sorted(seconds)[10] < 0.02, f"median {sorted(seconds)[10] * 1000:.1f} ms"
