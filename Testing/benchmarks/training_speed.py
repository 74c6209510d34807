"""Our training loop against a plain loop that does what the released code does (plain_loop.py), seconds an iteration.

    python Testing/benchmarks/training_speed.py --iterations 20 --repetitions 5 --threads 2 --rows training_speed.jsonl
    python Testing/benchmarks/training_speed.py --learner dtc --side plain --side ours
    python Testing/benchmarks/training_speed.py --device cuda --data LAYOUT --patch 128 128 128 --iterations 100

Every run is a process of its own with its own environment; the sides alternate, one repetition of all after the other.
Ours is what `semisamo1 reproduce` runs with the published settings, stopped behind the first training round; its
registration is done once before and not timed. An iteration is everything from one batch to the next: reading,
sampling, step, checks, and the checkpoints that fall due. Both train on the same scans and pseudo-labels. The first
iterations of a run are not counted; its figure is the mean of the others, a side's figure the median of its runs. cpu_s
is the processor time of the process without its loaders: it shows whether other programs were in the way. The plain
loop has four loader processes on any machine, as released. Linux only.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import keep, layout, learn_from_round_0, machine
from plain_loop import train_plainly

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.config import TrainingConfig
from SemiSAMO1Lib.engine.data.hdf5_layout import write_case
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.observer import Silent, Stopped
from SemiSAMO1Lib.engine.planning import Plan
from SemiSAMO1Lib.engine.rounds import run
from SemiSAMO1Lib.job.launcher import ALLOCATOR, WAITING
from SemiSAMO1Lib.tasks.layout import read_layout
from SemiSAMO1Lib.tasks.protocol import Protocol
from SemiSAMO1Lib.volume import Volume


@dataclass(frozen=True)
class Side:
    """Whose loop, in which environment, in which precision."""

    ours: bool
    environment: dict[str, str] = field(default_factory=dict)
    precision: str = "32-true"


#: What is compared. The worker's environment is that of every background job.
SIDES = {
    "plain": Side(ours=False),
    "ours": Side(ours=True, environment={**ALLOCATOR, **WAITING}, precision="auto"),
    "ours-default-allocator": Side(ours=True, environment=WAITING, precision="auto"),
    "ours-float32": Side(ours=True, environment={**ALLOCATOR, **WAITING}),
    "plain-worker-allocator": Side(ours=False, environment=ALLOCATOR),
}

LEARNERS = ("mt", "uamt", "dtc")


class Clock:
    """Notes the time after every iteration; as an observer it ends a run behind its last training iteration."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.times: list[float] = []
        self.processor: list[float] = []
        self.losses: list[float] = []
        self.finished = False

    def tick(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.processor.append(time.process_time())

    def event(self, kind: str, **fields: Any) -> None:
        if kind == "warning":
            raise SystemExit(str(fields))  # a smaller patch, say: not what is to be measured
        if kind == "losses":
            self.losses.append(fields["losses"]["supervised"])
            self.finished = fields["iteration"] == fields["of"]
            if self.finished:
                self.tick()

    def should_stop(self) -> bool:
        """Asked after every iteration but the last, and before the prediction that follows."""
        if not self.finished:
            self.tick()
        return self.finished

    def seconds(self, warm_up: int) -> dict[str, float]:
        """Seconds an iteration, by the clock and of the processor: the mean over those after the warm-up."""
        named = {"seconds": self.times, "cpu_s": self.processor}
        return {name: (marks[-1] - marks[warm_up - 1]) / (len(marks) - warm_up) for name, marks in named.items()}


# ---------------------------------------------------------------------- preparation


def prepare(work: Path, options: argparse.Namespace) -> None:
    """The layout, the pseudo-labels by registration, and the same scans and pseudo-labels for the plain loop."""
    root = options.data or layout("hippocampus", options.cases, work / "layout")
    store = Store(work / "store")
    labelled, cases, class_map = read_layout(root, 1)
    config = _config(root, "mt", 0, 1, options, "32-true")
    for _ in run(cases, labelled, class_map.classes, config, store, Silent()):
        pass
    learn_from_round_0(Cohort(cases, labelled, Plan.model_validate(store.json("plan.json")), store), config)
    template = labelled[0]
    paths = [work / "plain" / f"{name}.h5" for name in (template.id, *(case.id for case in cases))]
    write_case(paths[0], template.image, template.label)
    for path, case in zip(paths[1:], cases, strict=True):
        write_case(path, case.load(), Volume(store.array("pseudo", "1", f"{case.id}.npy"), case.geometry))
    facts = {"root": str(root), "classes": class_map.classes, "plain": [str(path) for path in paths]}
    files.write_json(work / "facts.json", facts)


def _config(
    root: Path, learner: str, rounds: int, iterations: int, options: argparse.Namespace, precision: str
) -> TrainingConfig:
    """What `semisamo1 reproduce --generalist registration` trains with."""
    further = {"device": options.device, "precision": precision}
    protocol = Protocol(
        root, learner, rounds, iterations, tuple(options.patch), generalist="registration", further=further
    )
    return protocol.config()


# ---------------------------------------------------------------------- one run


def child(options: argparse.Namespace) -> None:
    """One run of one side in this process; the report is a JSON file."""
    torch.set_num_threads(options.threads)
    side, clock = SIDES[options.child], Clock(options.device)
    facts = files.read_json(options.folder / "facts.json")
    further = (_ours if side.ours else _plain)(side, facts, clock, options)
    if not all(map(math.isfinite, clock.losses)):
        raise SystemExit(f"{options.child}: a loss is not a number")
    report = {
        **clock.seconds(options.warm_up),
        "first_loss": clock.losses[0],
        "last_loss": clock.losses[-1],
        "peak_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        **further,
    }
    files.write_json(options.report, {key: _rounded(value) for key, value in report.items()})


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


def _ours(side: Side, facts: dict[str, Any], clock: Clock, options: argparse.Namespace) -> dict[str, Any]:
    root, iterations = Path(facts["root"]), options.warm_up + options.iterations
    labelled, cases, class_map = read_layout(root, 1)
    config = _config(root, options.learner[0], 1, iterations, options, side.precision)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        prepared = shutil.ignore_patterns("plan.json")  # depends on the learner's settings
        shutil.copytree(options.folder / "store", folder, dirs_exist_ok=True, ignore=prepared)
        store = Store(Path(folder))
        try:
            for _ in run(cases, labelled, class_map.classes, config, store, clock, completed=0):
                pass
        except Stopped:  # asked for by the clock, behind the training
            pass
        if len(clock.times) < iterations:
            raise SystemExit(f"ours: {len(clock.times)} iterations were seen, not {iterations}")
        for marks in (clock.times, clock.processor):  # stages before the training asked whether to stop, too
            del marks[:-iterations]
        _has_learned(store)
        return {"precision": store.json("plan.json")["precision"]}


def _has_learned(store: Store) -> None:
    """The running average begins as the student: they differ once the student has learned."""
    state = store.tensors("weights", "round-1.pt")["learner"]
    student, average = state["student"], state["teacher"]
    if not all(one.isfinite().all() for one in student.values()):
        raise SystemExit("ours: weights are not numbers")
    if all(torch.equal(student[name], average[name]) for name in average):
        raise SystemExit("ours: the weights did not change")


def _plain(side: Side, facts: dict[str, Any], clock: Clock, options: argparse.Namespace) -> dict[str, Any]:
    del side
    seen = []
    paths, patch = [Path(path) for path in facts["plain"]], tuple(options.patch)
    iterations, device = options.warm_up + options.iterations, torch.device(options.device)
    for iteration in train_plainly(options.learner[0], paths, facts["classes"], patch, iterations, device):
        clock.tick()
        clock.losses.append(iteration.supervised)
        seen.append(iteration)
    counted = seen[options.warm_up :]
    return {
        "precision": "32-true",
        "data_s": statistics.fmean(one.data_s for one in counted),
        "distances_s": statistics.fmean(one.distances_s for one in counted),
    }


# ---------------------------------------------------------------------- all runs


def measured(name: str, learner: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start one run as its own process and read its report."""
    report = options.folder / "report.json"
    report.unlink(missing_ok=True)
    numbers = ("--iterations", options.iterations, "--warm-up", options.warm_up, "--threads", options.threads)
    where = ("--folder", options.folder, "--report", report, "--device", options.device, "--patch", *options.patch)
    command = [sys.executable, __file__, "--child", name, "--learner", learner, *map(str, (*numbers, *where))]
    load = os.getloadavg()[0]
    done = subprocess.run(command, env=environment(name, options.threads), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {learner}:\n{done.stdout}{done.stderr}")
    return {**files.read_json(report), "load_before": round(load, 2)}


def environment(name: str, threads: int) -> dict[str, str]:
    """This process's environment with the side's settings, and without those that it must not have (Makefile)."""
    kept = {key: value for key, value in os.environ.items() if key not in {**ALLOCATOR, **WAITING}}
    count = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return {**kept, **count, **SIDES[name].environment}


def compare(learner: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All sides of a learner, alternating; a row for every run, then one for every side."""
    setting: dict[str, Any] = {"benchmark": "training_speed", "learner": learner, "device": options.device}
    setting |= {"threads": options.threads, "patch": list(options.patch), "iterations": options.iterations}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.side or SIDES}
    for repetition in range(options.repetitions):
        for name, found in runs.items():
            found.append(measured(name, learner, options))
            keep({**setting, "side": name, "repetition": repetition, **found[-1]}, options.rows)
    plain = runs.get("plain", [])
    rows = [{**setting, "side": name, **summary(found, plain), **_machine()} for name, found in runs.items()]
    for row in rows:
        keep(row, options.rows)
    return rows


def summary(found: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and extremes of a side's runs; how many times faster it is than the plain loop, if that ran too."""
    seconds = [one["seconds"] for one in found]
    facts = {"repetitions": len(found), "median_s": statistics.median(seconds)}
    facts |= {"from_s": min(seconds), "to_s": max(seconds), "precision": found[0]["precision"]}
    facts["cpu_s"] = statistics.median(one["cpu_s"] for one in found)
    if plain:
        facts["times_faster"] = statistics.median(one["seconds"] for one in plain) / facts["median_s"]
    facts["peak_GiB"] = max(one["peak_GiB"] for one in found)
    return {key: _rounded(value) for key, value in facts.items()}


def _machine() -> dict[str, Any]:
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {**machine(), **gpu}


def table(rows: list[dict[str, Any]]) -> str:
    """The sides' rows as Markdown."""
    lines = ["| learner | loop | precision | s an iteration | from - to | times faster |", "|---|---|---|---|---|---|"]
    for row in rows:
        spread = f"{row['from_s']:.3f} - {row['to_s']:.3f}"
        faster = f"{row['times_faster']:.2f}" if "times_faster" in row else ""
        cells = (row["learner"], row["side"], row["precision"], f"{row['median_s']:.3f}", spread, faster)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learner", action="append", choices=LEARNERS, help="repeatable; all when not given")
    parser.add_argument("--side", action="append", choices=SIDES, help="repeatable; all when not given")
    parser.add_argument("--iterations", type=int, default=20, help="timed ones of a run")
    parser.add_argument("--warm-up", type=int, default=3, help="iterations before them")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--patch", type=int, nargs=3, default=(48, 48, 48), help="(x, y, z) voxels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="folder of the HDF5 layout; default: scans of the hippocampus cohort")
    parser.add_argument("--cases", type=int, default=8, help="of the hippocampus cohort, the template included")
    parser.add_argument("--folder", type=Path, help="keep the prepared data here")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.warm_up, options.iterations, options.repetitions) < 1:
        parser.error("--warm-up, --iterations and --repetitions must be at least 1")
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        torch.set_num_threads(options.threads)
        prepare(options.folder, options)
        rows = [row for learner in options.learner or LEARNERS for row in compare(learner, options)]
    print(table(rows))


if __name__ == "__main__":
    main()
