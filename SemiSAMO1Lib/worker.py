"""The door for background jobs: `python -m SemiSAMO1Lib.worker JOBFOLDER`, or `worker.py --doctor | --probe`.

The worker writes its own pid, beats, tells what it does in events.jsonl, stops when the file `cancel` appears, and
leaves everything so that it can be resumed. `--doctor` needs nothing but the standard library.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from SemiSAMO1Lib.doctor import print_doctor


def main(arguments: list[str]) -> int:
    """Run one job, or the doctor. Returns the exit code: 0 finished, 1 failed, 3 stopped as asked."""
    if "--doctor" in arguments:
        print_doctor()
        return 0
    if "--probe" in arguments:
        from SemiSAMO1Lib.probe import print_probe

        named = arguments[arguments.index("--probe") + 1 :]
        return print_probe(named[0] if named else "auto")
    if not arguments or arguments[0].startswith("-"):
        print("usage: worker.py JOBFOLDER [--low-priority] | --doctor | --probe [DEVICE]", file=sys.stderr)
        return 2
    if not (Path(arguments[0]) / "job.json").is_file():
        print(f"{arguments[0]} is not a job folder: it has no job.json", file=sys.stderr)
        return 2
    from SemiSAMO1Lib.tasks import work

    return work(Path(arguments[0]), low_priority="--low-priority" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
