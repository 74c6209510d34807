"""Small files are whole or absent, whatever happens to their writer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from job_helpers import wait_until

from SemiSAMO1Lib import files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError("the disk is full")
    assert files.read_json(path) == {"old": 1}


def test_a_failed_write_leaves_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.atomic_path(tmp_path / "a.json"):
        raise RuntimeError("the disk is full")
    assert list(tmp_path.iterdir()) == []


def test_what_json_cannot_say_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"score": float("nan")})
    assert files.read_json(path) == {"old": 1}


def test_the_temporary_name_keeps_the_ending_that_names_the_format(tmp_path: Path) -> None:
    with files.atomic_path(tmp_path / "case.v1.seg.nrrd") as temporary:
        assert temporary.name.endswith(".seg.nrrd")


def test_the_temporary_name_lies_in_the_same_folder(tmp_path: Path) -> None:
    with files.atomic_path(tmp_path / "new" / "a.json") as temporary:
        assert temporary.parent == tmp_path / "new", "a replacement is atomic within one file system only"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no permission bits")
def test_a_written_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    files.write_text(tmp_path / "atomic", "text")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_writing_never_touches_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "umask", lambda mask: asked.append(mask) or 0o022)
    files.write_text(tmp_path / "a", "text")
    assert asked == [], "two threads that write at once would leave the umask at 0 for good"


def test_replace_is_tried_again_while_a_reader_holds_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").write_text("new", encoding="utf-8")
    really, refusals = os.replace, [1, 2, 3]

    def refuse(source: Path, target: Path) -> None:
        if refusals:
            refusals.pop()
            raise PermissionError(13, "in use")
        really(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    files.replace(tmp_path / "new", tmp_path / "target")
    assert (tmp_path / "target").read_text(encoding="utf-8") == "new"


def test_replace_gives_up_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "in use")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        files.replace(tmp_path / "new", tmp_path / "target", patience_s=0.2)


def test_a_damaged_json_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"half": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        files.read_json(tmp_path / "a.json")


def test_umlauts_stay_readable(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"name": "Müller"})
    assert "Müller" in (tmp_path / "a.json").read_text(encoding="utf-8")


REWRITER = """
import sys
from pathlib import Path
from SemiSAMO1Lib import files
for number in range(500):
    files.write_json(Path(sys.argv[1]), {"number": number, "filling": "x" * 200_000, "end": number})
"""


def test_a_reader_never_sees_half_a_file_while_a_writer_rewrites_it(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    files.write_json(path, {"number": -1, "end": -1})
    writer = subprocess.Popen([sys.executable, "-c", REWRITER, str(path)])
    halves, seen = [], set()
    while writer.poll() is None:
        value = json.loads(path.read_text(encoding="utf-8"))
        seen.add(value["number"])
        if value["number"] != value["end"]:
            halves.append(value["number"])
    assert (writer.returncode, halves) == (0, []) and len(seen) > 5, f"only {len(seen)} versions were read"


APPENDER = """
import sys
from pathlib import Path
from SemiSAMO1Lib import files
for number in range(300):
    files.append_line(Path(sys.argv[1]), {"writer": sys.argv[2], "number": number, "filling": "x" * 3000})
"""


def test_lines_of_two_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", APPENDER, str(path), name]) for name in "ab"]
    for writer in writers:
        writer.wait()
    lines, _ = files.read_lines(path)
    numbers = {name: [line["number"] for line in lines if line["writer"] == name] for name in "ab"}
    assert numbers == {"a": list(range(300)), "b": list(range(300))}, "every line is whole and in its writer's order"


def test_a_reader_sees_whole_lines_while_a_writer_appends(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", APPENDER, str(path), "a"])
    offset, numbers = 0, []
    while True:
        ended = writer.poll() is not None
        lines, offset = files.read_lines(path, offset)
        numbers += [line["number"] for line in lines]
        if ended:
            break
    assert numbers == list(range(300)), "every line once, in order"


def test_reading_lines_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    files.append_line(path, {"n": 1})
    _, offset = files.read_lines(path)
    files.append_line(path, {"n": 2})
    assert files.read_lines(path, offset)[0] == [{"n": 2}]


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": ')
    assert files.read_lines(path) == ([{"n": 1}], 9)


def test_half_a_line_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": ')
    files.mend_last_line(path)
    files.append_line(path, {"n": 2})
    assert files.read_lines(path)[0] == [{"n": 1}, {"n": 2}]


def test_a_file_of_half_a_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"n": ')
    files.mend_last_line(path)
    assert path.read_bytes() == b""


def test_whole_lines_are_not_mended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"n": 1}\n')
    files.mend_last_line(path)
    assert path.read_bytes() == b'{"n": 1}\n'


FULL_DISK = """
import resource, sys
from pathlib import Path
from SemiSAMO1Lib import files
path = Path(sys.argv[1])
files.append_line(path, {"n": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
try:
    files.append_line(path, {"filling": "x" * 100})
except OSError as error:
    print("refused")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_line_that_does_not_fit_on_the_disk_leaves_no_half(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    shown = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert (shown.stdout.strip(), path.read_bytes()) == ("refused", b'{"n": 1}\n')


def test_free_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert files.free_bytes(tmp_path / "not" / "yet" / "there") > 0


def test_two_threads_can_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"

    def write(name: str) -> None:
        for number in range(100):
            files.write_json(path, {"who": name, "number": number})

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files.read_json(path)["number"] == 99


def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"number": -1})
    writer = subprocess.Popen([sys.executable, "-c", REWRITER, str(path)])
    wait_until(lambda: files.read_json(path)["number"] > 3, "the writer writes", 30)
    writer.kill()
    writer.wait()
    value = files.read_json(path)
    assert value["number"] == value["end"]
