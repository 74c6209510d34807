"""How fast every part is: beside what it has to beat, and beside the least time that its operations need here.

    python Testing/benchmarks/speed.py
    python Testing/benchmarks/speed.py --part registration --part training --repetitions 9 --rows speed.jsonl
    python Testing/benchmarks/speed.py --device cuda --part training --part inference

Phantoms, so that it runs anywhere; what is compared is done in turn, and ratios are medians of what was measured side
by side. *Times the floor*: seconds beside the larger of two least times (roofline.py), FLOPs at the rate of a matrix
product and bytes at the rate of a copy, both measured at the beginning. The environment is that of the worker. Rows of
convexAdam need `python -m pip install --no-deps convexAdam==0.2.0 nibabel scikit-learn`.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import keep, learn_from_round_0, loaded, machine
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule
from monai.data.utils import dense_patch_slices
from monai_loop import MonaiLoop
from roofline import Floor, Rates, floor_of, in_turn, median_ratio
from torch import Tensor, nn

from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.config import TrainingConfig, make_config
from SemiSAMO1Lib.engine.data.grids import resample_image
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.devices import make_fabric
from SemiSAMO1Lib.engine.generalists.mind_features import MindFeatures
from SemiSAMO1Lib.engine.generalists.sam_med3d.generalist import SamMed3DPrompts, load_model
from SemiSAMO1Lib.engine.inference.sliding import predict_probabilities
from SemiSAMO1Lib.engine.inference.uncertainty import to_case_grid
from SemiSAMO1Lib.engine.learners import Batch, Learner, learner_named
from SemiSAMO1Lib.engine.observer import Silent
from SemiSAMO1Lib.engine.planning import Plan
from SemiSAMO1Lib.engine.propagation.deformable import Settings, register
from SemiSAMO1Lib.engine.propagation.descriptors import describe
from SemiSAMO1Lib.engine.propagation.links import Link, Linker, carried
from SemiSAMO1Lib.engine.propagation.registration import FINEST_BELOW, RegistrationPropagator
from SemiSAMO1Lib.engine.propagation.starts import affines, translations
from SemiSAMO1Lib.engine.rounds import run
from SemiSAMO1Lib.engine.sampling import PatchSource, drawing_threads, drawn_ahead
from SemiSAMO1Lib.engine.specialists import make_specialist
from SemiSAMO1Lib.engine.specialists.dropout import dropped_by
from SemiSAMO1Lib.job.launcher import ALLOCATOR, WAITING
from SemiSAMO1Lib.phantoms import LABELS, Phantom, PhantomSettings, make_phantom
from SemiSAMO1Lib.volume import Geometry, Volume

CLASSES = len(LABELS) + 1

#: Phantoms of about 92 × 70 × 44 voxels (x, y, z).
SCAN = PhantomSettings(
    extent_mm=(138.0, 105.0, 66.0), spacing_mm=(1.5, 1.5, 1.5), spacing_variation=0.0, oblique_degrees=0.0
)
#: ... that are nowhere smaller than that.
LARGER = replace(SCAN, extent_mm=(150.0, 115.0, 72.0))

#: The scan that is segmented, (z, y, x) on the working grid; its own grid is finer by this factor.
INFERENCE, FINER = (128, 192, 192), 1.1

#: Channels beside each other in memory.
LAST = torch.channels_last_3d

LEARNERS = (
    "supervised_only",
    "pseudo_only",
    "mean_teacher",
    "uncertainty_mean_teacher",
    "adversarial",
    "dual_task",
    "semisam",
    "semisam_uncertainty",
    "semisam_plus",
)


@dataclass
class Bench:
    """What all parts need; `say` prints a row, and keeps it."""

    device: torch.device
    rates: Rates
    repetitions: int
    rows: Path | None
    printed: list[dict[str, Any]] = field(default_factory=list)

    def say(
        self,
        part: str,
        what: str,
        seconds: list[float],
        floor: Floor | None = None,
        against: str = "",
        ratio: float | None = None,
        asked: str = "",
    ) -> None:
        row: dict[str, Any] = {"benchmark": "speed", "part": part, "what": what}
        row["median_s"] = round(statistics.median(seconds), 4)
        row["from_s"], row["to_s"] = round(min(seconds), 4), round(max(seconds), 4)
        if floor is not None:
            row |= {"flops_floor_s": round(floor.flops_s, 4), "bytes_floor_s": round(floor.bytes_s, 4)}
            row["times_the_floor"] = round(row["median_s"] / max(floor.seconds, 1e-9), 2)
        if ratio is not None:
            row |= {"against": against, "ratio": round(ratio, 2)}
        if asked:
            row["asked"] = asked
        self.printed.append(row)
        keep({**row, **machine()}, self.rows)

    def time(self, actions: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        return in_turn(actions, self.device, self.repetitions)


# ---------------------------------------------------------------------- registration, features


def cropped(phantom: Phantom, shape: tuple[int, int, int]) -> Phantom:
    """The first voxels along each axis."""
    box = tuple(slice(n) for n in shape)
    geometry = replace(phantom.image.geometry, shape=shape)
    return replace(
        phantom, image=Volume(phantom.image.array[box], geometry), label=Volume(phantom.label.array[box], geometry)
    )


def registration(bench: Bench) -> None:
    """One scan registered to a template; descriptors of both included."""
    template, case = (cropped(make_phantom(number, 0, LARGER), (44, 70, 92)) for number in (0, 1))
    spacing = SCAN.spacing_mm[0]

    def described() -> list[Any]:
        finest = case.image.geometry.voxels < FINEST_BELOW
        return [describe(one.image, spacing, bench.device, finest) for one in (case, template)]

    @torch.no_grad()
    def one_start() -> None:
        here, there = described()
        starts = translations(here, there)[:1]
        found = affines(here, there, starts, 0) or starts
        register(here, there, found[0].matrix, Settings())

    @torch.no_grad()
    def deformable() -> None:
        here, there = described()
        register(here, there, translations(here, there)[0].matrix, Settings())

    def all_starts() -> None:
        propagator = RegistrationPropagator(spacing, CLASSES, bench.device)
        atlases = propagator.prepare([LabelledCase("template", template.image, template.label)])
        propagator.propagate(atlases, case.image, case.image.geometry)

    actions: dict[str, Callable[[], object]] = {
        "one start, without its affine step": deformable,
        "one start, with its affine step": one_start,
    }
    actions["all starts, judged and fused"] = all_starts
    if importlib.util.find_spec("convexAdam"):
        from registration import by_convex_adam

        moving = resample_image(template.image, case.image.geometry)  # convexAdam wants both on one grid
        actions["convexAdam 0.2.0"] = lambda: by_convex_adam(case.image, moving)
    times = bench.time(actions)
    for name, action in actions.items():
        theirs = times.get("convexAdam 0.2.0")
        ratio = None if theirs is None else median_ratio(times[name], theirs)
        asked = "<= 3 s" if name == "one start, with its affine step" else ""
        floor = floor_of(action, bench.rates)
        bench.say("registration", name, times[name], floor, "convexAdam 0.2.0", ratio, asked)


def links(bench: Bench) -> None:
    """A case with those that look most like it: once registered with each, and what they say, which each round asks."""
    names = ("case", "a", "b", "c", "d", "e")
    phantoms = {name: make_phantom(number, 0, SCAN) for number, name in enumerate(names)}
    spacing, grid = SCAN.spacing_mm[0], phantoms["case"].image.geometry
    linker = Linker(spacing, bench.device)
    others = names[1:]

    def linked() -> list[Link]:
        for name in names:
            linker.forget(name)
        return linker.links("case", others, lambda name: phantoms[name].image, lambda _: np.eye(4))

    found = linked()
    own = {name: one.label for name, one in phantoms.items()}

    def said_by(name: str, value: int) -> Volume:
        return Volume(own[name].array == value, own[name].geometry)

    def known_by(name: str) -> Volume:
        return Volume(np.ones(own[name].geometry.shape, bool), own[name].geometry)

    actions: dict[str, Callable[[], Any]] = {
        f"{len(others)} links of a case": linked,
        f"the vote of {len(others)} links, {CLASSES} classes": lambda: carried(
            found, said_by, known_by, grid, CLASSES, bench.device
        ),
    }
    times = bench.time(actions)
    for name, action in actions.items():
        with torch.no_grad():
            bench.say("links", name, times[name], floor_of(action, bench.rates))


def features(bench: Bench) -> None:
    """What a scan's features cost: self-similarity, and SAM-Med3D's encoder with random weights."""
    scan = make_phantom(1, 0, SCAN).image
    mind = MindFeatures(SCAN.spacing_mm[0], bench.device)
    encoder = load_model("random", "full").model.image_encoder.eval().requires_grad_(False).to(bench.device)
    block = torch.randn(1, 1, 128, 128, 128, device=bench.device)
    actions = {
        "MIND of a scan": lambda: mind.features(scan),
        "SAM-Med3D's encoder, 128³, float32": lambda: encoder(block),
    }
    with torch.inference_mode():
        times = bench.time(actions)
    for name, action in actions.items():
        with torch.no_grad():
            bench.say("features", name, times[name], floor_of(action, bench.rates))


# ---------------------------------------------------------------------- training


@dataclass
class Pass:
    """One pass of a network in a step."""

    network: nn.Module
    inputs: tuple[Any, ...]
    named: dict[str, Any]
    with_gradient: bool
    learns: list[bool]

    @property
    def samples(self) -> int:
        """Rows of the batch, which dropout is drawn for."""
        return next((len(one) for one in self.inputs if isinstance(one, Tensor)), 0)


class Passes:
    """The network passes of a step, repeated bare: forward in the same precision, and backward from a plain sum."""

    def __init__(self, learner: Learner, batch: Batch, fabric: Fabric) -> None:
        self.fabric = fabric
        self.found: list[Pass] = []
        self._inside = 0
        learner.step(batch, 0.5, torch.Generator().manual_seed(0))  # what is loaded when first asked is there now
        networks = _networks(learner)
        hooks = [one.register_forward_pre_hook(self._before, with_kwargs=True) for one in networks]
        hooks += [one.register_forward_hook(self._after, always_call=True) for one in networks]
        learner.step(batch, 0.5, torch.Generator().manual_seed(0))
        for hook in hooks:
            hook.remove()

    def _before(self, network: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._inside += 1
        if self._inside == 1:  # a network inside of a network belongs to its pass
            kept = tuple(_copied(one) for one in inputs), {name: _copied(one) for name, one in named.items()}
            learns = [one.requires_grad for one in network.parameters()]
            self.found.append(Pass(network, *kept, torch.is_grad_enabled(), learns))

    def _after(self, network: nn.Module, inputs: Any, output: Any) -> None:
        del network, inputs, output
        self._inside -= 1

    def __call__(self) -> None:
        total: list[Tensor] = []
        for one in self.found:
            for parameter, learns in zip(one.network.parameters(), one.learns, strict=True):
                parameter.requires_grad_(learns)
            rows = [torch.Generator(self.fabric.device) for _ in range(one.samples)]
            with torch.set_grad_enabled(one.with_gradient), self.fabric.autocast(), dropped_by(rows):
                output = one.network(*one.inputs, **one.named)
            if one.with_gradient:
                outputs = output if isinstance(output, tuple | list) else (output,)
                total += [part.float().sum() for part in outputs if part.requires_grad]
        if total:
            self.fabric.backward(torch.stack(total).sum())
        for one in self.found:
            one.network.zero_grad(set_to_none=True)


def _copied(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _networks(learner: Learner) -> list[nn.Module]:
    """The networks that a learner holds, with and without what Fabric puts around them, and those that it asks."""
    held = [one for value in vars(learner).values() for one in (value if isinstance(value, list) else [value])]
    own = [one for one in held if isinstance(one, nn.Module)]
    asked = [part for one in held if isinstance(one, SamMed3DPrompts) for part in one.model.children()]
    return [*own, *(one.module for one in own if isinstance(one, _FabricModule)), *asked]


@contextmanager
def prepared(bench: Bench, scan: PhantomSettings = SCAN, **changes: Any) -> Iterator[tuple[Cohort, TrainingConfig]]:
    """A small cohort of phantoms with the pseudo-labels of the registration."""
    phantoms = [make_phantom(number, 0, scan) for number in range(4)]
    labelled = [LabelledCase("template", phantoms[0].image, phantoms[0].label)]
    cases = [EngineCase(one.name, one.image.geometry, partial(loaded, one.image)) for one in phantoms[1:]]
    config = make_config("standard", device=str(bench.device), rounds=0, **changes)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        for _ in run(cases, labelled, CLASSES, config, store, Silent()):
            pass
        plan = Plan.model_validate(store.json("plan.json"))
        cohort = Cohort(cases, labelled, plan, store)
        learn_from_round_0(cohort, config)
        yield cohort, config


def training(bench: Bench) -> None:
    """Every learner's step beside its bare passes; the time of a batch."""
    sam: dict[str, Any] = {"generalists": {"checkpoint": "random", "architecture": "small"}}
    with prepared(bench, **sam) as (cohort, config):
        plan = cohort.plan
        fabric = make_fabric(str(bench.device), plan.precision)
        labelled, pseudo = cohort.labelled_cases(0, True), cohort.pseudo_cases(1, 0)
        source = PatchSource(labelled, pseudo, plan, config, 1)
        print(f"patch {plan.patch}, 1 + {plan.batch} patches a step, {plan.precision}", flush=True)
        for name in LEARNERS:
            learner = learner_named(name)(plan, config.model_copy(update={"learner": name}))
            learner.setup(fabric)
            batch = source(0, 0).to(fabric.device)
            passes = Passes(learner, batch, fabric)
            counter = itertools.count()

            def step(learner: Learner = learner, batch: Batch = batch, counter: Iterator[int] = counter) -> None:
                learner.step(batch, 0.5, torch.Generator().manual_seed(next(counter)))

            times = bench.time({"step": step, "bare": passes})
            ratio = median_ratio(times["step"], times["bare"])
            against = f"bare forward and backward of its {len(passes.found)} passes"
            bench.say("training", f"step, {name}", times["step"], floor_of(step, bench.rates), against, ratio, "<= 1.3")
        _loader(bench, source, plan, config, fabric)


def formats(bench: Bench) -> None:
    """Forward and backward of the network by precision and memory format: neither is faster on every device."""
    with prepared(bench) as (cohort, _):
        plan = cohort.plan
    actions: dict[str, Callable[[], None]] = {}
    for kind, layout in itertools.product((torch.float32, torch.bfloat16), (torch.contiguous_format, LAST)):
        network = make_specialist("dynunet", plan).to(bench.device).to(memory_format=layout)  # type: ignore[call-overload]
        batch = torch.randn(1 + plan.batch, 1, *plan.patch, device=bench.device).to(memory_format=layout)

        def both(network: nn.Module = network, batch: Tensor = batch, kind: torch.dtype = kind) -> None:
            with torch.autocast(bench.device.type, kind, enabled=kind != torch.float32):
                output = network(batch)
            output.float().sum().backward()

        actions[f"{_name(kind)}, {_name(layout)}"] = both
    times = bench.time(actions)
    first = f"{_name(torch.float32)}, {_name(torch.contiguous_format)}"
    for name, action in actions.items():
        ratio = median_ratio(times[name], times[first])
        bench.say("formats", name, times[name], floor_of(action, bench.rates), first, ratio)


def _name(one: torch.dtype | torch.memory_format) -> str:
    return str(one).removeprefix("torch.").replace("contiguous_format", "contiguous")


def _loader(bench: Bench, source: PatchSource, plan: Plan, config: TrainingConfig, fabric: Fabric) -> None:
    """How long a loop waits for its batches, beside its whole time."""
    learner = learner_named("mean_teacher")(plan, config.model_copy(update={"learner": "mean_teacher"}))
    learner.setup(fabric)
    count = 4 * bench.repetitions
    waited, whole = [], []
    batches = drawn_ahead(source, 0, count, 0, drawing_threads(bench.device))
    for number in range(count):
        began = time.perf_counter()
        batch = next(batches).to(fabric.device)
        waited.append(time.perf_counter() - began)
        learner.step(batch, 0.5, torch.Generator().manual_seed(number))
        whole.append(time.perf_counter() - began)
    share = sum(waited[2:]) / sum(whole[2:])
    bench.say("training", "waiting for a batch", waited[2:], None, "an iteration of mean_teacher", share, "<= 0.05")
    drawn = bench.time({"draw": lambda: source(1, 0)})["draw"]
    bench.say("training", "drawing a batch", drawn)


def beside_monai(bench: Bench) -> None:
    """Iterations with their batches, the same network and as many patches; MONAI's transforms do what ours do."""
    with prepared(bench) as (cohort, config):
        plan = cohort.plan
        fabric = make_fabric(str(bench.device), plan.precision)
        source = PatchSource(cohort.labelled_cases(0), cohort.pseudo_cases(1, 0), plan, config, 1)
        learner = learner_named("pseudo_only")(plan, config.model_copy(update={"learner": "pseudo_only"}))
        learner.setup(fabric)
        scans = [cohort.image(case.id) for case in cohort.cases]
        targets = [np.asarray(cohort.pseudo_label(1, case.id)) for case in cohort.cases]
        with closing(drawn_ahead(source, 0, 1 << 30, 0, drawing_threads(bench.device))) as ours:

            def our_iteration() -> None:
                learner.step(next(ours).to(fabric.device), 0.5, torch.Generator().manual_seed(0))

            for kind, workers in ((torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 1)):
                # one loop after the other: a loader's process works ahead, whoever is measured
                loop = MonaiLoop(scans, targets, plan, bench.device, kind, workers)
                name = f"MONAI's loop, {_name(kind)}" + (", a loader" if workers else "")
                times = bench.time({"ours": our_iteration, "loop": loop})
                loop.close()
                ratio = median_ratio(times["ours"], times["loop"])
                bench.say("monai", f"iteration, {name}", times["loop"])
                bench.say("monai", "iteration, pseudo_only", times["ours"], None, name, ratio, "<= 1")


# ---------------------------------------------------------------------- inference


def inference(bench: Bench) -> None:
    """A whole scan from its own grid to labels on its own grid, beside the bare passes of its windows."""
    config = make_config("standard", device=str(bench.device))
    with prepared(bench) as (cohort, _):
        plan = cohort.plan
    learner = learner_named("mean_teacher")(plan, config)
    fabric = make_fabric(str(bench.device), plan.precision)
    learner.setup(fabric)
    model = learner.inference_model().eval()
    own = Geometry(tuple(round(FINER * n) for n in INFERENCE), tuple(s / FINER for s in plan.spacing))  # type: ignore[arg-type]
    centre = [own.centre[axis] - (n - 1) / 2 * plan.spacing[2 - axis] for axis, n in enumerate(reversed(INFERENCE))]
    grid = Geometry(INFERENCE, plan.spacing, (centre[0], centre[1], centre[2]))
    scan = Volume(np.random.default_rng(0).normal(100, 20, own.shape).astype(np.float32), own)
    seen = np.ones(grid.shape, bool)
    interval = [max(1, int(side * 0.5)) for side in plan.patch]
    windows = len(dense_patch_slices(INFERENCE, plan.patch, interval))
    window = torch.randn(1, 1, *plan.patch, device=bench.device)

    def whole() -> None:
        image = resample_image(scan, grid).astype(np.float16)
        found = predict_probabilities(model, image, plan, fabric, 1, 0)
        to_case_grid(found, grid, seen, own)

    @torch.inference_mode()
    def bare() -> None:
        with fabric.autocast():
            for _ in range(windows):
                model(window)

    times = bench.time({"whole": whole, "bare": bare})
    ratio = median_ratio(times["whole"], times["bare"])
    floor = floor_of(bare, bench.rates)
    what = f"{'×'.join(map(str, reversed(INFERENCE)))}, {windows} windows of {plan.patch}"
    bench.say("inference", what, times["whole"], floor, "bare passes of the windows", ratio, "<= 1.3")


# ---------------------------------------------------------------------- a whole run


class Stages:
    """An observer that adds up how long each stage took."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.last = time.perf_counter()

    def event(self, kind: str, **fields: Any) -> None:
        now = time.perf_counter()
        if kind == "progress":
            stage = str(fields["stage"]).split(" ", maxsplit=1)[0]
            self.spent[stage] = self.spent.get(stage, 0.0) + now - self.last
            self.last = now

    def should_stop(self) -> bool:
        return False


def whole(bench: Bench) -> None:
    """A run with the quick preset, and where its time goes; its parts have floors of their own."""
    phantoms = [make_phantom(number, 0, SCAN) for number in range(6)]
    labelled = [LabelledCase("template", phantoms[0].image, phantoms[0].label)]
    cases = [EngineCase(one.name, one.image.geometry, partial(loaded, one.image)) for one in phantoms[1:]]
    config, stages = make_config("quick", device=str(bench.device)), Stages()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for _ in run(cases, labelled, CLASSES, config, Store(Path(folder)), stages):
            pass
    seconds = time.perf_counter() - began
    for stage, spent in stages.spent.items():
        bench.say("whole", stage, [spent], None, "the whole run", spent / seconds)
    bench.say("whole", f"{len(cases)} cases, quick", [seconds])


PARTS: dict[str, Callable[[Bench], None]] = {
    "registration": registration,
    "links": links,
    "features": features,
    "formats": formats,
    "training": training,
    "monai": beside_monai,
    "inference": inference,
    "whole": whole,
}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| part | what | median s | from - to | times the floor | beside | ratio | asked |", "|" + "---|" * 8]
    for row in rows:
        spread = f"{row['from_s']:.3f} - {row['to_s']:.3f}"
        cells = [row["part"], row["what"], f"{row['median_s']:.3f}", spread, row.get("times_the_floor", "")]
        cells += [row.get("against", ""), row.get("ratio", ""), row.get("asked", "")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; all when not given")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    settings = {**ALLOCATOR, **WAITING}
    if any(os.environ.get(name) != value for name, value in settings.items()):  # read when a process begins
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rates = Rates.measured(device)
    print(f"{rates.in_words()}, {math.floor(options.threads)} threads", flush=True)
    bench = Bench(device, rates, options.repetitions, options.rows)
    for name in options.part or PARTS:
        PARTS[name](bench)
    print(table(bench.printed))
    after = Rates.measured(device)
    faster = max(after.flops[kind] / rate for kind, rate in rates.flops.items())
    print(f"at the end {after.in_words()}", flush=True)
    if max(faster, after.bytes / rates.bytes) > 1.2:
        print("the machine was busier when the rates were measured: the floors are too high, measure again", flush=True)


if __name__ == "__main__":
    main()
