"""Small files that are either whole or absent: atomic writes, JSON, append-only lines. Standard library only."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

#: How long a replacement is tried again while a reader (on Windows) keeps the old file open, in seconds.
REPLACE_PATIENCE_S = 5.0

#: A list with more objects than this is written one object a line.
MANY = 20


def replace(temporary: Path, target: Path, patience_s: float = REPLACE_PATIENCE_S) -> None:
    """Put `temporary` in the place of `target` at once; retried while Windows refuses because of an open reader."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            os.replace(temporary, target)
            return
        except PermissionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary name in the target's folder; on success it is flushed and takes the target's place.

    The temporary name keeps all suffixes of the target, so that writers that look at them choose the same format.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    suffixes = "".join(target.suffixes[-2:])
    handle, name = tempfile.mkstemp(prefix=".writing-", suffix=suffixes, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, keys in the order given."""
    write_text(path, as_json(value) + "\n")


def as_json(value: Any) -> str:
    """JSON for people too: indented, but a long list of objects has one line an object (it is made far faster)."""
    dumps = partial(json.dumps, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, dict):
        return dumps(value, indent=2)
    rows = []
    for key, one in value.items():
        if isinstance(one, list) and len(one) > MANY and all(isinstance(each, dict) for each in one):
            inner = "[\n    " + ",\n    ".join(map(dumps, one)) + "\n  ]"
        else:
            inner = dumps(one, indent=2).replace("\n", "\n  ")  # line ends inside of strings are escaped
        rows.append(f"  {dumps(str(key))}: {inner}")
    return "{\n" + ",\n".join(rows) + "\n}" if rows else "{}"


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is an error that names the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Mend it, or restore it from a copy.") from error


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line in a single write, so that a reader sees it whole or not at all.

    Raises:
        OSError: it did not fit on the disk; the file is as it was.
    """
    line = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        before = os.fstat(descriptor).st_size
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, f"no room for another line in {path}")
    finally:
        os.close(descriptor)


def mend_last_line(path: Path) -> None:
    """Cut off a last line that a killed writer left without its end, so that the next append starts a line."""
    if not path.exists():
        return
    with open(path, "rb+") as stream:
        content = stream.read()
        if content and not content.endswith(b"\n"):
            stream.truncate(content.rfind(b"\n") + 1)


def read_lines(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Read the complete JSON lines from byte `offset` on; returns them and the offset to go on from."""
    if not path.exists():
        return [], offset
    with open(path, "rb") as stream:
        stream.seek(offset)
        content = stream.read()
    end = content.rfind(b"\n") + 1
    return [json.loads(line) for line in content[:end].splitlines() if line.strip()], offset + end


def is_there(path: Path) -> bool:
    """Whether something is there; False where it cannot be told: a share or disk that is away."""
    try:
        return Path(path).exists()
    except OSError:
        return False


def sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal text."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """Free space of the disk that holds `folder` (or the nearest parent that exists), in bytes."""
    import shutil

    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


#: Asked once: asking changes it for a moment, and several threads write files.
_UMASK = _umask()
