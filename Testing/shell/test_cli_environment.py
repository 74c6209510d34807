"""What trains in the shell's own process has the worker's environment: it starts itself anew with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from SemiSAMO1Lib import cli
from SemiSAMO1Lib.job.launcher import ALLOCATOR, WAITING

TORCHRUN, SRUN = {"TORCHELASTIC_RUN_ID": "none"}, {"SLURM_STEP_NUM_TASKS": "4"}


@pytest.fixture
def started_anew(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    found: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda _program, words, environment: found.append((words, environment)))
    for name in (*ALLOCATOR, *WAITING, *TORCHRUN, *SRUN, cli._ANEW):
        monkeypatch.delenv(name, raising=False)
    return found


def run(monkeypatch: pytest.MonkeyPatch, words: list[str], environment: dict[str, str]) -> None:
    monkeypatch.setattr(sys, "argv", ["semisamo1", *words])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "SemiSAMO1Lib.cli", *words])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cli._with_allocator_settings()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is that of Linux")
@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["reproduce", "--root", "data"], {}),
        (["train", "study"], TORCHRUN),
        (["train", "study"], SRUN),
        (["resume", "study"], TORCHRUN),
    ],
)
def test_what_trains_here_starts_anew(
    monkeypatch: pytest.MonkeyPatch, started_anew: Any, words: list[str], environment: dict[str, str]
) -> None:
    run(monkeypatch, words, environment)
    ((command, surroundings),) = started_anew
    assert command == [sys.executable, "-u", "-m", "SemiSAMO1Lib.cli", *words], "another Python, or other flags"
    assert {**ALLOCATOR, **WAITING}.items() <= surroundings.items()


class TestStartedSeveralTimes:
    def started(self, monkeypatch: pytest.MonkeyPatch, *words: str, count: str = "4") -> None:
        monkeypatch.setattr(sys, "argv", ["semisamo1", *words])
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", count)
        cli._require_shared_work()

    @pytest.mark.parametrize("command", ["reproduce", "apply", "simulate"])
    def test_what_is_not_shared_is_not_done_several_times(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
    ) -> None:
        """Each process would write the same files."""
        with pytest.raises(SystemExit) as ended:
            self.started(monkeypatch, command, "study")
        assert ended.value.code == 2 and "4 processes were started" in capsys.readouterr().err

    @pytest.mark.parametrize(("command", "count"), [("train", "4"), ("resume", "4"), ("reproduce", "1")])
    def test_the_rest_goes_on(self, monkeypatch: pytest.MonkeyPatch, command: str, count: str) -> None:
        self.started(monkeypatch, command, "study", count=count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is that of Linux")
def test_a_persons_own_way_of_waiting_is_kept(monkeypatch: pytest.MonkeyPatch, started_anew: Any) -> None:
    run(monkeypatch, ["train", "study"], {**TORCHRUN, "OMP_WAIT_POLICY": "ACTIVE"})
    assert started_anew[0][1]["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(
    ("words", "environment"),
    [(["train", "study"], {}), (["queue", "study"], TORCHRUN), (["train", "study"], {**TORCHRUN, cli._ANEW: "1"})],
    ids=["the worker trains", "nothing is trained", "it was started anew already"],
)
def test_all_else_goes_on(
    monkeypatch: pytest.MonkeyPatch, started_anew: Any, words: list[str], environment: dict[str, str]
) -> None:
    run(monkeypatch, words, environment)
    assert started_anew == []


#: Connects this process as NCCL's would be (with itself), then gives a command; an orderly end says so.
CONNECTED = """
import atexit, sys, torch
if {connected}:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method="file://{file}")
atexit.register(print, "an orderly end")
sys.argv = ["semisamo1", "status", "nowhere"]
{command}
main()
"""

#: The shell as it would be with an error that nobody expected.
FAILING = """
import SemiSAMO1Lib.shell
from SemiSAMO1Lib.cli import main
SemiSAMO1Lib.shell.app = lambda: 1 / 0
"""


@pytest.mark.parametrize("command", ["from SemiSAMO1Lib.cli import main", FAILING], ids=["refused", "an error"])
def test_one_of_several_connected_processes_ends_at_once(tmp_path: Path, command: str) -> None:
    """By NCCL an orderly end may wait for those that have left already."""

    def ended(connected: bool) -> tuple[int, str, bool]:
        code = CONNECTED.format(connected=connected, file=(tmp_path / "meeting").as_posix(), command=command)
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        lines = (found.stdout + found.stderr).splitlines()  # some releases of torch say that Gloo has connected
        said = [line for line in lines if line != "an orderly end" and not line.startswith("[Gloo]")]
        return found.returncode, said[-1], "an orderly end" in lines

    alone, one_of_several = ended(False), ended(True)
    assert alone[:2] == one_of_several[:2], "the code and the last word are the same"
    assert (alone[2], one_of_several[2]) == (True, False)
