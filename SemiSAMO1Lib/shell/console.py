"""What all commands share: exit codes, errors as one clear line or as JSON, progress bars."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..image_io import UnreadableImage
from ..job import JobError, JobFolder, Observed, State, observe
from ..lock import Locked
from ..project import LabelError, ProjectError

#: Exit codes: 0 done, 1 the work failed, 2 wrong use or unusable input, 3 stopped as asked, 4 busy.
FAILED, WRONG_USE, STOPPED, BUSY = 1, 2, 3, 4

out = Console()
err = Console(stderr=True)

P = ParamSpec("P")
R = TypeVar("R")


def say(value: Any, as_json: bool, text: str) -> None:
    """Print a result for machines or for people."""
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
    else:
        out.print(text, highlight=False, markup=False, soft_wrap=True)


def fail(message: str, code: int) -> typer.Exit:
    """Print an error and give the exit to raise."""
    err.print(f"[bold red]error:[/] {_plain(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(code)


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors into one line and an exit code; nobody is shown a traceback who did not ask for it."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except (JobError, Locked) as error:
            raise fail(str(error), BUSY) from error
        except (ProjectError, LabelError, UnreadableImage, NotADirectoryError, FileNotFoundError) as error:
            raise fail(str(error), WRONG_USE) from error
        except ValueError as error:  # pydantic's ValidationError too: it names field, value and limit
            raise fail(str(error), WRONG_USE) from error
        except PermissionError as error:
            raise fail(f"no permission: {error}", WRONG_USE) from error
        except OSError as error:
            raise fail(str(error), FAILED) from error
        except Exception as error:
            if os.environ.get("SEMISAMO1_TRACEBACK"):
                raise
            text = f"unexpected {type(error).__name__}: {error}. With SEMISAMO1_TRACEBACK=1 it says where; report it."
            raise fail(text, FAILED) from error

    return run


def follow(job: JobFolder, as_json: bool) -> Observed:
    """Watch a job until it ends, with a progress bar unless the output is for machines.

    Ctrl+C stops watching, not the job: it says how to stop that.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[eta]}"), console=err, disable=as_json, transient=True) as bars:
        bar = bars.add_task(job.id, total=1.0, eta="")
        try:
            while True:
                seen = observe(job)
                eta = "" if seen.eta_s is None else f"about {_duration(seen.eta_s)} left"
                bars.update(bar, completed=seen.fraction, description=f"{job.id}  {seen.stage}", eta=eta)
                if not seen.state.active:
                    return seen
                time.sleep(0.3)
        except KeyboardInterrupt:
            err.print(f"{job.id} goes on in the background. Watch it: semisamo1 status; stop it: semisamo1 cancel")
            raise typer.Exit(STOPPED) from None


class Bar:
    """A progress bar for work in this process: an observer that draws on the terminal. Use as a context manager."""

    def __init__(self, title: str, hidden: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=err, disable=hidden, transient=True)
        self._title = title
        self._bar = self._bars.add_task(title, total=1.0)

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def event(self, kind: str, **fields: Any) -> None:
        if kind == "progress":
            description = f"{self._title}  {fields['stage']} {fields['done']}/{fields['of']}"
            self._bars.update(self._bar, completed=fields.get("fraction"), description=description)

    def should_stop(self) -> bool:
        return False


def exit_for(job: JobFolder, seen: Observed) -> None:
    """Raise the exit that belongs to how a job ended; nothing for a finished one."""
    if seen.state is State.FINISHED:
        return
    if seen.stopped:
        raise fail(f"{job.id} was stopped; go on with: semisamo1 resume {job.project}", STOPPED)
    raise fail(f"{job.id} {seen.state}: {seen.message}", FAILED)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
