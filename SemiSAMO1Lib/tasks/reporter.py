"""The worker's side of the job folder: status, heartbeat, events, cancel request. Standard library only."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from .. import files, lock
from ..job.folder import SCHEMA, JobFolder
from ..job.watch import HEARTBEAT_S, State


class Reporter:
    """Tells the world what a job does; an observer for the engine. A context manager: the thread beats inside.

    Args:
        job: what is told of.
        together: the job is shared with the processes that torchrun or srun started with this one.
    """

    def __init__(self, job: JobFolder, together: bool = False) -> None:
        self.job, self.together = job, together
        self._lock = threading.Lock()
        self._stop_beating = threading.Event()
        self._started = time.monotonic()
        self._first_fraction: float | None = None
        self._before = job.reached()
        self._last_training_event = 0.0
        who = lock.identity()
        self._status: dict[str, Any] = {
            "schema": SCHEMA,
            "state": str(State.RUNNING),
            **{key: who[key] for key in ("pid", "process_start", "host", "user")},
            "stage": "starting",
            "fraction": 0.0,
            "reached": self._before,
            "eta_s": None,
            "message": "",
        }

    def __enter__(self) -> Reporter:
        files.mend_last_line(self.job.events)
        self._write()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_beating.set()
        self._thread.join()

    # ------------------------------------------------------------------ what the engine sees

    def event(self, kind: str, **fields: Any) -> None:
        """Append an event; 'progress' changes the status too; at most one 'losses' event a second."""
        if kind == "progress":
            self._progress(fields)
        elif kind == "losses" and fields["iteration"] != fields["of"]:
            now = time.monotonic()
            if now - self._last_training_event < 1:
                return
            self._last_training_event = now
        files.append_line(self.job.events, {"time": round(time.time(), 3), "kind": kind, **fields})
        if kind in ("note", "skipped", "warning"):
            print(f"{kind}: {fields}", flush=True)

    def should_stop(self) -> bool:
        return self.job.cancel_request.exists()

    # ------------------------------------------------------------------ what the worker says

    def handshake(self, **facts: Any) -> None:
        """The first event: who works, with which versions, on which device."""
        self.event("handshake", schema=SCHEMA, pid=self._status["pid"], host=self._status["host"], **facts)

    def end(self, state: State, message: str = "", stopped: bool = False) -> None:
        """The last word: status and an 'end' event."""
        self._stop_beating.set()
        with self._lock:
            self._status.update(state=str(state), message=message, stopped=stopped, eta_s=None)
            if state is State.FINISHED:
                self._status.update(fraction=1.0, stage="finished")
        self._write()  # first: on a full disk the event may fail, the status replaces a file of its own size
        self.event("end", state=str(state), message=message)

    # ------------------------------------------------------------------ inside

    def _progress(self, fields: dict[str, Any]) -> None:
        with self._lock:
            self._status["stage"] = f"{fields['stage']} {fields['done']}/{fields['of']}"
            fraction = fields.get("fraction")
            if fraction is None:
                return
            self._status["fraction"] = round(float(fraction), 4)
            if fraction < self._before:  # what a resumed job finds finished says nothing of its speed
                return
            self._status["reached"] = max(self._status["reached"], self._status["fraction"])
            if self._first_fraction is None:
                self._first_fraction = float(fraction)
                self._started = time.monotonic()
                return
            done = float(fraction) - self._first_fraction
            if done > 0.01:
                spent = time.monotonic() - self._started
                self._status["eta_s"] = round(spent * (1 - float(fraction)) / done, 1)

    def _beat(self) -> None:
        while not self._stop_beating.wait(HEARTBEAT_S):
            try:
                self._write()
            except OSError as error:  # a full disk, a network folder that is away: the next beat tries again
                print(f"no heartbeat: {error}", flush=True)

    def _write(self) -> None:
        with self._lock:
            self._status["heartbeat"] = time.time()
            files.write_json(self.job.status, self._status)


class Follower(Reporter):
    """Writes nothing but why it failed, and is asked to stop as the first process is. What went another way with its
    own cases is said where torchrun or srun puts it."""

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None: ...

    def event(self, kind: str, **fields: Any) -> None:
        if kind == "warning":
            print(f"{kind}: {fields}", flush=True)

    def end(self, state: State, message: str = "", stopped: bool = False) -> None:
        if state is State.FAILED:
            print(message, file=sys.stderr, flush=True)
            with open(self.job.log, "a", encoding="utf-8") as log:
                log.write(f"one of the processes failed: {message}\n")
            if not self.job.follower_failed.exists():  # what others meet then may come of it
                files.write_text(self.job.follower_failed, message + "\n")  # the first may not live to say it
