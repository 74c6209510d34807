"""A whole run on small phantoms: every case in every round, resumed without doing anything twice."""

import dataclasses
import hashlib
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_helpers import Recorder, dice, tiny_config

from SemiSAMO1Lib.engine import round_training, rounds
from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase
from SemiSAMO1Lib.engine.config import make_config
from SemiSAMO1Lib.engine.data.grids import canonical, with_spacing
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.further import FinishedRun
from SemiSAMO1Lib.engine.memory import or_on_cpu, usable_memory
from SemiSAMO1Lib.engine.observer import Silent, Stopped
from SemiSAMO1Lib.engine.planning import Plan
from SemiSAMO1Lib.engine.refinement.fusion import running_mean
from SemiSAMO1Lib.engine.rounds import run
from SemiSAMO1Lib.engine.sampling import PatchSource
from SemiSAMO1Lib.phantoms import LABELS, PhantomSettings, make_phantom

SMALL = PhantomSettings(spacing_mm=(3.5, 3.5, 3.5))
CLASSES = 1 + len(LABELS)
CONFIG = tiny_config(rounds=2, iterations=6, registration={"use_affine": False})


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(n, 1, SMALL) for n in range(4)]


@pytest.fixture(scope="module")
def template(phantoms):
    return LabelledCase("template", phantoms[0].image, phantoms[0].label)


@pytest.fixture(scope="module")
def cases(phantoms):
    return [EngineCase(p.name, p.image.geometry, lambda p=p: p.image) for p in phantoms[1:]]


@pytest.fixture(scope="module")
def finished(cases, template, tmp_path_factory):
    """An undisturbed run: store, results, observer."""
    store, observer = Store(tmp_path_factory.mktemp("run")), Recorder()
    return store, list(run(cases, [template], CLASSES, CONFIG, store, observer)), observer


def weights_files(store):
    files = store.path("weights").iterdir()
    return {path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


def test_every_case_in_every_round(finished, cases):
    expected = [(number, case.id) for number in (0, 1, 2) for case in cases]
    assert [(r.round, r.case_id) for r in finished[1]] == expected


def test_predictions_lie_on_the_scans_own_grid(finished, cases):
    grids = {case.id: case.geometry for case in cases}
    wrong = [
        result.case_id
        for result in finished[1]
        if {result.prediction.geometry, result.uncertainty.geometry} != {grids[result.case_id]}
    ]
    assert not wrong, f"results of {wrong} lie on another grid than the scan"


def test_predictions_hold_known_classes_only(finished):
    assert all(int(r.prediction.array.max()) < CLASSES for r in finished[1])


def test_uncertainty_is_a_percentage(finished):
    assert all(r.uncertainty.array.dtype == np.uint8 and r.uncertainty.array.max() <= 100 for r in finished[1])


def test_registration_finds_the_large_organ(finished, phantoms):
    found = [dice(r.prediction.array, p.label.array, 1) for r, p in zip(finished[1], phantoms[1:], strict=False)]
    assert min(found) > 0.75, f"Dice of the large organ in round 0: {np.round(found, 3)}; expected above 0.75"


def test_a_barely_trained_network_does_not_ruin_the_registration(finished, phantoms):
    """Six steps teach nothing; registration has its share in every round's answer."""
    last = finished[1][-3:]
    found = [dice(r.prediction.array, p.label.array, 1) for r, p in zip(last, phantoms[1:], strict=True)]
    assert min(found) > 0.6, f"Dice of the large organ in round 2: {np.round(found, 3)}; expected above 0.6"


def test_plan_is_written(finished):
    assert Plan.model_validate(finished[0].json("plan.json")).classes == CLASSES


def test_images_lie_on_the_planned_grid(finished, cases):
    store = finished[0]
    plan = Plan.model_validate(store.json("plan.json"))
    expected = {c.id: with_spacing(canonical(c.geometry), plan.spacing).shape for c in cases}
    assert {c.id: store.array("images", f"{c.id}.npy").shape for c in cases} == expected


def test_network_has_the_planned_filters(finished):
    store = finished[0]
    student = store.tensors("weights", "round-1.pt")["learner"]["student"]
    first = next(value for value in student.values() if value.ndim == 5)
    assert first.shape[0] == store.json("plan.json")["filters"][0]


def test_a_changed_plan_is_obeyed(cases, template, finished, tmp_path):
    """What plan.json says counts, not what would be computed."""
    store = Store(tmp_path)
    store.save_json({**finished[0].json("plan.json"), "spacing": [5.0, 6.0, 7.0]}, "plan.json")
    list(run(cases[:1], [template], CLASSES, CONFIG.model_copy(update={"rounds": 0}), store, Recorder()))
    expected = with_spacing(canonical(cases[0].geometry), (5.0, 6.0, 7.0)).shape
    assert store.array("confidence", f"{cases[0].id}.npy").shape == expected


def test_second_run_trains_nothing(finished, cases, template):
    before = weights_files(finished[0])
    list(run(cases, [template], CLASSES, CONFIG, finished[0], Recorder()))
    assert weights_files(finished[0]) == before, "a finished run trained again"


def test_second_run_gives_the_same_results(finished, cases, template):
    again = list(run(cases, [template], CLASSES, CONFIG, finished[0], Recorder()))
    assert all(np.array_equal(a.prediction.array, b.prediction.array) for a, b in zip(again, finished[1], strict=True))


def test_second_run_reports_no_losses(finished, cases, template):
    observer = Recorder()
    list(run(cases, [template], CLASSES, CONFIG, finished[0], observer))
    assert not [kind for kind, _ in observer.events if kind == "losses"], "a finished run reported losses again"


def test_a_run_that_was_killed_before_its_library_makes_the_same(finished, cases, template, tmp_path):
    """All results are written; only the cases that vote on further scans were not kept yet."""
    shutil.copytree(finished[0].path(), tmp_path / "store")
    store = Store(tmp_path / "store")
    shutil.rmtree(store.path("library"))
    store.path("library.json").unlink()
    assert not list(run(cases, [template], CLASSES, CONFIG, store, Recorder(), completed=2)), "results came again"
    same = {path.name: path.read_bytes() for path in finished[0].path("library").iterdir()}
    assert same and {path.name: path.read_bytes() for path in store.path("library").iterdir()} == same
    assert store.json("library.json") == finished[0].json("library.json")


@pytest.mark.parametrize("stop_after", [2, 6, 11])
def test_stopped_and_resumed_run_ends_bitwise_the_same(finished, cases, template, tmp_path, stop_after):
    store = Store(tmp_path)
    with pytest.raises(Stopped):
        list(run(cases, [template], CLASSES, CONFIG, store, Recorder(stop_after)))
    torch.manual_seed(99)
    list(run(cases, [template], CLASSES, CONFIG, store, Recorder()))
    states = [s.tensors("weights", "round-2.pt")["learner"]["teacher"] for s in (store, finished[0])]
    same = all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert same, f"stopped after {stop_after} questions and resumed: other weights"


def test_engine_cases_have_no_label():
    names = {f.name for f in dataclasses.fields(EngineCase)}
    assert not [n for n in names if "label" in n or "truth" in n], f"a case must not hold a label; it has {names}"


def test_only_scans_are_read(cases, template, tmp_path):
    """All that the engine asks of a case is its scan: `load` is the only door, and it gives one volume."""
    read = []

    def listening(case):
        def load():
            read.append(case.id)
            return case.load()

        return EngineCase(case.id, case.geometry, load)

    config = CONFIG.model_copy(update={"rounds": 0})
    list(run([listening(c) for c in cases], [template], CLASSES, config, Store(tmp_path), Recorder()))
    assert set(read) == {c.id for c in cases}


def test_progress_only_grows(finished):
    fractions = [f["fraction"] for kind, f in finished[2].events if kind == "progress" and "fraction" in f]
    assert fractions == sorted(fractions) and fractions[-1] == 1, f"{fractions}"


def test_every_round_is_announced(finished):
    assert [f["round"] for kind, f in finished[2].events if kind == "round"] == [0, 1, 2]


def test_events_are_plain_values(finished):
    json.dumps(finished[2].events)


def test_a_further_scan_is_segmented_like_one_of_the_cohort(finished, template, phantoms):
    one = FinishedRun([template], CLASSES, CONFIG, finished[0], Silent()).segment(phantoms[2].image)
    same = np.mean(one.prediction.array == finished[1][-2].prediction.array)
    assert same > 0.99, f"the same scan, segmented alone, agrees in {same:.4f} of its voxels"


def test_votes_on_a_further_scan_weigh_what_the_training_found_out(finished, template, phantoms, tmp_path):
    """After six iterations the networks are far behind: the votes count more than where nobody found that out."""
    shutil.copytree(finished[0].folder, tmp_path / "unknown")
    shutil.rmtree(tmp_path / "unknown" / "behind")

    def doubt(store, config):
        found = FinishedRun([template], CLASSES, config, store, Silent()).segment(phantoms[2].image)
        return np.asarray(found.uncertainty.array)

    unknown = doubt(Store(tmp_path / "unknown"), CONFIG)
    assert not np.array_equal(doubt(finished[0], CONFIG), unknown)
    told = CONFIG.model_copy(update={"neighbour_gain": 0.0})
    assert np.array_equal(doubt(finished[0], told), unknown), "it is the share of round 0"


def test_a_further_scan_writes_nothing(finished, template, phantoms):
    before = sorted(p for p in finished[0].folder.rglob("*"))
    FinishedRun([template], CLASSES, CONFIG, finished[0], Silent()).segment(phantoms[2].image)
    assert sorted(p for p in finished[0].folder.rglob("*")) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"warm_start": False},
        {"match_volumes": False},
        {"labels_first": False},
        {"soft_pseudo_labels": True},
        {"refinement": "volume"},
        {"optimizer": "sgd"},
    ],
)
def test_other_settings_run(cases, template, tmp_path, changes):
    config = CONFIG.model_copy(update={**changes, "iterations": 2})
    found = list(run(cases[:2], [template], CLASSES, config, Store(tmp_path), Recorder()))
    assert len(found) == 6


def test_two_labelled_cases_run(cases, template, phantoms, tmp_path):
    other = LabelledCase("other", phantoms[3].image, phantoms[3].label, 0.5, "corrected")
    config = CONFIG.model_copy(update={"rounds": 1, "iterations": 2})
    assert len(list(run(cases[:2], [template, other], CLASSES, config, Store(tmp_path), Recorder()))) == 4


def test_labelled_cases_besides_the_template_are_looked_at_again(cases, template, phantoms, tmp_path):
    other = LabelledCase("other", phantoms[3].image, phantoms[3].label, 0.5, "corrected")
    config = CONFIG.model_copy(update={"rounds": 1, "iterations": 2})
    observer = Recorder()
    list(run(cases[:2], [template, other], CLASSES, config, Store(tmp_path), observer))
    found = Store(tmp_path).json("labelled.json")
    assert list(found) == ["other"] and len(found["other"]) == len(LABELS)
    told = [fields for kind, fields in observer.events if kind == "progress"]
    again = next(place for place, one in enumerate(told) if one["stage"] == "looking again")
    before, after = told[again - 1]["fraction"], told[again]["fraction"]
    assert before < 0.99 < after <= 1, f"{before:.3f} before it, {after:.3f} after it: it has no share of the progress"


def test_a_class_that_a_label_says_nothing_about_is_not_looked_at_again(cases, template, phantoms, tmp_path):
    label = phantoms[3].label
    partial = dataclasses.replace(label, array=np.where(label.array == 2, 0, label.array))
    other = LabelledCase("other", phantoms[3].image, partial, 0.5, "accepted", unknown=(2,))
    config = CONFIG.model_copy(update={"rounds": 1, "iterations": 2})
    list(run(cases[:2], [template, other], CLASSES, config, Store(tmp_path), Recorder()))
    found = Store(tmp_path).json("labelled.json")["other"]
    assert [value is None for value in found] == [number == 2 for number in range(1, CLASSES)]


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("number", [1, 2])
def test_every_round_begins_with_an_earlier_runs_weights(finished, cases, template, tmp_path, number, warm_start):
    """With a learning rate of next to nothing the new weights are the earlier ones."""
    store = Store(tmp_path)
    earlier = finished[0].tensors("weights", "round-2.pt")
    store.save_tensors(earlier, "weights", round_training.EARLIER)
    store.save_json(finished[0].json("plan.json"), "plan.json")
    fixed = {"rounds": 2, "iterations": 1, "learning_rate": 1e-12, "weight_decay": 0.0, "warm_start": warm_start}
    list(run(cases, [template], CLASSES, CONFIG.model_copy(update=fixed), store, Recorder()))
    trained = store.tensors("weights", f"round-{number}.pt")
    before, after = (one["learner"]["student"] for one in (earlier, trained))
    apart = max(float((before[key] - after[key]).abs().max()) for key in before)
    assert apart < 1e-6, f"the weights moved by {apart}, though nothing could be learned"


def test_rejected_cases_are_predicted_but_not_trained_on(cases, template, tmp_path, monkeypatch):
    seen = []

    def listening(labelled, pseudo, *rest):
        seen.append(len(pseudo))
        return PatchSource(labelled, pseudo, *rest)

    monkeypatch.setattr(round_training, "PatchSource", listening)
    config = CONFIG.model_copy(update={"rounds": 1, "iterations": 1})
    rejected = [dataclasses.replace(cases[0], trainable=False), *cases[1:]]
    found = list(run(rejected, [template], CLASSES, config, Store(tmp_path), Recorder()))
    assert (len(found), seen) == (6, [2]), f"{len(found)} results, trained on {seen} cases; expected 6 and [2]"


@pytest.mark.parametrize(("goes_on", "expected"), [(False, [(1, 0), (1, 3)]), (True, [(1, 3), (1, 3)])])
def test_the_first_of_several_rounds_learns_from_labels_alone(
    finished, cases, template, tmp_path, monkeypatch, goes_on, expected
):
    """Not where the training goes on from earlier weights."""
    seen = []

    def listening(labelled, pseudo, *rest):
        seen.append((len(labelled), len(pseudo)))
        return PatchSource(labelled, pseudo, *rest)

    store = Store(tmp_path)
    if goes_on:
        store.save_tensors(finished[0].tensors("weights", "round-2.pt"), "weights", round_training.EARLIER)
        store.save_json(finished[0].json("plan.json"), "plan.json")
    monkeypatch.setattr(round_training, "PatchSource", listening)
    config = CONFIG.model_copy(update={"iterations": 1})
    list(run(cases, [template], CLASSES, config, store, Recorder()))
    assert seen == expected, f"labelled and pseudo-labelled cases by round: {seen}"


@pytest.mark.parametrize(
    ("changes", "number", "alone"),
    [
        ({}, 1, True),
        ({}, 2, False),
        ({"rounds": 1}, 1, False),
        ({"labels_first": False}, 1, False),
        ({"pseudo_weight": 0.0}, 1, False),
        ({"learner": "supervised_only"}, 1, False),
        ({"learner": "semisam"}, 1, False),
        ({"learner": "dual_task"}, 1, True),
    ],
)
def test_which_rounds_learn_from_labels_alone(changes, number, alone):
    found = round_training.learns_from_labels_alone(number, CONFIG.model_copy(update=changes), goes_on=False)
    assert found == alone, f"round {number} with {changes}: {found}, expected {alone}"


def test_without_memory_the_run_goes_on_smaller_and_says_so(cases, template, tmp_path, monkeypatch):
    real, tried = round_training.train_round, []

    def short_of_memory(number, source, plan, *rest):
        tried.append(plan.batch * np.prod(plan.patch))
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(number, source, plan, *rest)

    monkeypatch.setattr(round_training, "train_round", short_of_memory)
    observer = Recorder()
    config = CONFIG.model_copy(update={"rounds": 1, "iterations": 1, "batch": 2})
    list(run(cases[:1], [template], CLASSES, config, Store(tmp_path), observer))
    assert tried[1] < tried[0] and any("memory" in f.get("text", "") for _, f in observer.events)


def test_a_smaller_patch_takes_its_precision_into_the_next_rounds(cases, template, tmp_path, monkeypatch):
    seen, real = [], round_training.train_round

    def short_of_memory(number, source, plan, config, store, fabric, *rest):
        seen.append((number, plan.precision, fabric._precision.precision))
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(number, source, plan, config, store, fabric, *rest)

    monkeypatch.setattr(round_training, "train_round", short_of_memory)
    monkeypatch.setattr("SemiSAMO1Lib.engine.planning.precision_for", lambda wanted, kind, patch, _strides: "32-true")
    config = CONFIG.model_copy(update={"iterations": 1, "batch": 1, "patch": (16, 16, 16)})
    store, fabric = Store(tmp_path), rounds.make_fabric("cpu", "32-true")
    planned = rounds.plan_of(cases[:1], [template], CLASSES, config, store, fabric)
    store.save_json({**rounds.plan_to_json(planned), "precision": "bf16-mixed"}, "plan.json")
    list(run(cases[:1], [template], CLASSES, config, store, Recorder()))
    assert seen == [(1, "bf16-mixed", "bf16-mixed"), (1, "32-true", "32-true"), (2, "32-true", "32-true")]


def test_a_wish_for_half_precision_does_not_outdo_the_plan(cases, template, tmp_path, monkeypatch):
    """The plan says which networks a CPU cannot train so; what it says is what the training has."""
    seen = []

    def watched(number, source, plan, config, store, fabric, *rest):
        seen.append((plan.precision, fabric._precision.precision))
        raise Stopped

    monkeypatch.setattr(round_training, "train_round", watched)
    changes = {"precision": "bf16-mixed", "specialist": "unet_3d", "patch": (32, 32, 32), "rounds": 1}
    with pytest.raises(Stopped):
        list(run(cases[:1], [template], CLASSES, CONFIG.model_copy(update=changes), Store(tmp_path), Recorder()))
    assert seen == [("32-true", "32-true")]


@pytest.mark.parametrize("count", [2, 3])
def test_running_mean_is_the_mean(count):
    maps = np.random.default_rng(0).random((count, 2, 3, 3, 3)).astype(np.float16)
    mean = maps[0]
    for number in range(2, count + 1):
        mean = running_mean(mean, maps[number - 1], number)
    assert np.abs(mean.astype(float) - maps.astype(float).mean(0)).max() < 2e-3


class _Warnings:
    def __init__(self):
        self.texts = []

    def event(self, kind, **fields):
        if kind == "warning":
            self.texts.append(fields["text"])

    def should_stop(self):
        return False


def test_processes_of_one_computer_plan_with_a_part_each_of_its_main_memory(
    tmp_path, monkeypatch, cases, template
) -> None:
    """Eight on two computers: four that each plan with all of the memory together need four times what there is."""
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    whole = 128 << 20
    monkeypatch.setattr(rounds, "usable_memory", lambda device, processes: whole // processes)
    config, voxels = make_config("quick"), {}
    for count in (1, 8):
        fabric = SimpleNamespace(
            world_size=count,
            global_rank=0,
            is_global_zero=True,
            device=torch.device("cpu"),
            barrier=lambda: None,
            all_gather=lambda tensor: tensor,
        )
        plan = rounds.plan_of(cases, [template], CLASSES, config, Store(tmp_path / str(count)), fabric)
        voxels[count] = math.prod(plan.patch)
    assert voxels[8] < voxels[1] / 2, f"patches of {voxels} voxels by one process and by four of a computer"


def test_the_main_memory_is_divided_by_the_processes() -> None:
    alone, of_four = (usable_memory(torch.device("cpu"), count) for count in (1, 4))
    assert of_four == alone // 4


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    ],
    ids=lambda error: str(error)[:24],
)
def test_work_that_the_gpu_has_no_memory_for_is_done_on_the_cpu(error):
    def work(where):
        if where.type == "cuda":
            raise error
        return where.type

    watcher = _Warnings()
    assert or_on_cpu(work, torch.device("cuda"), watcher, "prediction of a") == "cpu"
    assert len(watcher.texts) == 1 and "prediction of a" in watcher.texts[0], "the fallback was to be told once"


def test_another_error_on_the_gpu_is_not_hidden():
    def work(where):
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        or_on_cpu(work, torch.device("cuda"), _Warnings(), "prediction of a")
