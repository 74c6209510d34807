"""One `semisamo1 reproduce` run per learner on the same scans, measured by `semisamo1 test` on those without label.

    python Testing/benchmarks/learners.py --cases 20 --rounds 1 --iterations 250 --patch 48 48 48 --rows learners.jsonl

The first scan of the hippocampus cohort by name is the template. Runs that are in --rows already are not repeated.
SemiSAM and SemiSAM+ get a randomly initialised SAM-Med3D of the small configuration: their mechanism runs, no accuracy
is claimed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import keep, layout, machine

LEARNERS = ("supervised", "pseudo", "mt", "uamt", "dan", "dtc", "semisam", "semisam-uamt", "semisam+")

#: The published SGD does not leave the background within some hundred steps (docs/experiments.md). Mirrored or turned,
#: the two labels, front and back of the hippocampus, look alike. The default network is much faster than unet_3d.
SHORT = {
    "optimizer": "adamw",
    "learning_rate": 0.005,
    "specialist": "dynunet",
    "augmentation": {"mirror": False, "quarter_turns": False, "rotation_degrees": 15, "scale": 0.15, "elastic_mm": 3},
}

RANDOM_SMALL = {"generalists": {"checkpoint": "random", "architecture": "small"}, "pseudo_weight": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learner", action="append", choices=LEARNERS, help="repeatable; all when not given")
    parser.add_argument("--cases", type=int, default=20, help="scans, the template included")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=250)
    parser.add_argument("--patch", type=int, nargs=3, default=(48, 48, 48))
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    root = layout("hippocampus", options.cases, folder / "layout")
    for learner in options.learner or LEARNERS:
        if not _done(learner, options):
            keep({**_run(learner, root, folder, options), **machine()}, options.rows)


def _done(learner: str, options: argparse.Namespace) -> bool:
    if options.rows is None or not options.rows.exists():
        return False
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    asked = {key: getattr(options, key) for key in ("seed", "cases", "rounds", "iterations", "patch")}
    return any(all(row.get(key) == value for key, value in {"learner": learner, **asked}.items()) for row in rows)


def _run(learner: str, root: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    config = folder / f"{learner}.json"
    config.write_text(json.dumps({**SHORT, **(RANDOM_SMALL if learner.startswith("semisam") else {})}))
    output = folder / f"{learner}-{options.seed}"
    began = time.monotonic()
    length = ("--rounds", options.rounds, "--iterations", options.iterations, "--patch", *options.patch)
    data = ("--root", root, "--generalist", "registration", "--output", output, "--device", options.device)
    _semisamo1("reproduce", *data, *length, "--learner", learner, "--seed", options.seed, "--config", config)
    minutes = (time.monotonic() - began) / 60
    row: dict[str, Any] = {"benchmark": "learners", "learner": learner, "seed": options.seed, "cases": options.cases}
    row |= {"rounds": options.rounds, "iterations": options.iterations, "patch": options.patch}
    for number in range(1, options.rounds + 1):
        weights = output / "weights" / f"round-{number}.pth"
        measured = _semisamo1("test", "--root", root, "--weights", weights, "--device", options.device)
        row[f"round {number}"] = {
            name: {key: round(value, 4) for key, value in measured[name].items()}
            for name in ("dice", "jaccard", "hd95_voxels", "asd_voxels")
        }
    return {**row, "minutes": round(minutes, 2)}


def _semisamo1(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "SemiSAMO1Lib.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    main()
