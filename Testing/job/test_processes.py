"""Other processes: the same one or not, started apart from us, ended with their children."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from job_helpers import wait_until

from SemiSAMO1Lib import processes

SLEEPER = "import time; time.sleep(60)"

#: A child that starts a grandchild, writes both pids and waits.
PARENT = (
    "import os, subprocess, sys, time;"
    f"child = subprocess.Popen([sys.executable, '-c', {SLEEPER!r}]);"
    "print(os.getpid(), child.pid, flush=True); time.sleep(60)"
)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER])
    yield process
    process.kill()
    process.wait()


def started(pid: int) -> float:
    found = processes.start_time(pid)
    assert found is not None, f"process {pid} should be running"
    return found


def test_the_start_time_never_changes(sleeper: subprocess.Popen[bytes]) -> None:
    first = started(sleeper.pid)
    time.sleep(0.3)
    assert started(sleeper.pid) == first


def test_the_start_time_is_the_same_for_every_observer(sleeper: subprocess.Popen[bytes]) -> None:
    code = f"from SemiSAMO1Lib import processes; print(processes.start_time({sleeper.pid}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(other.stdout) == started(sleeper.pid)


def test_a_later_process_has_a_later_start_time(sleeper: subprocess.Popen[bytes]) -> None:
    assert started(sleeper.pid) > started(os.getpid())


def test_an_ended_process_has_no_start_time() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert processes.start_time(ended.pid) is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no zombies")
def test_a_zombie_has_ended() -> None:
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: processes.start_time(zombie.pid) is None, "a child that nobody waited for counts as ended", 10)
    zombie.wait()


@pytest.mark.parametrize("pid", [0, -1])
def test_no_process_has_a_pid_below_one(pid: int) -> None:
    assert processes.start_time(pid) is None


def test_same_pid_and_start_is_the_same_process(sleeper: subprocess.Popen[bytes]) -> None:
    assert processes.is_same_process(sleeper.pid, started(sleeper.pid))


def test_same_pid_with_another_start_is_another_process(sleeper: subprocess.Popen[bytes]) -> None:
    assert not processes.is_same_process(sleeper.pid, started(sleeper.pid) - 5)


def test_without_a_start_time_the_pid_decides(sleeper: subprocess.Popen[bytes]) -> None:
    assert processes.is_same_process(sleeper.pid, None)


def test_a_name_with_brackets_and_spaces_does_not_confuse(tmp_path: Path) -> None:
    program = tmp_path / "a) Z 1 (b"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([str(program), "60"])
    try:
        assert processes.is_same_process(process.pid, None), "the name in /proc/<pid>/stat may hold anything"
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="ps is POSIX")
def test_ps_tells_the_start_time_too(sleeper: subprocess.Popen[bytes]) -> None:
    found = processes._start_time_ps(sleeper.pid)
    assert found is not None and abs(found - time.time()) < 10, f"the wall clock's time of the start, got {found}"


@pytest.mark.skipif(sys.platform == "win32", reason="ps is POSIX")
def test_ps_is_not_confused_by_the_users_language(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert processes._start_time_ps(sleeper.pid) is not None


@pytest.mark.skipif(sys.platform == "win32", reason="ps is POSIX")
def test_ps_knows_no_ended_process() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert processes._start_time_ps(ended.pid) is None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux has two ways, others one")
def test_ps_and_proc_tell_the_same_parents(sleeper: subprocess.Popen[bytes]) -> None:
    mine = (sleeper.pid, os.getpid())
    assert (mine in processes._parents_linux(), mine in processes._parents_ps()) == (True, True)


class FakeKernel:
    """kernel32 with one process: pid 42, created at `ticks`, with exit code `code`."""

    def __init__(self, ticks: int = 133_500_000_000_000_000, code: int = 259) -> None:
        self.closed: list[int | None] = []

        def open_process(access: int, inherit: bool, pid: int) -> int | None:
            assert access == 0x1000, "more rights than needed would be refused for processes of others"
            return 7 if pid == 42 else None

        def exit_code(handle: Any, result: Any) -> int:
            result._obj.value = code
            return 1

        def times(handle: Any, created: Any, *others: Any) -> int:
            assert len(others) == 3, "GetProcessTimes fills four times"
            created._obj.value = ticks
            return 1

        self.OpenProcess = open_process
        self.GetExitCodeProcess = exit_code
        self.GetProcessTimes = times
        self.CloseHandle = lambda handle: self.closed.append(handle.value)


def on_windows(monkeypatch: pytest.MonkeyPatch, kernel: FakeKernel, last_error: int = 87) -> None:
    monkeypatch.setattr(ctypes, "WinDLL", lambda *_, **__: kernel, raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: last_error, raising=False)
    monkeypatch.setattr(processes, "sys", SimpleNamespace(platform="win32"))


def test_windows_tells_the_creation_time_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    on_windows(monkeypatch, FakeKernel(ticks=133_500_000_000_000_000))
    assert processes.start_time(42) == 13_350_000_000.0


def test_windows_counts_a_process_of_somebody_else_as_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    on_windows(monkeypatch, FakeKernel(), last_error=5)
    assert processes.is_same_process(4711, 1.0), "access denied means that there is such a process"


def test_windows_knows_no_process_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    on_windows(monkeypatch, FakeKernel())
    assert processes.start_time(43) is None


def test_windows_knows_a_process_that_has_ended_but_is_still_held(monkeypatch: pytest.MonkeyPatch) -> None:
    on_windows(monkeypatch, FakeKernel(code=1))
    assert processes.start_time(42) is None


def test_windows_handles_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel()
    on_windows(monkeypatch, kernel)
    processes.start_time(42)
    assert kernel.closed == [7], "one handle was opened, so one is closed"


def test_windows_never_asks_by_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    on_windows(monkeypatch, FakeKernel())
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("os.kill(pid, 0) ends the process on Windows"))
    assert processes.is_same_process(42, 13_350_000_000.0)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_posix_children_get_a_session_of_their_own(platform: str) -> None:
    options = processes.detach_options(platform, low_priority=True)
    assert options["start_new_session"] is True and "creationflags" not in options


def test_windows_children_get_no_window_and_a_group_of_their_own() -> None:
    flags = processes.detach_options("win32", low_priority=False)["creationflags"]
    assert flags == 0x08000000 | 0x00000200, f"CREATE_NO_WINDOW | CREATE_NEW_PROCESS_GROUP, got {flags:#x}"


def test_windows_children_of_the_panel_run_below_normal() -> None:
    assert processes.detach_options("win32", low_priority=True)["creationflags"] & 0x00004000


def test_no_child_inherits_open_files() -> None:
    assert all(processes.detach_options(platform, False)["close_fds"] for platform in ("linux", "darwin", "win32"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lowers the priority when it starts a process")
def test_a_worker_lets_others_go_first() -> None:
    code = (
        "import os; from SemiSAMO1Lib import processes; before = os.nice(0);"
        "processes.lower_priority(); print(os.nice(0) - before)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(shown.stdout) > 0


def family() -> tuple[subprocess.Popen[str], int, int]:
    """A process with a child: (the process, its pid, the child's pid)."""
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    parent, child = (int(word) for word in process.stdout.readline().split())
    process.stdout.close()
    return process, parent, child


def gone(pid: int) -> bool:
    return processes.start_time(pid) is None


def test_kill_tree_ends_children_of_children() -> None:
    # another shell between us and the family: two generations below the process that is killed
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {PARENT!r}])"
    top = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert top.stdout is not None
    pids = [int(word) for word in top.stdout.readline().split()]
    top.stdout.close()
    processes.kill_tree(top.pid, started(top.pid))
    top.wait()
    wait_until(lambda: all(map(gone, pids)), f"child and grandchild {pids} ended", 10)


def test_kill_tree_says_that_it_did() -> None:
    process, parent, _ = family()
    assert processes.kill_tree(parent, started(parent)) is True
    process.wait()


def test_kill_tree_spares_a_process_that_only_has_the_pid(sleeper: subprocess.Popen[bytes]) -> None:
    assert processes.kill_tree(sleeper.pid, started(sleeper.pid) - 100) is False
    assert sleeper.poll() is None, "a process that came later must live"


def test_kill_tree_needs_no_other_program(monkeypatch: pytest.MonkeyPatch) -> None:
    process, parent, child = family()
    start = started(parent)
    if Path("/proc/self/stat").exists():  # small Linux systems have no ps
        monkeypatch.setenv("PATH", "/nowhere")
    processes.kill_tree(parent, start)
    process.wait()
    wait_until(lambda: gone(child), f"the child {child} ended", 10)


def test_a_detached_process_outlives_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from SemiSAMO1Lib import processes;"
        f"print(processes.launch_detached([sys.executable, '-c', {SLEEPER!r}], Path(sys.argv[1]), os.environ, False))"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "log.txt")]
    pid = int(subprocess.run(run, capture_output=True, text=True, check=True, timeout=30).stdout)
    assert processes.kill_tree(pid, started(pid)), "its parent has ended, it should have gone on"


def test_the_output_of_a_detached_process_is_appended_to_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("before\n", encoding="utf-8")
    code = "import sys; print('out'); sys.stdout.flush(); print('err', file=sys.stderr)"
    processes.launch_detached([sys.executable, "-c", code], log, os.environ, False)
    wait_until(lambda: "err" in log.read_text(encoding="utf-8"), "the output arrived", 20)
    assert log.read_text(encoding="utf-8").split() == ["before", "out", "err"]


def test_ended_children_leave_no_zombie(tmp_path: Path) -> None:
    processes.launch_detached([sys.executable, "-c", ""], tmp_path / "log.txt", os.environ, False)

    def reaped() -> bool:
        processes.reap()
        return not processes._LAUNCHED

    wait_until(reaped, "reap() took note of the ended child", 20)
