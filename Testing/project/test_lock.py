"""The lock: one holder at a time, a dead one's lock is taken over, another computer's is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from SemiSAMO1Lib import lock, processes
from SemiSAMO1Lib.lock import Locked, identity, locked

COUNT = """
import sys
from pathlib import Path
from SemiSAMO1Lib.lock import locked
folder, turns = Path(sys.argv[1]), int(sys.argv[2])
for _ in range(turns):
    with locked(folder / "test.lock", patience_s=30):
        with open(folder / "inside", "x"):
            counter = folder / "counter"
            counter.write_text(str(int(counter.read_text()) + 1))
        (folder / "inside").unlink()
"""


def dead_process() -> dict[str, object]:
    """The identity of a process on this host that has ended."""
    code = "import json; from SemiSAMO1Lib.lock import identity; print(json.dumps(identity()))"
    return dict(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))


def count(folder: Path, workers: int, turns: int) -> int:
    (folder / "counter").write_text("0")
    command = [sys.executable, "-c", COUNT, str(folder), str(turns)]
    running = [subprocess.Popen(command) for _ in range(workers)]
    codes = [process.wait(60) for process in running]
    assert codes == [0] * workers, f"two processes were inside the lock at once, or it was never free: {codes}"
    return int((folder / "counter").read_text())


def test_the_lock_is_gone_afterwards(tmp_path: Path) -> None:
    with locked(tmp_path / "test.lock"):
        pass
    assert list(tmp_path.iterdir()) == [], "no file should stay behind"


def test_the_lock_is_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "test.lock"):
        _ = 1 / 0
    assert not (tmp_path / "test.lock").exists(), "an error inside should release the lock"


def test_a_living_holder_is_waited_for_and_then_named(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "test.lock"),
        pytest.raises(Locked, match=f"process {os.getpid()}"),
        locked(tmp_path / "test.lock", patience_s=0.1),
    ):
        pass


def test_four_processes_are_inside_one_at_a_time(tmp_path: Path) -> None:
    assert count(tmp_path, workers=4, turns=50) == 200, "an increment was lost: two processes held the lock at once"


def test_a_dead_process_s_lock_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "test.lock").write_text(json.dumps(dead_process()))
    with locked(tmp_path / "test.lock", patience_s=1):
        holder = json.loads((tmp_path / "test.lock").read_text())["pid"]
    assert holder == os.getpid(), "the lock should now be ours"


def test_four_processes_that_find_a_dead_lock_still_take_turns(tmp_path: Path) -> None:
    (tmp_path / "test.lock").write_text(json.dumps(dead_process()))
    assert count(tmp_path, workers=4, turns=20) == 80, "breaking a dead lock let two processes in"


def test_a_pid_used_again_by_another_process_counts_as_dead(tmp_path: Path) -> None:
    other = {**identity(), "process_start": processes.start_time(os.getpid()) - 1000}
    (tmp_path / "test.lock").write_text(json.dumps(other))
    with locked(tmp_path / "test.lock", patience_s=1):
        assert (tmp_path / "test.lock").exists(), "the lock of an ended process whose pid is ours should be taken over"


def test_an_old_half_made_lock_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "test.lock").touch()
    os.utime(tmp_path / "test.lock", (time.time() - 60,) * 2)
    with locked(tmp_path / "test.lock", patience_s=1):
        assert (tmp_path / "test.lock").read_text(), "an empty lock a minute old should be taken over"


def test_a_half_made_lock_is_taken_over_once_it_was_watched(tmp_path: Path) -> None:
    (tmp_path / "test.lock").touch()
    with locked(tmp_path / "test.lock", patience_s=4):
        assert (tmp_path / "test.lock").read_text(), "an empty lock that stays empty should be taken over"


def test_processes_that_find_a_half_made_lock_still_take_turns(tmp_path: Path) -> None:
    """A file system gives the inode of a file that is gone to the next one."""
    (tmp_path / "test.lock").touch()
    assert count(tmp_path, workers=4, turns=20) == 80, "breaking a half-made lock let two processes in"


def test_a_lock_that_another_account_does_not_let_us_read_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_for_us(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "test.lock").write_text(json.dumps({**identity(), "user": "ann"}))
    os.utime(tmp_path / "test.lock", (time.time() - 600,) * 2)
    monkeypatch.setattr(Path, "read_text", not_for_us)
    monkeypatch.setattr(Path, "read_bytes", not_for_us)
    with pytest.raises(Locked), locked(tmp_path / "test.lock", patience_s=0.1):
        pass


def test_a_dead_lock_that_cannot_be_removed_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "test.lock").write_text(json.dumps(dead_process()))
    monkeypatch.setattr(lock.os, "replace", refused)
    began = time.monotonic()
    with pytest.raises(Locked), locked(tmp_path / "test.lock", patience_s=0.2):
        pass
    assert time.monotonic() - began < 5


def test_a_half_made_lock_of_a_file_server_whose_clock_is_behind_is_respected(tmp_path: Path) -> None:
    """Its time says that it is older than a process takes to finish it."""
    (tmp_path / "test.lock").touch()
    os.utime(tmp_path / "test.lock", (time.time() - 5,) * 2)
    with pytest.raises(Locked), locked(tmp_path / "test.lock", patience_s=0.1):
        pass


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses a new lock file with the same error while an old one is being deleted."""

    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied", str(tmp_path / "test.lock"))

    monkeypatch.setattr(lock, "_ON_WINDOWS", True)
    monkeypatch.setattr(lock.os, "open", refused)
    began = time.monotonic()
    with pytest.raises(PermissionError), locked(tmp_path / "test.lock", patience_s=10):
        pass
    assert time.monotonic() - began < 3, "nobody holds it: there is nothing to wait for"


def test_a_fresh_half_made_lock_is_respected(tmp_path: Path) -> None:
    (tmp_path / "test.lock").touch()
    with pytest.raises(Locked), locked(tmp_path / "test.lock", patience_s=0.1):
        pass


def test_another_computer_s_lock_is_not_broken(tmp_path: Path) -> None:
    (tmp_path / "test.lock").write_text(json.dumps({**dead_process(), "host": "ward-7", "user": "eva"}))
    with pytest.raises(Locked), locked(tmp_path / "test.lock", patience_s=0.1):
        pass
    assert json.loads((tmp_path / "test.lock").read_text())["host"] == "ward-7", "the lock should still be there"


@pytest.mark.parametrize("word", ["ward-7", "eva", "2026-01-02T03:04:05", "test.lock"])
def test_the_message_says_who_where_when_and_what_to_remove(tmp_path: Path, word: str) -> None:
    holder = {**identity(), "host": "ward-7", "user": "eva", "time": "2026-01-02T03:04:05"}
    (tmp_path / "test.lock").write_text(json.dumps(holder))
    with pytest.raises(Locked, match=word), locked(tmp_path / "test.lock", patience_s=0.1):
        pass
