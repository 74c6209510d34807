"""A GPU: does it compute what the CPU computes, how long does a whole training take, is the GPU kept busy.

    python Testing/benchmarks/gpu.py agree
    python Testing/benchmarks/gpu.py run left_atrium --cases 80 --preset quick --rounds 3 --folder FOLDER

`agree` carries labels of phantoms with every generalist and trains with every learner, on the CPU and on the GPU, in
float32 and in the GPU's own precision. What is carried must be alike, or the command fails. Trainings draw dropout and
noise on their device and differ by chance: how far their answers and losses are apart is shown. `run` is the whole job
through project and worker: seconds of its stages, and the share of them in which a kernel was running (nvidia-smi, five
times a second); the template is the recommended scan. Results are scored against references that the job never saw.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cohorts import wait
from common import commit, keep, machine, reference_of, scans
from numpy.typing import NDArray
from one_label import mean, name_of, new_project, scored

from SemiSAMO1Lib import files
from SemiSAMO1Lib.choices import GENERALISTS, LEARNERS
from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase
from SemiSAMO1Lib.engine.config import make_config
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.evaluation.metrics import dice
from SemiSAMO1Lib.engine.further import FinishedRun
from SemiSAMO1Lib.engine.rounds import run
from SemiSAMO1Lib.job import JobFolder, start
from SemiSAMO1Lib.phantoms import LABELS, PhantomSettings, make_phantom
from SemiSAMO1Lib.project.advising import read_advice, request_advice
from SemiSAMO1Lib.project.training import request_training

#: Least Dice between what is carried on the CPU and on the GPU.
ALIKE = 0.99

#: A training of seconds. Grey values change a class or leave it as it is by a limit; they are left out, as in the tests
#: of several processes (docs/scaling.md).
TINY: dict[str, Any] = {
    "preset": "quick",
    "rounds": 1,
    "iterations": 12,
    "training_voxels": 30_000,
    "patch_voxels": 16_000,
    "filters": 8,
    "edge_weight": 0.0,
    "uncertainty_passes": 2,
    "generalists": {"checkpoint": "random", "architecture": "small"},
}

#: Seconds between two looks at the GPU.
LOOK_S = 0.2


# ---------------------------------------------------------------------- CPU and GPU


class Losses:
    """An observer that keeps the last losses."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def event(self, kind: str, **fields: Any) -> None:
        if kind == "warning":
            print("warning:", fields, flush=True)
        if kind == "losses":
            self.last = fields["losses"]

    def should_stop(self) -> bool:
        return False


class Trained:
    """A training of phantoms on one device: answers by round and case, that of a further scan, the last losses."""

    def __init__(self, device: str, **changes: Any) -> None:
        phantoms = [make_phantom(n, 1, PhantomSettings(spacing_mm=(3.5, 3.5, 3.5))) for n in range(6)]
        template = LabelledCase("template", phantoms[0].image, phantoms[0].label)
        cases = [EngineCase(p.name, p.image.geometry, lambda p=p: p.image) for p in phantoms[1:5]]  # type: ignore[misc]
        classes, config = 1 + len(LABELS), make_config(**{**TINY, **changes, "device": device})
        observer, began = Losses(), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder))
            results = list(run(cases, [template], classes, config, store, observer))
            self.rounds = [
                {one.case_id: one.prediction.array for one in results if one.round == number}
                for number in range(config.rounds + 1)
            ]
            self.further = FinishedRun([template], classes, config, store, observer).segment(phantoms[5].image)
        self.losses, self.seconds, self.classes = observer.last, time.perf_counter() - began, classes

    def alike(self, other: Trained, number: int) -> float:
        """Mean Dice of two trainings' answers, over cases and classes."""
        pairs = [(mine, other.rounds[number][case]) for case, mine in self.rounds[number].items()]
        return float(np.mean([_dice(*pair, self.classes) for pair in pairs]))

    def alike_further(self, other: Trained) -> float:
        return _dice(self.further.prediction.array, other.further.prediction.array, self.classes)


def _dice(one: NDArray[Any], other: NDArray[Any], classes: int) -> float:
    return float(np.mean([dice(one == value, other == value) for value in range(1, classes)]))


def agree(options: argparse.Namespace) -> None:
    """Every learner with registration, every other generalist with the mean teacher."""
    kinds = [(learner, "registration") for learner in LEARNERS]
    kinds += [("mean_teacher", generalist) for generalist in GENERALISTS if generalist != "registration"]
    kinds = [kind for kind in kinds if not options.only or set(kind) & set(options.only)]
    failed = []
    for learner, generalist in kinds:
        changes = {"learner": learner, "generalist": generalist}
        cpu, gpu = (Trained(device, precision="32-true", **changes) for device in ("cpu", options.device))
        own = Trained(options.device, **changes)
        found = {
            "carried": cpu.alike(gpu, 0),
            "float32": min(cpu.alike(gpu, 1), cpu.alike_further(gpu)),
            "own precision": min(cpu.alike(own, 1), cpu.alike_further(own)),
        }
        losses = {name: abs(gpu.losses[name] - value) for name, value in cpu.losses.items()}
        loss = max(losses.values()) / max(sum(map(abs, cpu.losses.values())), 1e-6)
        failed += [f"{learner}, {generalist}"] if not found["carried"] >= ALIKE else []
        row = {"benchmark": "gpu agree", **changes, **{what: round(value, 4) for what, value in found.items()}}
        row |= {"loss": round(loss, 4), "seconds": [round(one.seconds, 1) for one in (cpu, gpu, own)]}
        keep({**row, **_device()}, options.rows)
    if failed:
        raise SystemExit("what is carried differs between CPU and GPU: " + "; ".join(failed))


# ---------------------------------------------------------------------- a whole run


class Busy:
    """What nvidia-smi says of the GPU, with times."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the GPU, where there is one, until the block is left."""
        if shutil.which("nvidia-smi") is None:
            yield
            return
        asked = "--query-gpu=utilization.gpu,memory.used"
        command = ["nvidia-smi", asked, "--format=csv,noheader,nounits", f"--loop-ms={round(1000 * LOOK_S)}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            reader = threading.Thread(target=self._read, args=(process,), daemon=True)
            reader.start()
            try:
                yield
            finally:
                process.terminate()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None, "opened with a pipe"
        for line in process.stdout:
            share, mebibytes = (float(word) for word in line.split(","))
            self.seen.append((time.time(), share / 100, mebibytes / 1024))

    def between(self, begin: float, end: float) -> float | None:
        """Mean share of time in which a kernel ran."""
        found = [share for at, share, _ in self.seen if begin < at <= end]
        return float(np.mean(found)) if found else None

    @property
    def peak(self) -> float:
        """GiB in use at most."""
        return max((one for _, _, one in self.seen), default=0.0)


def stages(events: Path) -> list[tuple[str, float, float]]:
    """Name, begin and end of every stage of a job: a stage lasts from the last word of the one before."""
    found: list[tuple[str, float, float]] = []
    before = None
    for row in files.read_lines(events)[0]:
        before = before or row["time"]
        if row["kind"] != "progress":
            continue
        if found and found[-1][0] == row["stage"]:
            found[-1] = (row["stage"], found[-1][1], row["time"])
        else:
            found.append((row["stage"], found[-1][2] if found else before, row["time"]))
    return found


def prepared(options: argparse.Namespace) -> tuple[JobFolder, dict[str, Path]]:
    """The training, not yet begun, and the references of its cases."""
    folder = options.folder or Path(tempfile.mkdtemp())
    pool = scans(options.cohort, options.cases)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for scan in pool:
        shutil.copyfile(scan, images / scan.name)
    project = new_project(folder / "project", images)
    advice = request_advice(project)
    start(advice)
    wait(advice)
    template = read_advice(project)[0].case
    references = {name_of(scan): reference_of(scan) for scan in pool}
    project.add_label(template, references.pop(template))
    parameters = {name: getattr(options, name) for name in ("preset", "rounds", "device", "seed")}
    return request_training(project, {**parameters, "keep_rounds": True}), references


def whole_run(options: argparse.Namespace) -> None:
    job, references = prepared(options)
    busy, began = Busy(), time.time()
    with busy.watching():
        start(job)
        peak = wait(job)
    seconds = time.time() - began
    for stage, begin, end in stages(job.events):
        share = busy.between(begin, end)
        print(f"{stage}: {end - begin:.1f} s" + (f", GPU busy {share:.2f}" if share is not None else ""), flush=True)
    rounds = [(begin, end) for stage, begin, end in stages(job.events) if stage.startswith("training ")]
    shares = [busy.between(*one) for one in rounds]
    row: dict[str, Any] = {"benchmark": "gpu run", "cohort": options.cohort, "cases": options.cases}
    row |= {**job.spec()["parameters"], "commit": commit(), "seconds": round(seconds, 1)}
    row["training_s"] = [round(end - begin, 1) for begin, end in rounds]
    row["busy"] = [None if share is None else round(share, 3) for share in shares]
    row |= {"peak_GiB": round(peak / 2**30, 2), "peak_GPU_GiB": round(busy.peak, 2)}
    for number in range(options.rounds + 1):
        made = {case: job.results / str(number) / case / "prediction.seg.nrrd" for case in references}
        row[f"dice {number}"] = round(mean(scored(made, references)), 4)
    plan = files.read_json(job.work / "plan.json")
    row["plan"] = {name: plan[name] for name in ("spacing", "patch", "batch", "labelled", "precision")}
    keep({**row, **_device()}, options.rows)


def _device() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**machine(), "gpu": name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=Path)
    kinds = parser.add_subparsers(required=True)
    both = kinds.add_parser("agree")
    both.set_defaults(work=agree)
    both.add_argument("--only", nargs="*", help="learners and generalists; all when not given")
    whole = kinds.add_parser("run")
    whole.set_defaults(work=whole_run)
    whole.add_argument("cohort", choices=("hippocampus", "left_atrium"))
    whole.add_argument("--cases", type=int, default=80, help="scans, the template included")
    whole.add_argument("--preset", default="quick")
    whole.add_argument("--rounds", type=int, default=3)
    whole.add_argument("--seed", type=int, default=0)
    whole.add_argument("--folder", type=Path, help="keep the project here")
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
