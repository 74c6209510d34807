"""The benchmarks stay runnable and honest: they can be imported, and what decides their figures is right."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import one_label
import pytest
import torch
import training_speed
from common import SPLITS, commit, measured_once
from gpu import Busy, stages
from monai_loop import MonaiLoop
from one_label import Cohort, Row, Setting, rows_for, table
from processes import seconds_by_stage
from roofline import Counter, Rates
from speed import Bench, Passes, prepared
from whole_scan import embedded

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.config import make_config
from SemiSAMO1Lib.engine.data.hdf5_layout import write_case, write_list
from SemiSAMO1Lib.engine.data.intensities import IntensityPlan
from SemiSAMO1Lib.engine.data.patches import Patches
from SemiSAMO1Lib.engine.devices import make_fabric
from SemiSAMO1Lib.engine.learners import learner_named
from SemiSAMO1Lib.engine.learners.base import Batch
from SemiSAMO1Lib.engine.planning import Plan
from SemiSAMO1Lib.engine.sampling import PatchSource
from SemiSAMO1Lib.image_io import read_volume, write_volume
from SemiSAMO1Lib.job import JobFolder
from SemiSAMO1Lib.phantoms import PhantomSettings, make_phantom
from SemiSAMO1Lib.volume import Geometry, Volume

HERE = Path(__file__).parent
CPU = torch.device("cpu")
SCRIPTS = sorted(path.stem for path in HERE.glob("*.py") if path.stem != Path(__file__).stem)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_imported(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize("name", SPLITS)
def test_no_test_scan_is_in_the_pool(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(one_label, "scans", lambda _cohort: [Path(f"{n:03d}.nii.gz") for n in range(sum(SPLITS[name]))])
    monkeypatch.setattr(one_label, "write_cohort", lambda place, count, settings: _empty_files(place, count))
    cohort = Cohort.of(name, tmp_path)
    assert (len(cohort.pool), len(cohort.test)) == SPLITS[name]
    assert not set(cohort.pool) & set(cohort.test)


def _empty_files(place: Path, count: int) -> None:
    (place / "images").mkdir(parents=True)
    for number in range(count):
        (place / "images" / f"phantom_{number:03d}.nrrd").touch()


@pytest.mark.parametrize("preset", ["quick", "standard"])
def test_every_row_that_trains_has_parameters_that_exist(preset: str) -> None:
    for key, row in rows_for(preset).items():
        if row.changes is not None:
            config = make_config(preset, **row.changes)
            assert learner_named(config.learner), key


@pytest.mark.parametrize("key", ["supervised", "bound"])
def test_what_is_compared_takes_as_many_steps_and_sees_as_many_patches(key: str, tmp_path: Path) -> None:
    row, ours = rows_for("quick")[key], make_config("quick")
    config = make_config("quick", **(row.changes or {}))
    assert config.rounds * config.iterations == ours.rounds * ours.iterations
    setting = Setting(Cohort("hippocampus", tmp_path, [], []), key, row, "quick", "t", 0)
    files.write_json(replace(setting, key="ours").file, {"patches": 3})
    assert setting.patches() == {"labelled_batch": 3}


def test_without_the_whole_method_nothing_is_compared_with_it(tmp_path: Path) -> None:
    row = rows_for("quick")["bound"]
    with pytest.raises(SystemExit, match="run that row first"):
        Setting(Cohort("hippocampus", tmp_path, [], []), "bound", row, "quick", "t", 0).patches()


def row(key: str, dice: dict[str, float], **changes: Any) -> dict[str, Any]:
    scores = {case: {"1": value} for case, value in dice.items()}
    facts = {"row": key, "preset": "quick", "template": "t", "seed": 0, "commit": "a", "parameters": {}}
    return {**facts, "pool": scores, "test": None, "minutes": 1.0, "peak_GiB": 1.0, **changes}


def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], *rows: dict[str, Any]) -> str:
    cohort = Cohort("hippocampus", tmp_path, [], [])
    for number, one in enumerate(rows):
        files.write_json(tmp_path / "rows" / f"{number}.json", one)
    table(cohort, rows_for("quick"))
    return capsys.readouterr().out


def test_a_difference_is_paired_by_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means differ by 0.1 in both; by case the difference is the same everywhere, so the interval has no width."""
    mine, theirs = {"a": 0.9, "b": 0.5, "c": 0.7}, {"a": 0.8, "b": 0.4, "c": 0.6}
    text = shown(tmp_path, capsys, row("ours", mine), row("registration", theirs))
    assert "ours quick less registration quick, pool: +0.1000 (95 %: +0.1000 to +0.1000)" in text


def test_what_was_run_for_one_seed_alone_stands_beside_all_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the difference of the two means would be that of the first seed."""
    ours = row("ours", {"a": 0.9}), row("ours", {"a": 0.7}, seed=1)
    assert "ours quick less registration quick, pool: +0.1000" in shown(
        tmp_path, capsys, *ours, row("registration", {"a": 0.7})
    )


def test_a_kept_row_of_other_parameters_is_not_taken_for_this_one(tmp_path: Path) -> None:
    longer = Row("longer", {"iterations": 1000})
    setting = Setting(Cohort("hippocampus", tmp_path, [], []), "longer", longer, "quick", "t", 0)
    files.write_json(setting.file, row("longer", {}, parameters={"iterations": 400}))
    with pytest.raises(SystemExit, match="give the row another name"):
        setting.run()


TINY = PhantomSettings((48.0, 48.0, 42.0), (3.0, 3.0, 3.0))


def test_the_speed_of_training_has_pseudo_labels_to_learn_from() -> None:
    bench = Bench(CPU, Rates({torch.float32: 1e9, torch.bfloat16: 1e9}, 1e9), 1, None)
    small = {"training_voxels": 10_000, "patch_voxels": 4_096}
    with prepared(bench, TINY, **small) as (cohort, config):
        found = PatchSource(cohort.labelled_cases(0), cohort.pseudo_cases(1, 0), cohort.plan, config, 1)(0, 0)
    assert found.pseudo.target.shape[1] == cohort.plan.classes


def test_training_is_timed_to_its_end_on_both_sides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a", "b", "c"]
    for number, name in enumerate(names):
        one = make_phantom(number, settings=TINY)
        scaled = (one.image.array - one.image.array.mean()) / one.image.array.std()
        write_case(tmp_path / "data" / f"{name}.h5", Volume(scaled.astype(np.float32), one.image.geometry), one.label)
    write_list(tmp_path, "train", names)
    numbers = {"--iterations": 2, "--warm-up": 1, "--repetitions": 1, "--threads": 1, "--learner": "mt"}
    given = [*(str(word) for pair in numbers.items() for word in pair), "--patch", "16", "16", "32"]
    sides = ["--side", "plain", "--side", "ours-float32", "--data", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["training_speed.py", *given, *sides])
    training_speed.main()
    rows = capsys.readouterr().out.strip().splitlines()[-2:]
    assert [row.split(" | ")[:3] for row in rows] == [["| mt", "plain", "32-true"], ["| mt", "ours-float32", "32-true"]]


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda: torch.empty(1000), 0),
        (lambda: torch.ones(1000), 4000),
        (lambda: torch.zeros(1000).add_(1), 4000 + 8000),
        (lambda: torch.ones(1).expand(1000) + torch.ones(1), 4 + 4 + 4 + 4 + 4000),
    ],
    ids=["room alone", "written", "changed in place", "expanded"],
)
def test_only_what_is_moved_is_counted(action: Any, expected: int) -> None:
    counter = Counter()
    with counter:
        action()
    assert counter.bytes == expected


class TestFinalRow:
    """The test scans are for presets, and for one row that was chosen on the pool."""

    def setting(self, tmp_path: Path, key: str, final: bool) -> Setting:
        scan = tmp_path / "scan.nrrd"
        method = Row(key, None, lambda template, label, case: read_volume(label).array)
        setting = Setting(Cohort("hippocampus", tmp_path, [scan], [scan]), key, method, "quick", "scan", 0, final)
        files.write_json(setting.file, row(key, {}))
        return setting

    @pytest.fixture(autouse=True)
    def scan(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        one = Volume(np.ones((3, 4, 5), np.uint8), Geometry((3, 4, 5)))
        write_volume(tmp_path / "scan.nrrd", one)
        monkeypatch.setattr(one_label, "reference_of", lambda scan: scan)

    def test_it_is_marked(self, tmp_path: Path) -> None:
        setting = self.setting(tmp_path, "longer", True)
        setting.test()
        kept = files.read_json(setting.file)
        assert kept["final"] and kept["test"] == {"scan": {"1": 1.0}}

    def test_a_second_one_is_refused(self, tmp_path: Path) -> None:
        self.setting(tmp_path, "longer", True).test()
        with pytest.raises(SystemExit, match="longer quick was applied"):
            self.setting(tmp_path, "wider", True).test()

    def test_nor_is_the_same_row_of_another_preset_applied(self, tmp_path: Path) -> None:
        first = self.setting(tmp_path, "longer", True)
        first.test()
        second = replace(first, preset="standard")
        files.write_json(second.file, row("longer", {}, preset="standard"))
        with pytest.raises(SystemExit, match="longer quick was applied"):
            second.test()

    def test_presets_go_on(self, tmp_path: Path) -> None:
        self.setting(tmp_path, "longer", True).test()
        preset = self.setting(tmp_path, "ours", False)
        preset.test()
        assert files.read_json(preset.file)["test"] and "final" not in files.read_json(preset.file)

    def test_others_are_compared_with_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = row("longer", {"a": 0.9}, final=True), row("registration", {"a": 0.8})
        assert "longer quick less registration quick, pool: +0.1000" in shown(tmp_path, capsys, *rows)


def test_one_run_has_no_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "±" not in shown(tmp_path, capsys, row("ours", {"a": 0.9})).splitlines()[1]


def test_rows_of_different_code_are_not_mixed_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(tmp_path, capsys, row("ours", {"a": 0.9}), row("ours", {"a": 0.8}, seed=1, commit="b"))
    assert 'differ in commit: "a", "b"' in text


def test_nor_is_it_when_two_rows_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(tmp_path, capsys, row("ours", {"a": 0.9}), row("supervised", {"a": 0.8}, commit="b"))
    assert "less supervised quick, pool: +0.1000" in text and "these rows differ in commit" in text


def _seconds(number: int) -> dict[str, Any]:
    return {"seconds": number}


class TestMeasuredBefore:
    """What a folder holds is used again only where it was measured with the same settings."""

    def test_it_is_not_measured_again(self, tmp_path: Path) -> None:
        one = [measured_once(tmp_path / "a.json", {"scans": 3}, partial(_seconds, n)) for n in (1, 2)]
        assert [row["seconds"] for row in one] == [1, 1]

    def test_it_says_of_which_code_it_is(self, tmp_path: Path) -> None:
        assert measured_once(tmp_path / "a.json", {"scans": 3}, dict)["commit"] == commit()

    def test_other_settings_are_refused(self, tmp_path: Path) -> None:
        measured_once(tmp_path / "a.json", {"preset": "quick"}, dict)
        with pytest.raises(SystemExit, match="preset"):
            measured_once(tmp_path / "a.json", {"preset": "standard"}, dict)


def test_a_scan_in_a_larger_field_of_view_keeps_its_label() -> None:
    phantom = make_phantom(0, settings=PhantomSettings(spacing_mm=(3.0, 3.0, 3.0)))
    for seed in range(4):
        image, label = embedded(phantom.image, phantom.label, np.random.default_rng(seed))
        assert all(more > less for more, less in zip(image.array.shape, phantom.image.array.shape, strict=True))
        for value in np.unique(phantom.label.array)[1:]:
            share = np.count_nonzero(label.array == value) / np.count_nonzero(phantom.label.array == value)
            assert 0.9**3 * 0.8 < share < 1.1**3 * 1.2, f"label {value} of draw {seed} has {share:.2f} of its voxels"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_floor_counts_a_convolution_however_it_is_called(mode: type[torch.no_grad]) -> None:
    network, image = torch.nn.Conv3d(2, 3, 3, padding=1), torch.zeros(1, 2, 4, 5, 6)
    with Counter() as counter, mode():
        network(image)
    multiplications = 4 * 5 * 6 * 2 * 3 * 27
    assert counter.flops == {torch.float32: 2 * multiplications}


def test_a_stage_of_a_run_lasts_from_the_last_word_of_the_one_before(tmp_path: Path) -> None:
    words = [("handshake", None, 1.0), ("progress", "links", 3.0), ("progress", "links", 4.0), ("losses", None, 6.0)]
    words += [("progress", "training 1", 7.0), ("progress", "finished", 7.5)]
    for kind, stage, at in words:
        files.append_line(tmp_path / "events.jsonl", {"time": at, "kind": kind, **({"stage": stage} if stage else {})})
    assert stages(tmp_path / "events.jsonl") == [
        ("links", 1.0, 4.0),
        ("training 1", 4.0, 7.0),
        ("finished", 7.0, 7.5),
    ]


def test_the_gpu_is_as_busy_as_it_was_seen_during_the_stage() -> None:
    busy = Busy()
    busy.seen = [(1.0, 0.1, 2.0), (2.0, 0.5, 3.0), (3.0, 0.7, 4.0), (4.0, 0.0, 1.0)]
    assert busy.between(1.0, 3.0) == pytest.approx(0.6) and busy.between(4.0, 5.0) is None and busy.peak == 4.0


class TestOneLabelFromItsCommand:
    """Registration alone of four phantoms: what is run, kept, and shown."""

    @pytest.fixture
    def few(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        monkeypatch.setitem(SPLITS, "phantoms", (3, 1))
        monkeypatch.setattr(one_label, "THICK", PhantomSettings(spacing_mm=(6.0, 5.0, 5.0)))
        return tmp_path

    def said(self, few: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
        given = ["one_label.py", *words, "--folder", str(few), "--preset", "quick", "--templates", "1", "--seeds", "1"]
        monkeypatch.setattr("sys.argv", given)
        one_label.main()

    def test_pool_and_test_are_scored_and_shown(
        self, few: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.said(few, monkeypatch, "all", "phantoms", "--rows", "registration,resized")
        (registered, stretched) = [files.read_json(path) for path in sorted((few / "phantoms" / "rows").glob("*.json"))]
        assert (len(registered["pool"]), len(registered["test"])) == (2, 1)
        assert one_label.mean(registered["pool"]) > one_label.mean(stretched["pool"]) + 0.1
        assert "registration alone (registration quick)" in capsys.readouterr().out

    def test_parts_are_not_for_the_test_scans(self, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(SystemExit):
            self.said(few, monkeypatch, "test", "phantoms", "--rows", "parts")


def small_plan() -> Plan:
    """A network of three levels and four channels, patches of 8³ voxels."""
    return Plan(
        classes=2,
        spacing=(1.0, 1.0, 1.0),
        registration_spacing=1.0,
        patch=(8, 8, 8),
        strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
        kernels=((3, 3, 3),) * 3,
        filters=(4, 8, 8),
        batch=1,
        intensity=IntensityPlan(scheme="per_case", low=0.5, high=99.5),
        precision="32-true",
        reasons=(),
    )


def patches_of(value: float) -> Patches:
    image = torch.full((1, 1, 8, 8, 8), value)
    return Patches(image, torch.cat([1 - image, image], 1), torch.ones_like(image))


def test_the_bare_passes_of_a_step_are_those_that_it_makes() -> None:
    """The student sees both patches and learns; the teacher sees the unlabelled one and does not."""
    fabric = make_fabric("cpu", "32-true")
    learner = learner_named("mean_teacher")(small_plan(), make_config("quick", device="cpu"))
    learner.setup(fabric)
    passes = Passes(learner, Batch(patches_of(1.0), patches_of(0.0)), fabric)
    assert [(one.samples, one.with_gradient) for one in passes.found] == [(2, True), (1, False)]
    before = [one.clone() for one in learner.inference_model().parameters()]
    passes()
    after = list(learner.inference_model().parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)), "a bare pass taught it"


def test_the_plain_loop_learns_something() -> None:
    generator = np.random.default_rng(0)
    labels = [(generator.random((12, 12, 12)) > 0.5).astype(np.uint8) for _ in range(2)]
    torch.manual_seed(0)
    loop = MonaiLoop([label.astype(np.float32) for label in labels], labels, small_plan(), CPU, torch.float32)
    losses = [loop() for _ in range(12)]
    assert losses[-1] < losses[0], "grey values that are the label itself were not learned"


def test_times_of_stages_are_those_between_events(tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    events = [("handshake", "", 10.0), ("progress", "links", 12.5), ("losses", "", 13.0), ("progress", "links", 14.0)]
    for kind, stage, time in [*events, ("progress", "training 1", 20.0)]:
        files.append_line(job.events, {"kind": kind, "stage": stage, "time": time})
    assert seconds_by_stage(job) == {"links": 4.0, "training 1": 6.0}
