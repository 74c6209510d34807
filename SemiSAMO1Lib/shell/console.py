"""What all commands share: exit codes, errors as one clear line or as JSON, progress bars."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from .. import files
from ..image_io import UnreadableImage
from ..job import JobError, JobFolder, JobKind, Observed, State, observe, start
from ..job.tail import JobTail
from ..lock import Locked
from ..project import LabelError, ProjectError
from ..project.label_reader import DoubtfulLabel

#: Exit codes: 0 done, 1 the work failed, 2 wrong use or unusable input, 3 stopped as asked, 4 busy.
FAILED, WRONG_USE, STOPPED, BUSY = 1, 2, 3, 4

#: A volume that does not fit into this computer's memory.
NO_MEMORY = (
    "not enough memory on this computer for a volume of this size. Close other programs, crop or resample the scan, or "
    "work on a computer with more memory"
)

#: What is printed is what is meant: names and paths may hold brackets, which rich would take for colours.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, markup=False, emoji=False, highlight=False)

#: Arguments that most commands have.
ProjectPath = Annotated[Path, typer.Argument(help="The project folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]

P = ParamSpec("P")
R = TypeVar("R")


def say(value: Any, as_json: bool, text: str) -> None:
    """Print a result for machines or for people."""
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
    else:
        out.print(text, soft_wrap=True)


def fail(message: str, code: int) -> typer.Exit:
    """Print an error and give the exit to raise."""
    err.print(Text.assemble(("error:", "bold red"), f" {message}"), soft_wrap=True)
    return typer.Exit(code)


@contextmanager
def ending_as_ctrl_c() -> Iterator[None]:
    """Within it SIGTERM (`kill`, a time limit) ends a command as Ctrl+C does: what it started ends with it."""

    def stop(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        except (ProjectError, LabelError, UnreadableImage) as error:
            asked = " If it is, say so with --sure." if isinstance(error, DoubtfulLabel) else ""
            raise fail(f"{error}{asked}", WRONG_USE) from error
        except (NotADirectoryError, FileNotFoundError, IsADirectoryError, FileExistsError) as error:
            raise fail(_with_place(error), WRONG_USE) from error
        except json.JSONDecodeError as error:
            raise fail(f"not a JSON file: {error}", WRONG_USE) from error
        except ValueError as error:
            raise fail(_in_words(error), WRONG_USE) from error
        except PermissionError as error:
            raise fail(f"no permission: {_with_place(error)}", WRONG_USE) from error
        except OSError as error:
            raise fail(_with_place(error), FAILED) from error
        except MemoryError as error:
            raise fail(NO_MEMORY, FAILED) from error
        except KeyboardInterrupt:
            raise fail("stopped", STOPPED) from None
        except Exception as error:
            if os.environ.get("SEMISAMO1_TRACEBACK"):
                raise
            text = f"unexpected {type(error).__name__}: {error}. With SEMISAMO1_TRACEBACK=1 it says where; report it."
            raise fail(text, FAILED) from error

    return run


def _in_words(error: ValueError) -> str:
    """pydantic's ValidationError as one line that names parameter, fault and value; any other as it is."""
    details = getattr(error, "errors", None)
    if not callable(details):
        return str(error)
    faults = []
    for one in details(include_url=False):
        place = ".".join(map(str, one["loc"])) or "the parameters"
        if one["type"] == "extra_forbidden":
            faults.append(f"{place}: there is no such parameter")
        else:
            faults.append(f"{place}: {one['msg'].removeprefix('Value error, ')} (given: {one['input']!r})")
    return "; ".join(faults)


def _with_place(error: OSError) -> str:
    """An error of the file system without its number."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def existing_file(path: Path) -> Path:
    """The path, where it is a file. Raises FileNotFoundError in words."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is a folder; give one file' if path.is_dir() else 'does not exist'}")
    return path


def read_parameters(config: Path | None) -> dict[str, Any]:
    """The parameters that a JSON file gives; none without a file. Raises the exit for what is no JSON object."""
    found = files.read_json(existing_file(config)) if config is not None else {}
    if not isinstance(found, dict):
        raise fail(f'{config} must hold one JSON object, for example {{"rounds": 2}}', WRONG_USE)
    return found


def next_step(*words: object) -> str:
    """The command that comes next, quoted as a shell needs it."""
    return "Next: " + shlex.join(["semisamo1", *map(str, words)])


def counted(number: int, word: str) -> str:
    """A number with its word: one scan, two scans."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def follow(job: JobFolder, as_json: bool) -> Observed:
    """Watch a job until it ends: a progress bar on a terminal, a line a stage elsewhere, nothing for machines.

    Ctrl+C stops watching, not the job: it says how to stop that.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("{task.fields[eta]}"), console=err, disable=as_json or not err.is_terminal, transient=True
    ) as bars:
        bar = bars.add_task(job.id, total=1.0, eta="")
        stages, tail, told = Stages(hidden=as_json), JobTail(job), set[str]()
        try:
            while True:
                seen = observe(job)
                for event in tail.poll()[0]:  # not only when all is over: a scan may be brought back
                    text = f"left out {event.get('name')}: {event.get('reason')}"
                    if event["kind"] == "skipped" and text not in told and not as_json:
                        err.print(text, soft_wrap=True)
                        told.add(text)
                eta = "" if seen.eta_s is None else f"about {_duration(seen.eta_s)} left"
                bars.update(bar, completed=seen.fraction, description=f"{job.id}  {seen.stage}", eta=eta)
                stages.show(seen.stage, seen.fraction, eta)
                if not seen.state.active:
                    return seen
                time.sleep(0.3)
        except KeyboardInterrupt:
            watch, stop = (shlex.join(["semisamo1", word, str(job.project)]) for word in ("status", "cancel"))
            err.print(f"{job.id} goes on in the background. Watch it: {watch}; stop it: {stop}", soft_wrap=True)
            raise typer.Exit(STOPPED) from None


def run_job(job: JobFolder, as_json: bool) -> None:
    """Start a job, watch it to its end, and leave with the exit code of one that did not finish."""
    start(job)
    exit_for(job, follow(job, as_json))


def register(app: typer.Typer, examples: Mapping[Callable[..., None], str]) -> None:
    """Put commands into the shell, each with the example that its help ends with."""
    for command, example in examples.items():
        app.command(epilog=f"Example: {example}")(command)


class Stages:
    """Says each new stage on a line of its own where there is no terminal to draw a bar on."""

    def __init__(self, hidden: bool) -> None:
        self._quiet = hidden or err.is_terminal
        self._last = ""

    def show(self, stage: str, fraction: float, eta: str = "") -> None:
        name = re.sub(r" \d+/\d+$", "", stage)
        if self._quiet or name in ("", "finished", self._last):
            return
        self._last = name
        err.print(", ".join(filter(None, (name, f"{fraction:.0%} done", eta))), soft_wrap=True)


class Bar:
    """A progress bar for work in this process: an observer that draws on the terminal. Use as a context manager."""

    def __init__(self, title: str, hidden: bool) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=err, disable=hidden or not err.is_terminal, transient=True)
        self._title = title
        self._stages = Stages(hidden)
        self._bar = self._bars.add_task(title, total=1.0)

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def event(self, kind: str, **fields: Any) -> None:
        if kind == "warning" and type(self) is Bar:
            err.print(f"warning: {fields.get('text', '')}", soft_wrap=True)
        if kind == "progress":
            description = f"{self._title}  {fields['stage']} {fields['done']}/{fields['of']}"
            self._bars.update(self._bar, completed=fields.get("fraction"), description=description)
            self._stages.show(str(fields["stage"]), fields.get("fraction") or 0.0)

    def should_stop(self) -> bool:
        return False


def exit_for(job: JobFolder, seen: Observed) -> None:
    """Raise the exit that belongs to how a job ended; nothing for a finished one."""
    if seen.state is State.FINISHED:
        return
    if seen.stopped:
        again = f"go on with: {shlex.join(['semisamo1', 'resume', str(job.project), '--job', job.id])}"
        training = job.spec()["kind"] == JobKind.TRAIN
        raise fail(f"{job.id} was stopped; {again if training else 'give the command again'}", STOPPED)
    raise fail(f"{job.id} {seen.state}: {seen.message}", FAILED)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
