"""How well one labelled scan segments a cohort: the whole method beside what it has to beat, and beside its bound.

    python Testing/benchmarks/one_label.py run    left_atrium --folder FOLDER
    python Testing/benchmarks/one_label.py test   left_atrium --folder FOLDER
    python Testing/benchmarks/one_label.py bundle left_atrium --folder FOLDER
    python Testing/benchmarks/one_label.py table  left_atrium --folder FOLDER

Protocol. A cohort's sorted names are split into pool and test. A row sees the pool's scans and the template's label;
plan, statistics, neighbours and template choice use the pool alone, and the last weights are the result. `run` trains
and scores the pool (transductive), `test` applies every finished row once to the test scans (inductive), `bundle` does
the same with the networks alone, as the portable file has them; `table` shows all, with differences paired by case.
Every row is a file: a command that is cut short goes on where it stopped.

Templates: the one that the advisor recommends, then the first others by name. `--rows`, `--templates`, `--seeds` and
`--preset` choose what is run; `--rows parts` runs the whole method without each of its parts, `--ablation` adds a row
of other parameters. The test scans are for presets, and for one such row at most: with `--final` the one that was
chosen on the pool; from then on every other one is refused. Row `convexadam` needs convexAdam 0.2.0 (see
registration.py), and is left out without it. `left_atrium_80` is the published setting, but for its test scans, which
are not at hand: all 80 scans are the pool; `hippocampus_40` is a small pool, for parts and ablations. `all` does one
step after the other.

A row keeps the code's commit and its parameters; a table of rows that differ in them, or in the machine, says so.
Networks without registration see as many patches a step, and take as many steps, as the whole method does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from cohorts import wait
from common import SPLITS, commit, machine, reference_of, scans
from numpy.typing import NDArray

from SemiSAMO1Lib import files
from SemiSAMO1Lib.choices import PRESETS, STANDARD
from SemiSAMO1Lib.engine.config import BEFORE
from SemiSAMO1Lib.engine.data.grids import resample_labels
from SemiSAMO1Lib.engine.evaluation.paired import paired_difference
from SemiSAMO1Lib.image_io import read_geometry, read_volume, write_volume
from SemiSAMO1Lib.job import JobFolder, JobKind, start
from SemiSAMO1Lib.phantoms import PhantomSettings, write_cohort
from SemiSAMO1Lib.project import Project
from SemiSAMO1Lib.project.advising import read_advice, request_advice
from SemiSAMO1Lib.project.export import request_predictions
from SemiSAMO1Lib.project.training import request_training
from SemiSAMO1Lib.tasks.bundle import write_bundle
from SemiSAMO1Lib.tasks.compare import compare
from SemiSAMO1Lib.tasks.portable import segment_file
from SemiSAMO1Lib.volume import Geometry, Volume

#: Thick slices, five times as far apart as their voxels are wide, through a tilted head of the scanner.
THICK = PhantomSettings(spacing_mm=(4.0, 0.8, 0.8), spacing_variation=0.05, oblique_degrees=20.0)
#: Rows in the order in which they are run: one that sees as many patches as the whole method comes after it.
ROWS = ("ours", "registration", "detours", "voted", "edged", "supervised", "mt", "bound", "resized", "convexadam")

#: Parts of the method, taken away or changed one at a time: what each is worth. Key -> name in the table, changes.
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no-detours": ("without detours", {"detours": False}),
    "no-votes": ("without the votes of linked cases", {"neighbour_share": 0.0, "neighbour_gain": 0.0}),
    "no-grey": ("without grey values near borders", {"edge_weight": 0.0}),
    "no-labels-first": ("pseudo-labels in the first round, too", {"labels_first": False}),
    "no-volumes": ("classes of any volume", {"match_volumes": False}),
    "no-surroundings": ("a network's certainty of each voxel", {"certainty_around": 0.0}),
    "from-scratch": ("every round from scratch", {"warm_start": False}),
    "no-check": ("every new pseudo-label is taken", {"check_pseudo_labels": False}),
    "no-confidence": ("all voxels of pseudo-labels count alike", {"confidence_weights": False}),
    "soft": ("soft pseudo-labels", {"soft_pseudo_labels": True}),
}

#: Scores of one case by label value.
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Row:
    """One way of segmenting.

    Attributes:
        shown: its name in the table.
        changes: parameters of the training; None: there is no training.
        without: carries the template's label without a training: (template, its label, case) -> labels on the case.
        all_labels: every label of the pool is given: the upper bound.
        as_many_patches: labelled ones only, as many a step as the whole method sees of both kinds.
    """

    shown: str
    changes: dict[str, Any] | None = field(default_factory=dict)
    without: Callable[[Path, Path, Path], NDArray[Any]] | None = None
    all_labels: bool = False
    as_many_patches: bool = False


def resized(template: Path, label: Path, case: Path) -> NDArray[Any]:
    """The template's label, stretched over the case."""
    del template
    given, shape = read_volume(label), read_geometry(case).shape
    spacing = [n / m for n, m in zip(given.geometry.shape, shape, strict=True)]
    corner = [0.5 * s - 0.5 for s in reversed(spacing)]
    on_case = Geometry(shape, (spacing[0], spacing[1], spacing[2]), (corner[0], corner[1], corner[2]))
    return np.asarray(resample_labels(Volume(given.array, Geometry(given.geometry.shape)), on_case))


def by_convex_adam(template: Path, label: Path, case: Path) -> NDArray[Any]:
    """convexAdam with its defaults on the isotropic grid of `registration.py`, that of the finest spacing for other
    cohorts; the grid is wide enough for the whole template."""
    from registration import SPACING, convex_adam, prepared_pair

    spacing = SPACING.get(case.parent.parent.name, min(read_geometry(case).spacing))
    moving, carried, fixed, _ = prepared_pair(template, case, spacing, whole=True)
    found, _ = convex_adam(fixed, moving.array, carried.array, int(carried.array.max()) + 1)
    return np.asarray(resample_labels(Volume(found.astype(np.uint8), fixed.geometry), read_geometry(case)))


def alone(preset: str, **changes: Any) -> dict[str, Any]:
    """The network alone, without registration: as many iterations as all rounds of the preset."""
    settings = {**STANDARD, **PRESETS[preset]}
    steps = settings["rounds"] * settings["iterations"]
    nothing = {"propagation_share": 0.0, **BEFORE}
    return {"rounds": 1, "iterations": steps, **nothing, **changes}


def rows_for(preset: str) -> dict[str, Row]:
    supervised = alone(preset, learner="supervised_only")
    return {
        "resized": Row("template label resized", None, resized),
        "convexadam": Row("convexAdam 0.2.0", None, by_convex_adam),
        "registration": Row("registration alone", {"rounds": 0, **BEFORE}),
        "detours": Row("... and detours", {"rounds": 0, **BEFORE, "detours": True}),
        "voted": Row("registration, and the vote of like scans", {"rounds": 0, "edge_weight": 0.0}),
        "edged": Row("... and their grey values near borders", {"rounds": 0}),
        "supervised": Row("supervised only", supervised, as_many_patches=True),
        "mt": Row(
            "mean teacher, no pseudo-labels (half of its unlabelled patches lie where registration saw a label)",
            alone(preset, learner="mean_teacher", pseudo_weight=0.0),
        ),
        "ours": Row("SemiSAMO1"),
        "bound": Row("the same network, all labels of the pool", supervised, None, True, True),
        **{key: Row(f"SemiSAMO1, {shown}", changes) for key, (shown, changes) in PARTS.items()},
    }


@dataclass(frozen=True)
class Cohort:
    """The split of a cohort; `place` holds everything that is made."""

    name: str
    place: Path
    pool: list[Path]
    test: list[Path]

    @classmethod
    def of(cls, name: str, folder: Path) -> Cohort:
        pool, test = SPLITS[name]
        place = folder / name
        if name == "phantoms":
            if not (place / "made").exists():
                write_cohort(place, pool + test, settings=THICK)
                (place / "made").touch()
            found = sorted((place / "images").iterdir())
        else:
            found = scans(name)
        return cls(name, place, found[:pool], found[pool : pool + test])

    def copies(self, part: str) -> Path:
        """A folder with the scans of `pool` or `test` alone: no label is near them."""
        folder = self.place / part
        for scan in getattr(self, part):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / scan.name).exists():
                shutil.copyfile(scan, folder / scan.name)
        return folder

    def rows(self) -> list[dict[str, Any]]:
        """What was run, by name."""
        return [files.read_json(path) for path in sorted((self.place / "rows").glob("*.json"))]

    def templates(self, count: int) -> list[str]:
        """The recommended scan, then the first others by name."""
        kept = self.place / "advice.json"
        if not kept.exists():
            project = new_project(self.place / "advice", self.copies("pool"))
            job = request_advice(project)
            start(job)
            wait(job)
            files.write_json(kept, [one.case for one in read_advice(project)])
        best = files.read_json(kept)[0]
        return [best, *(name for scan in self.pool if (name := name_of(scan)) != best)][:count]


def name_of(scan: Path) -> str:
    return scan.name.split(".")[0]


def new_project(folder: Path, images: Path) -> Project:
    shutil.rmtree(folder, ignore_errors=True)
    project = Project.create(folder)
    job = JobFolder.create(project.jobs, JobKind.IMPORT, {"images": str(images)}, [])
    start(job)
    wait(job)
    project.refresh()
    return project


def scored(predictions: dict[str, Path], references: dict[str, Path]) -> Scores:
    found = compare(predictions, references, distances=False)
    return {row["case"]: {value: one["dice"] for value, one in row["labels"].items()} for row in found["cases"]}


@dataclass(frozen=True)
class Setting:
    """One line of work: a row with a template and a seed; its file, and its folder. `final`: other parameters than a
    preset's, chosen on the pool."""

    cohort: Cohort
    key: str
    row: Row
    preset: str
    template: str
    seed: int
    final: bool = False

    @property
    def name(self) -> str:
        return f"{self.key}-{self.preset}-{self.template}-{self.seed}"

    @property
    def file(self) -> Path:
        return self.cohort.place / "rows" / f"{self.name}.json"

    @property
    def folder(self) -> Path:
        return self.cohort.place / "projects" / self.name

    def run(self) -> None:
        """Segment the pool and write the row."""
        if self.file.exists():
            if (kept := files.read_json(self.file)["parameters"]) != self.row.changes:
                raise SystemExit(f"{self.file} was made with {kept}, not {self.row.changes}: give the row another name")
            return
        began = time.monotonic()
        peak, plan = 0, {}
        others = [scan for scan in self.cohort.pool if name_of(scan) != self.template]
        references = {name_of(scan): reference_of(scan) for scan in others}
        if self.row.changes is None:
            pool = self.carried(others)
        else:
            project = self.project()
            parameters = {"preset": self.preset, "seed": self.seed, **self.row.changes, **self.patches()}
            job = request_training(project, parameters)
            began = time.monotonic()
            start(job)
            peak = wait(job)
            plan = files.read_json(job.work / "plan.json")
            index = files.read_json(job.index)
            made = {row["case"]: job.results / row["prediction"] for row in index["cases"] if row["case"] in references}
            pool = scored(made, references) if not self.row.all_labels else {}
        minutes = (time.monotonic() - began) / 60
        row = {
            "cohort": self.cohort.name,
            "row": self.key,
            "preset": self.preset,
            "template": self.template,
            "seed": self.seed,
            "commit": commit(),
            "parameters": self.row.changes,
            "patches": plan["labelled"] + plan["batch"] if plan else None,
            "pool": pool,
            "test": None,
            "minutes": round(minutes, 1),
            "peak_GiB": round(peak / 2**30, 2),
            **machine(),
        }
        files.write_json(self.file, row)
        print(self.name, f"pool {mean(pool):.4f}" if pool else "", f"{minutes:.1f} min", flush=True)

    def patches(self) -> dict[str, int]:
        """Parameters of a row that sees as many patches a step as the whole method, whose row must be there."""
        if not self.row.as_many_patches:
            return {}
        ours = replace(self, key="ours").file
        if not ours.exists():
            raise SystemExit(f"{self.name} sees as many patches as {ours.stem}: run that row first")
        return {"labelled_batch": files.read_json(ours)["patches"]}

    def test(self) -> None:
        """Apply what was trained to the test scans, once."""
        row = files.read_json(self.file)
        if row["test"] is not None:
            return
        if self.final:
            chosen = {f"{one['row']} {one['preset']}" for one in self.cohort.rows() if one.get("final")}
            if chosen - {f"{self.key} {self.preset}"}:
                raise SystemExit(f"{', '.join(chosen)} was applied to the test scans: another row would be a choice")
            row["final"] = True
            files.write_json(self.file, row)
        if self.row.changes is None:
            scores = self.carried(self.cohort.test)
        else:
            output = self.cohort.place / "tested" / self.name  # not in the project
            shutil.rmtree(output, ignore_errors=True)
            job = request_predictions(Project(self.folder), self.cohort.copies("test"), output, "nrrd", "auto")
            start(job)
            wait(job)
            made = {name_of(scan): output / f"{name_of(scan)}.seg.nrrd" for scan in self.cohort.test}
            scores = scored(made, {name_of(scan): reference_of(scan) for scan in self.cohort.test})
        files.write_json(self.file, {**row, "test": scores, "test_commit": commit()})
        print(self.name, f"test {mean(scores):.4f}", flush=True)

    def bundle(self) -> None:
        """Segment the test scans with the trained networks alone, as one who was given the portable file does."""
        row, trained = files.read_json(self.file), self.row.changes is not None and self.row.changes.get("rounds") != 0
        if row.get("bundle") is not None or not trained or row["test"] is None or self.row.all_labels:
            return
        place = self.cohort.place / "bundles" / self.name
        write_bundle(Project(self.folder), place.with_suffix(".zip"))
        shutil.unpack_archive(place.with_suffix(".zip"), place.parent)
        made = {name_of(scan): place / "made" / f"{name_of(scan)}.seg.nrrd" for scan in self.cohort.test}
        for scan in self.cohort.test:
            segment_file(place, scan, made[name_of(scan)])
        row["bundle"] = scored(made, {name_of(scan): reference_of(scan) for scan in self.cohort.test})
        files.write_json(self.file, row)
        print(self.name, f"bundle {mean(row['bundle']):.4f}", flush=True)

    def carried(self, cases: Iterable[Path]) -> Scores:
        """Of a row without a training."""
        assert self.row.without is not None, "a row has a training or a way without"
        template = next(scan for scan in self.cohort.pool if name_of(scan) == self.template)
        made, references = {}, {}
        for case in cases:
            found = self.row.without(template, reference_of(template), case)
            path = self.folder / f"{name_of(case)}.nrrd"
            write_volume(path, Volume(found.astype(np.uint8), read_geometry(case)))
            made[name_of(case)], references[name_of(case)] = path, reference_of(case)
        return scored(made, references)

    def project(self) -> Project:
        """The pool with the template's label; for the upper bound with all labels, and a copy to be segmented."""
        images = self.cohort.copies("pool")
        if self.row.all_labels:
            images = self.cohort.place / "pool_and_copy"
            if not images.exists():
                shutil.copytree(self.cohort.copies("pool"), images)
                write_volume(images / "a_copy_to_segment.nrrd", read_volume(self.cohort.pool[0]))
        project = new_project(self.folder, images)
        by_name = {name_of(scan): scan for scan in self.cohort.pool}
        project.add_label(self.template, reference_of(by_name[self.template]))
        if self.row.all_labels:
            for name, scan in by_name.items():
                if name != self.template:
                    project.add_label(name, reference_of(scan))
        return project


def mean(scores: Scores) -> float:
    return float(np.mean(list(by_case(scores).values())))


def by_case(scores: Scores) -> dict[str, float]:
    return {case: float(np.mean(list(labels.values()))) for case, labels in scores.items()}


def table(cohort: Cohort, rows: dict[str, Row]) -> None:
    """Means over templates and seeds, their spread, and the whole method less each row, paired by case."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in cohort.rows():
        found.setdefault(f"{row['row']} {row['preset']}", []).append(row)
    print("row | templates, seeds | pool: mean ± standard deviation of the runs, worst case | test | minutes | GiB")
    for key, runs in found.items():
        cells = []
        for part in ("pool", "test"):
            scores = [run[part] for run in runs if run[part]]
            means = [mean(one) for one in scores]
            worst = min((value for one in scores for value in by_case(one).values()), default=float("nan"))
            spread = f" ± {np.std(means, ddof=1):.4f}" if len(means) > 1 else ""
            cells.append(f"{np.mean(means):.4f}{spread}, {worst:.3f}" if means else "")
            if scores and len(next(iter(scores[0].values()))) > 1:
                values = sorted(next(iter(scores[0].values())))
                cells[-1] += " (" + " ".join(f"{per_label(scores, value):.3f}" for value in values) + ")"
        minutes = np.mean([run["minutes"] for run in runs])
        peak = max(run["peak_GiB"] for run in runs)
        shown = rows[runs[0]["row"]].shown if runs[0]["row"] in rows else runs[0]["row"]
        counts = (len({run[what] for run in runs}) for what in ("template", "seed"))
        print(f"{shown} ({key}) | {', '.join(map(str, counts))} | {cells[0]} | {cells[1]} | {minutes:.1f} | {peak}")
        for what in ("commit", "parameters", "cpu", "cores"):
            kinds = sorted(_kinds(runs, what))
            if len(kinds) > 1:
                print(f"    these runs differ in {what}: {', '.join(kinds)}")
        if alone := [run for run in runs if run.get("bundle")]:
            with_votes, without = (over_runs([run[part] for run in alone]) for part in ("test", "bundle"))
            lost = paired_difference(with_votes, without)
            found_alone = np.mean([mean(run["bundle"]) for run in alone])
            text = f"    its networks alone, on the test scans: {found_alone:.4f}, less by {lost.mean:.4f}"
            print(f"{text} ({lost.low:.4f} to {lost.high:.4f})")
    print("intervals are over cases; what another template or seed would change is not in them")
    ours = {
        key: runs for key, runs in found.items() if key.startswith("ours ") or any(run.get("final") for run in runs)
    }
    for mine, my_runs in ours.items():
        for key, runs in found.items():
            if key == mine:
                continue
            for part in ("pool", "test"):
                first, second = averaged(my_runs, runs, part)
                if first and second:
                    one, by = paired_difference(first, second), "commit" if part == "pool" else "test_commit"
                    text = f"{mine} less {key}, {part}: {one.mean:+.4f} (95 %: {one.low:+.4f} to {one.high:+.4f})"
                    unlike = [what for what in ("cpu", by) if _kinds(my_runs, what) != _kinds(runs, what)]
                    print(text + (f"; these rows differ in {' and '.join(unlike)}" if unlike else ""))


def _kinds(runs: list[dict[str, Any]], what: str) -> set[str]:
    """What the runs of a row say of one fact."""
    return {json.dumps(run.get(what)) for run in runs}


def per_label(scores: list[Scores], value: str) -> float:
    return float(np.mean([labels[value] for one in scores for labels in one.values() if value in labels]))


def averaged(
    mine: list[dict[str, Any]], theirs: list[dict[str, Any]], part: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Each case's mean over the runs (template and seed) that both have; what was run for one seed alone, as it knows
    next to no chance, stands for all seeds of its template."""
    keys = [{(run["template"], run["seed"]): run for run in runs if run[part]} for runs in (mine, theirs)]
    for few, many in (keys, keys[::-1]):
        if {seed for _, seed in few} == {0}:
            few |= {key: few[key[0], 0] for key in many if (key[0], 0) in few}
    shared = sorted(set(keys[0]) & set(keys[1]))
    one, other = (over_runs([runs[key][part] for key in shared]) for runs in keys)
    return one, other


def over_runs(scores: list[Scores]) -> dict[str, float]:
    """Each case's mean over runs."""
    values: dict[str, list[float]] = {}
    for run in scores:
        for case, dice in by_case(run).items():
            values.setdefault(case, []).append(dice)
    return {case: float(np.mean(some)) for case, some in values.items()}


def chosen(options: argparse.Namespace, cohort: Cohort, parser: argparse.ArgumentParser) -> dict[str, Row]:
    """The rows that are asked for; `parser` says what is wrong with them."""
    rows = rows_for(options.preset)
    if options.ablation:
        name, changes = options.ablation.split("=", 1)
        return {name: Row(name, json.loads(changes))}
    keys = ["ours", *PARTS] if options.rows == "parts" else options.rows.split(",")
    if unknown := [key for key in keys if key not in rows]:
        parser.error(f"no rows {', '.join(unknown)}; there are: {', '.join(rows)}")
    if not cohort.test:
        keys = [key for key in keys if key != "bound"]  # nothing could be scored
    if "convexadam" in keys and importlib.util.find_spec("convexAdam") is None:
        print("convexAdam is not installed: its row is left out", flush=True)
        keys.remove("convexadam")
    return {key: rows[key] for key in keys}


def work(step: str, options: argparse.Namespace, cohort: Cohort, rows: dict[str, Row]) -> None:
    """`run`, `test` or `bundle` of rows, for every template and seed."""
    for number, template in enumerate(cohort.templates(options.templates)):
        for seed in range(options.seeds):
            for key, row in rows.items():
                chance = row.changes is not None and row.changes.get("rounds") != 0
                if (seed and not chance) or (row.all_labels and number):
                    continue  # nothing would differ, or next to nothing: the sample of voxels of an affine step
                setting = Setting(cohort, key, row, options.preset, template, seed, options.final)
                if step == "run":
                    setting.run()
                elif setting.file.exists():
                    setting.test() if step == "test" else setting.bundle()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("run", "test", "bundle", "table", "all"))
    parser.add_argument("cohort", choices=tuple(SPLITS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--preset", default="standard", choices=tuple(PRESETS))
    parser.add_argument("--rows", default=",".join(ROWS), help="or parts: the whole method without each of its parts")
    parser.add_argument("--ablation", metavar="NAME=JSON", help="a row of its own: ours with these parameters changed")
    parser.add_argument("--final", action="store_true", help="test: the ablation was chosen on the pool")
    parser.add_argument("--templates", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    cohort = Cohort.of(options.cohort, options.folder)
    rows = chosen(options, cohort, parser)
    if options.step in ("test", "bundle"):
        if not cohort.test:
            parser.error(f"{cohort.name} has no test scans")
        if (bool(options.ablation) or bool(set(rows) & set(PARTS))) != options.final:
            parser.error("an ablation is scored on the pool alone, unless it is the one that was chosen there: --final")
    if options.step != "all":
        steps = [options.step]
    else:  # parts and ablations stay on the pool
        apart = options.ablation or set(rows) & set(PARTS) or not cohort.test
        steps = ["run", "table"] if apart else ["run", "test", "bundle", "table"]
    for step in steps:
        if step == "table":
            table(cohort, {**rows_for(options.preset), **rows})
        else:
            work(step, options, cohort, rows)


if __name__ == "__main__":
    main()
