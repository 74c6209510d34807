"""The files of a job folder, `jobs/<id>/` in a project."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from .. import files

#: Version of job.json, status.json and events.jsonl.
SCHEMA = 1


class JobKind(StrEnum):
    """What a job does. Import and advise need numpy and SimpleITK only."""

    IMPORT = "import"
    ADVISE = "advise"
    TRAIN = "train"
    PREDICT = "predict"
    EXPORT = "export"
    REPORT = "report"
    BUNDLE = "bundle"


@dataclass(frozen=True)
class JobFolder:
    """Names of everything in a job folder, and the reading and writing of its small files."""

    path: Path

    @classmethod
    def create(cls, jobs: Path, kind: JobKind, parameters: dict[str, Any], labels: list[dict[str, Any]]) -> JobFolder:
        """A new job with the next free number. Nothing runs yet.

        Args:
            jobs: the project's `jobs` folder.
            kind: what it does.
            parameters: every parameter, JSON-able.
            labels: the label table at this moment.

        Raises:
            FileNotFoundError: the project's folder is away.
        """
        jobs.mkdir(exist_ok=True)
        number = max([_number(one) for one in jobs.iterdir()], default=0) + 1
        while True:
            job = cls(jobs / f"{number:04d}-{kind}")
            try:
                if not any(_number(one) == number for one in jobs.iterdir()):
                    job.path.mkdir()
                    break
            except FileExistsError:
                pass
            number += 1
        spec = {
            "schema": SCHEMA,
            "id": job.id,
            "kind": str(kind),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "threads": usable_cores(),
            "deterministic": True,
            "parameters": parameters,
            "labels": labels,
        }
        files.write_json(job.path / "job.json", spec)
        return job

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def project(self) -> Path:
        return self.path.parent.parent

    @property
    def inputs(self) -> Path:
        return self.path / "inputs"

    @property
    def results(self) -> Path:
        return self.path / "results"

    @property
    def index(self) -> Path:
        return self.results / "index.json"

    @property
    def work(self) -> Path:
        """What the engine keeps between its stages: checkpoints, registrations, probabilities."""
        return self.path / "work"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def cancel_request(self) -> Path:
        return self.path / "cancel"

    @property
    def follower_failed(self) -> Path:
        """What went wrong in one of several processes that share the job, other than the first."""
        return self.path / "follower-failed.txt"

    def failure_of_follower(self) -> str:
        """Empty where none has failed."""
        return self.follower_failed.read_text(encoding="utf-8").strip() if self.follower_failed.exists() else ""

    def spec(self) -> dict[str, Any]:
        """job.json. Raises ValueError for one of a newer program."""
        value = dict(files.read_json(self.path / "job.json"))
        if value["schema"] > SCHEMA:
            raise ValueError(
                f"{self.path} has schema {value['schema']}, this program knows {SCHEMA}. Update SemiSAMO1."
            )
        return value

    def read_status(self) -> dict[str, Any] | None:
        """status.json, or None before there is one. Raises ValueError for a damaged one."""
        if not self.status.exists():
            return None
        value = files.read_json(self.status)
        if not isinstance(value, dict) or not {"state", "heartbeat"} <= set(value):
            raise ValueError(f"{self.status} is not the status of a job. Restore it from a copy or remove it.")
        return value

    def reached(self) -> float:
        """The largest fraction that the job was ever at, 0 to 1; 0 where nothing tells."""
        try:
            return float((self.read_status() or {}).get("reached", 0.0))
        except (OSError, TypeError, ValueError):
            return 0.0

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of the log."""
        if not self.log.exists():
            return ""
        with open(self.log, "rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - 20_000))
            text = stream.read().decode("utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def usable_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _number(path: Path) -> int:
    match = re.match(r"(\d+)-", path.name)
    return int(match[1]) if match else 0
