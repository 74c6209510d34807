"""A lock that is held for one write, and that a dead holder does not keep for ever."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from getpass import getuser
from pathlib import Path
from typing import Any

from . import processes

#: A lock file that is still empty after this many seconds was left by a process that died while making it.
_HALF_MADE_S = 2.0

#: So many seconds no two computers' clocks differ: a lock file that is older by its time is not watched first.
_SURELY_OLD_S = 30.0

_ON_WINDOWS = os.name == "nt"

#: A folder that refuses a new file for this many seconds without holding one of the name is not writable.
_REFUSED_S = 0.5


class Locked(RuntimeError):
    """Somebody else holds the lock; `holder` says who (host, user, pid, time)."""

    def __init__(self, path: Path, holder: dict[str, Any]) -> None:
        self.holder = holder
        who = f"{holder.get('user', 'somebody')} on {holder.get('host', 'an unknown computer')}"
        super().__init__(
            f"{path.parent} is being written by {who} (process {holder.get('pid', '?')}, since "
            f"{holder.get('time', '?')}). Wait for it; if that computer is off, remove {path.name} and try again."
        )


@contextmanager
def locked(path: Path, patience_s: float = 10.0) -> Iterator[None]:
    """Hold the lock file `path`.

    A lock whose process on this host is dead is taken over. A lock of another host is never broken here.

    Raises:
        Locked: it was not free within `patience_s` seconds.
        PermissionError: nothing can be written there.
    """
    began = time.monotonic()
    deadline = began + patience_s
    while not _take(path, began):
        holder = _holder(path)
        if holder is None and _was_left(path):
            holder = {}
        if holder is not None and _is_dead(holder) and _break(path, holder):
            continue
        if time.monotonic() > deadline:
            raise Locked(path, holder or {})
        time.sleep(0.02)
    _silent.pop(path, None)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def break_lock_of(path: Path, who: Mapping[str, Any]) -> None:
    """Remove the lock that this very process (host and pid) of another computer left; a person says that it has
    ended."""
    holder = _holder(path)
    if holder and all(holder.get(key) == who.get(key) for key in ("host", "pid")):
        _break(path, holder)


#: Lock files that say nothing: which file it was, and when it was first seen by this process.
_silent: dict[Path, tuple[tuple[int, int], float]] = {}


def _was_left(path: Path) -> bool:
    """Whether a lock file that says nothing was left so: it is old, or has been watched for long enough. Its time alone
    does not tell where it lies on another computer."""
    try:
        found, _ = path.stat(), path.read_bytes()
    except OSError:  # gone, or another account's that we may not read
        _silent.pop(path, None)
        return False
    now, which = time.monotonic(), (found.st_ino, found.st_mtime_ns)  # an inode is soon given to another file
    if path not in _silent or _silent[path][0] != which:
        _silent[path] = (which, now)
    return now - _silent[path][1] > _HALF_MADE_S or time.time() - found.st_mtime > _SURELY_OLD_S


def _take(path: Path, began: float) -> bool:
    """Whether the lock is ours now. `began`: when it was first asked for."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    except PermissionError:
        # Windows says so, too, while the old lock file is being deleted
        if _ON_WINDOWS and (path.exists() or time.monotonic() - began < _REFUSED_S):
            return False
        raise
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(identity(), stream)
    return True


def identity() -> dict[str, Any]:
    """Who we are, as written into locks and status files."""
    return {
        "pid": os.getpid(),
        "process_start": processes.start_time(os.getpid()),
        "host": processes.host(),
        "user": _user(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _user() -> str:
    try:
        return getuser()
    except (KeyError, OSError, ImportError):
        return "unknown"


def _holder(path: Path) -> dict[str, Any] | None:
    """What the lock says; {} for what is no lock's, None when it is gone or still being written."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, PermissionError, ValueError):
        return None
    return dict(holder) if isinstance(holder, dict) and "pid" in holder else {}


def _is_dead(holder: dict[str, Any]) -> bool:
    if not holder:
        return True
    if holder.get("host") != processes.host():
        return False
    return not processes.is_same_process(int(holder["pid"]), holder.get("process_start"))


def _break(path: Path, holder: dict[str, Any]) -> bool:
    """Remove a dead lock; False where it could not be, or is another one by now. Renamed first: of several processes
    that see it, one alone succeeds."""
    grave = path.with_name(f"{path.name}.dead-{os.getpid()}")
    try:
        os.replace(path, grave)
    except OSError:
        return False
    now = _holder(grave)
    if now is None:
        found = grave.stat()
        same = not holder and _silent.pop(path, (None,))[0] == (found.st_ino, found.st_mtime_ns)
    else:
        same = now == holder or _is_dead(now)
    if not same:
        os.replace(grave, path)  # it changed hands meanwhile: give it back
        return False
    grave.unlink(missing_ok=True)
    return True
