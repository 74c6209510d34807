"""Other processes on this computer: is it still the same one, start it apart from us, end it with its children.

Standard library only, on Linux, macOS and Windows. A process is known by its pid *and* its start time, because pids
are used again.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Windows process creation flags, named here because `subprocess` has them on Windows only.
CREATE_NEW_PROCESS_GROUP = 0x00000200
BELOW_NORMAL_PRIORITY_CLASS = 0x00004000
CREATE_NO_WINDOW = 0x08000000

_QUERY_LIMITED_INFORMATION = 0x1000
_STILL_ACTIVE = 259
_ACCESS_DENIED = 5


def host() -> str:
    """This computer's name."""
    return socket.gethostname()


def start_time(pid: int) -> float | None:
    """When process `pid` started, as a number that never changes during its life; None when there is none."""
    if pid <= 0:
        return None
    if sys.platform == "win32":
        return _start_time_windows(pid)
    if Path("/proc/self/stat").exists():
        return _start_time_linux(pid)
    return _start_time_ps(pid)


def is_same_process(pid: int, started: float | None) -> bool:
    """True when `pid` runs and is the process that started then (None: any process with that pid)."""
    now = start_time(pid)
    if now is None:
        return False
    return started is None or math.isnan(now) or abs(now - started) < 1.5


def launch_detached(command: Sequence[str], log: Path, environment: Mapping[str, str], low_priority: bool) -> int:
    """Start a process that outlives us, its output appended to `log`; returns the pid that the system gave.

    On Windows that may be a launcher's pid (PythonSlicer is one): the worker itself writes its own.
    """
    options: dict[str, Any] = detach_options(sys.platform, low_priority)
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            **options,
        )
    _LAUNCHED.append(process)
    return process.pid


def detach_options(platform: str, low_priority: bool) -> dict[str, Any]:
    """The `Popen` options that cut a child loose from us on the given `sys.platform`."""
    if platform == "win32":
        flags = CREATE_NO_WINDOW | CREATE_NEW_PROCESS_GROUP
        return {"creationflags": flags | (BELOW_NORMAL_PRIORITY_CLASS if low_priority else 0), "close_fds": True}
    return {"start_new_session": True, "close_fds": True}


def reap() -> None:
    """Take note of children that ended, so that they do not stay behind as zombies."""
    _LAUNCHED[:] = [process for process in _LAUNCHED if process.poll() is None]


def lower_priority() -> None:
    """Let other programs go first (POSIX; on Windows the launcher sets the priority class)."""
    if hasattr(os, "nice"):
        os.nice(5)


def kill_tree(pid: int, started: float | None) -> bool:
    """End a process and all its descendants at once; False when it is not that process any more."""
    if not is_same_process(pid, started):
        return False
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/PID", str(pid), "/T", "/F"], check=False, capture_output=True)
    else:
        for each in [*descendants(pid), pid]:
            try:
                os.kill(each, signal.SIGKILL)
            except ProcessLookupError:
                continue
    deadline = time.monotonic() + 10
    while is_same_process(pid, started) and time.monotonic() < deadline:
        reap()
        time.sleep(0.02)
    return True


def descendants(pid: int) -> list[int]:
    """All children, grandchildren... of a process (POSIX), deepest last."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents_linux() if Path("/proc/self/stat").exists() else _parents_ps():
        children.setdefault(parent, []).append(child)
    found: list[int] = []
    pending = [pid]
    while pending:
        pending = [child for parent in pending for child in children.get(parent, [])]
        found += pending
    return found


_LAUNCHED: list[subprocess.Popen[bytes]] = []


def _parents_linux() -> list[tuple[int, int]]:
    """(pid, parent's pid) of every process; small Linux systems have no ps."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [(pid, int(fields[1])) for pid in pids if (fields := _stat_linux(pid))]


def _parents_ps() -> list[tuple[int, int]]:
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], check=False, capture_output=True, text=True).stdout
    return [(int(pid), int(parent)) for pid, parent in map(str.split, listing.splitlines())]


def _stat_linux(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat behind the name: state, parent...; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _start_time_linux(pid: int) -> float | None:
    fields = _stat_linux(pid)
    if not fields or fields[0] in "ZX":  # a zombie has ended; nobody asked for its exit code yet
        return None
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _start_time_ps(pid: int) -> float | None:
    text = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    ).stdout.split()
    if not text or text[0].startswith("Z"):
        return None
    return time.mktime(time.strptime(" ".join(text[1:6]), "%a %b %d %H:%M:%S %Y"))


def _start_time_windows(pid: int) -> float | None:
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined,unused-ignore]
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = kernel.OpenProcess(_QUERY_LIMITED_INFORMATION, False, pid)
    if not handle:
        # refused: it lives, but belongs to somebody else, and when it started cannot be asked
        refused = ctypes.get_last_error() == _ACCESS_DENIED  # type: ignore[attr-defined,unused-ignore]
        return math.nan if refused else None
    handle = ctypes.c_void_p(handle)
    try:
        code = ctypes.c_ulong()
        if kernel.GetExitCodeProcess(handle, ctypes.byref(code)) and code.value != _STILL_ACTIVE:
            return None
        created, ended, in_kernel, in_user = (ctypes.c_ulonglong() for _ in range(4))
        times = (ctypes.byref(value) for value in (created, ended, in_kernel, in_user))
        if not kernel.GetProcessTimes(handle, *times):
            return None
        return created.value / 1e7  # 100 ns ticks since 1601
    finally:
        kernel.CloseHandle(handle)
