"""The door for people: `semisamo1 COMMAND ...` (typer and rich). Every command says with --help how it is used."""

from __future__ import annotations

import os
import sys
import traceback

#: Says that this process was started anew.
_ANEW = "SEMISAMO1_STARTED_ANEW"

#: Variables that torchrun or srun sets for the processes that it starts.
_TOGETHER = {"TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"}


def main() -> None:
    """Entry point of the console script; says what to install when the shell's own packages are missing."""
    try:
        from .shell import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"the shell needs {error.name}: pip install 'semisamo1[shell]'", file=sys.stderr)
        sys.exit(2)
    _require_shared_work()
    _with_allocator_settings()
    try:
        app()
    except BaseException as end:
        if not _connected():
            raise
        from .tasks.together import leave

        code = end.code if isinstance(end, SystemExit) else None
        if code is None:
            traceback.print_exc()
        leave(code if isinstance(code, int) else 1)  # in order it would wait for those that have left


def _connected() -> bool:
    """Whether this process is one of several that torch has connected. Does not import torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_available() and distributed.is_initialized())


def _require_shared_work() -> None:
    """Several processes that torchrun or srun started share a training; anything else each would do once more, into one
    folder."""
    if sys.argv[1:2] in (["train"], ["resume"]) or not _TOGETHER & set(os.environ):
        return
    from .engine.ranks import started_together

    if (count := started_together()[0]) > 1:
        print(f"{count} processes were started, and only train and resume share their work: start one", file=sys.stderr)
        sys.exit(2)


def _with_allocator_settings() -> None:
    """Start anew, with the worker's environment, what trains in this process: `reproduce`, and a
    training that torchrun or srun shares among several."""
    from .job.launcher import ALLOCATOR, WAITING

    started = _TOGETHER & set(os.environ)
    here = sys.argv[1:2] == ["reproduce"] or (sys.argv[1:2] in (["train"], ["resume"]) and started)
    if here and sys.platform.startswith("linux") and _ANEW not in os.environ:
        words = [sys.executable, *sys.orig_argv[1:]]  # a bare "python" might be found to be another one
        os.execve(sys.executable, words, {**WAITING, **os.environ, **ALLOCATOR, _ANEW: "1"})


if __name__ == "__main__":
    main()
