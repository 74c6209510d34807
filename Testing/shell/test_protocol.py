"""The published protocol as a person runs it: `reproduce` for every learner, resumed, validated, on bad input."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from method_helpers import (
    DONE,
    WRONG_USE,
    Run,
    Shown,
    curves,
    reproduce,
    rewrite,
    same_tensors,
    shell,
    stored,
    weights_of,
    write_layout,
    write_names,
    write_published,
)
from torch import Tensor

from SemiSAMO1Lib import files
from SemiSAMO1Lib.choices import full_name
from SemiSAMO1Lib.engine import training
from SemiSAMO1Lib.engine.config import BEFORE
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.generalists.sam_med3d.checkpoint import NAME
from SemiSAMO1Lib.shell import method_commands
from SemiSAMO1Lib.tasks import protocol as protocol_module
from SemiSAMO1Lib.tasks.inputs import ClassMap
from SemiSAMO1Lib.tasks.protocol import Judge, Protocol, features_folder

#: The curves of every learner, beside 'total' and 'supervised'.
LOSSES = {
    "mt": {"pseudo", "consistency"},
    "uamt": {"pseudo", "consistency"},
    "dan": {"pseudo", "consistency", "discriminator"},
    "dtc": {"pseudo", "consistency", "distance_mask", "distance"},
    "semisam": {"pseudo", "consistency", "assisted"},
    "semisam-uamt": {"pseudo", "consistency", "assisted"},
    "semisam+": {"pseudo", "consistency", "assisted"},
    "supervised": set(),
    "pseudo": {"pseudo"},
}

ASSISTED = ("semisam", "semisam-uamt", "semisam+")

# ---------------------------------------------------------------------- every learner


@pytest.fixture(scope="module", params=list(LOSSES))
def learnt(
    request: pytest.FixtureRequest, published: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Shown, Path]:
    """Learner, what was shown, where its run lies."""
    learner = request.param
    output = tmp_path_factory.mktemp("learner") / "output"
    options = ("--checkpoint", "random") if learner in ASSISTED else ()
    shown = reproduce(published, output, "--learner", learner, *options)
    return learner, shown, output


def test_a_run_of_every_learner_finishes(learnt: tuple[str, Shown, Path]) -> None:
    _, shown, _ = learnt
    assert shown.code == DONE, shown.text


@pytest.mark.parametrize("name", ["weights/round-1.pth", "log.jsonl", "summary.json", "plan.json"])
def test_a_run_leaves_its_files(learnt: tuple[str, Shown, Path], name: str) -> None:
    assert (learnt[2] / name).is_file(), f"{name} was expected in {sorted(learnt[2].iterdir())}"


def test_the_curves_hold_the_losses_of_the_learner(learnt: tuple[str, Shown, Path]) -> None:
    learner, _, output = learnt
    found = set(curves(output / "curves" / "round-1"))
    assert found == {"total", "supervised", *LOSSES[learner]}


def test_the_curves_are_numbers(learnt: tuple[str, Shown, Path]) -> None:
    values = [value for curve in curves(learnt[2] / "curves" / "round-1").values() for value in curve]
    assert all(map(math.isfinite, values)), f"{values}"


def test_the_start_names_learner_and_generalist(learnt: tuple[str, Shown, Path]) -> None:
    full = full_name(learnt[0])
    assert f"note: {full}, labels carried by registration; 1 labelled, 2 unlabelled, 4 classes" in learnt[1].text


@pytest.mark.parametrize(
    "deviation",
    [
        "round 0 comes from registration",
        "exponential moving average are used, not the best on labelled validation scans",
        "the identity is among the random turns and flips",
        "functions of t / t_max",
        "Gaussian weights",
        "fewer than K certain volumes are refined too",
        "centred on",
        "gradients longer than 12",
    ],
)
def test_the_start_names_every_deviation(run: Run, deviation: str) -> None:
    lines = [line for line in run.shown.out.splitlines() if "differs from the released code" in line]
    assert any(deviation in line for line in lines), f"{deviation!r} was expected in {lines}"


def test_deviations_are_named_before_anything_is_trained(run: Run) -> None:
    kinds = [row["kind"] for row in files.read_lines(run.output / "log.jsonl")[0]]
    last = max(n for n, kind in enumerate(kinds) if kind == "note")
    assert last < kinds.index("losses"), f"{kinds}"


@pytest.mark.parametrize(
    ("settings", "deviation"),
    [
        ({"learner": "dtc"}, "one true distance map per class"),
        ({"learner": "semisam", "further": {"generalists": {"checkpoint": "random"}}}, "random weights"),
        ({"learner": "semisam+", "further": {"generalists": {"checkpoint": "random"}}}, "random weights"),
        ({"patch": (112, 128, 80)}, "no turns by 90°"),
        ({"validate": Path("val.txt")}, "the best weights on val.txt are kept, as released: those labels are read"),
        ({}, "bfloat16"),
    ],
)
def test_deviations_of_some_settings_alone(settings: dict[str, Any], deviation: str) -> None:
    one = Protocol(Path("root"), **settings)
    assert any(deviation in text for text in one.deviations(one.config()))


@pytest.mark.parametrize(
    ("settings", "absent"),
    [
        ({"generalist": "sam-med3d"}, "round 0 comes from"),
        ({"validate": Path("val.txt")}, "exponential moving average"),
        ({"further": {"precision": "32-true"}}, "bfloat16"),
        ({}, "dual task"),
        ({"learner": "semisam"}, "random weights"),
    ],
)
def test_what_is_as_released_is_not_called_a_deviation(settings: dict[str, Any], absent: str) -> None:
    one = Protocol(Path("root"), **settings)
    assert not any(absent in text for text in one.deviations(one.config()))


def test_an_unknown_learner_is_named(published: Path, tmp_path: Path) -> None:
    shown = reproduce(published, tmp_path / "output", "--learner", "sloth")
    assert shown.code == WRONG_USE and "unknown learner 'sloth'" in shown.text and "dual_task" in shown.text


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rounds", 3),
        ("iterations", 15_000),
        ("specialist", "unet_3d"),
        ("generalist", "sam-med3d"),
        ("optimizer", "sgd"),
        ("learning_rate", 0.01),
        ("momentum", 0.9),
        ("weight_decay", 1e-4),
        ("batch", 1),
        ("patch", (128, 128, 128)),
        ("normalise", False),
        ("warm_start", False),
        ("labels_first", False),
        ("match_volumes", False),
        ("certainty_around", 0.0),
        ("edge_weight", 0.0),
        ("ema_decay", 0.99),
        ("consistency", 0.1),
        ("pseudo_ramp", 0.3),
        ("pseudo_weight", 1.0),
        ("uncertainty_passes", 8),
        ("soft_pseudo_labels", False),
        ("ensemble_rounds", False),
        ("test_time_passes", 1),
        ("propagation_share", 0.0),
        ("refinement", "volume"),
        ("check_pseudo_labels", False),
        ("confidence_weights", False),
        ("neighbours", 5),
        ("uncertain_quantile", 0.9),
        ("seed", 1337),
    ],
)
def test_published_settings(name: str, value: object) -> None:
    assert getattr(Protocol(Path("root")).config(), name) == value


def test_of_what_came_later_nothing_is_on() -> None:
    config = Protocol(Path("root")).config()
    assert {key: getattr(config, key) for key in BEFORE} == BEFORE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotation_degrees", 0),
        ("scale", 0),
        ("elastic_mm", 0),
        ("mirror", True),
        ("quarter_turns", True),
        ("intensity", False),
    ],
)
def test_published_augmentation(name: str, value: object) -> None:
    assert getattr(Protocol(Path("root")).config().augmentation, name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [("preprocessing", "released"), ("coverage", "centre"), ("upsampling", "nearest"), ("label_cells", "nearest")],
)
def test_published_use_of_the_generalist(name: str, value: object) -> None:
    assert getattr(Protocol(Path("root")).config().generalists, name) == value


@pytest.mark.parametrize("learner", ASSISTED)
def test_assisted_learners_were_published_without_pseudo_labels(learner: str) -> None:
    assert Protocol(Path("root"), learner).config().pseudo_weight == 0


def test_no_published_setting_resamples() -> None:
    assert Protocol(Path("root")).config().training_voxels >= 1024**3


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (("--learner", "dan"), "learner", "adversarial"),
        (("--rounds", 2), "rounds", 2),
        (("--iterations", 7), "iterations", 7),
        (("--knn-k", 3), "neighbours", 3),
        (("--uncertainty-quantile", 0.5), "uncertain_quantile", 0.5),
        (("--seed", 9), "seed", 9),
        (("--generalist", "mind"), "generalist", "mind"),
        (("--checkpoint", "my.pth"), "generalists.checkpoint", "my.pth"),
        (("--coverage", "full"), "generalists.coverage", "full"),
        (("--coverage", "full"), "generalists.label_cells", "share"),
        (("--device", "cpu"), "device", "cpu"),
        (("--labeled-num", 2), "labelled", 2),
    ],
)
def test_options_reach_the_run(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, Any], name: str, value: Any
) -> None:
    found: dict[str, Any] = {}

    def listening(one: Protocol, *_: object) -> dict[str, Any]:
        found.update({**one.config().model_dump(), "labelled": one.labelled})
        return {"seconds": 0.0}

    monkeypatch.setattr(protocol_module, "reproduce", listening)
    shell("reproduce", "--root", published, "--output", tmp_path / "output", *options)
    for part in name.split("."):
        found = found[part]
    assert found == value


@pytest.fixture
def settled(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The configuration that a run would have got."""

    def config(*options: object, **changes: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def listening(one: Protocol, *_: object) -> dict[str, Any]:
            found.update(one.config().model_dump())
            return {"seconds": 0.0}

        monkeypatch.setattr(protocol_module, "reproduce", listening)
        files.write_json(tmp_path / "more.json", changes)
        shown = shell(
            "reproduce", "--root", published, "--output", tmp_path / "o", "--config", tmp_path / "more.json", *options
        )
        assert shown.code == DONE, shown.text
        return found

    return config


def test_the_config_file_wins_over_what_was_published(settled: Callable[..., dict[str, Any]]) -> None:
    assert settled(optimizer="adamw")["optimizer"] == "adamw"


@pytest.mark.parametrize(
    ("option", "parameter", "in_the_file", "wanted"),
    [
        (("--rounds", 1), "rounds", 2, 1),
        (("--knn-k", 3), "neighbours", 4, 3),
        (("--patch", 32, 16, 8), "patch", [8, 8, 8], (8, 16, 32)),
        (("--learner", "uamt"), "learner", "dan", "uncertainty_mean_teacher"),
        (("--device", "cpu"), "device", "cuda", "cpu"),
    ],
)
def test_an_option_that_is_given_wins_over_the_config_file(
    settled: Callable[..., dict[str, Any]], option: tuple[object, ...], parameter: str, in_the_file: Any, wanted: Any
) -> None:
    assert settled(*option, **{parameter: in_the_file})[parameter] == wanted


def test_a_checkpoint_that_is_given_wins_over_the_config_file(settled: Callable[..., dict[str, Any]]) -> None:
    found = settled("--checkpoint", "random", generalists={"checkpoint": "other.pth", "temperature": 0.2})
    assert (found["generalists"]["checkpoint"], found["generalists"]["temperature"]) == ("random", 0.2)


def test_the_learner_of_the_config_file_decides_about_pseudo_labels(settled: Callable[..., dict[str, Any]]) -> None:
    found = settled(learner="semisam", generalists={"checkpoint": "random"})
    assert found["pseudo_weight"] == 0.0, "SemiSAM was published without pseudo-labels"


def test_the_device_of_the_config_file_counts(settled: Callable[..., dict[str, Any]]) -> None:
    assert settled(device="cpu")["device"] == "cpu", "an option that was not given must not hide the file's"


def test_a_part_of_a_section_in_the_config_file_leaves_the_rest(settled: Callable[..., dict[str, Any]]) -> None:
    found = settled(augmentation={"scale": 0.1})["augmentation"]
    assert (found["scale"], found["mirror"], found["intensity"]) == (0.1, True, False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"iterrations": 3}, "iterrations"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"specialist": "sloth"}, "unknown specialist 'sloth'"),
        ({"generalists": "small"}, "generalists"),
        ({"match_volumes": True}, "match_volumes"),
    ],
)
def test_a_wrong_parameter_is_named(published: Path, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    shown = reproduce(published, tmp_path / "output", **changes)
    assert shown.code == WRONG_USE and expected in shown.text, shown.text


def test_a_config_file_that_is_no_object(published: Path, tmp_path: Path) -> None:
    files.write_json(tmp_path / "list.json", [1])
    shown = shell("reproduce", "--root", published, "--config", tmp_path / "list.json", "--output", tmp_path / "o")
    assert shown.code == WRONG_USE and "must hold one JSON object" in shown.text


def test_the_patch_is_given_along_the_files_axes(published: Path, tmp_path: Path) -> None:
    reproduce(published, tmp_path / "output", "--iterations", 1, "--patch", 32, 16, 8)
    assert files.read_json(tmp_path / "output" / "plan.json")["patch"] == [8, 16, 32], "(x, y, z) ends as (z, y, x)"


def test_the_training_grid_is_that_of_the_file(run: Run) -> None:
    expected = stored(run.root, "p1", "image").shape[::-1]
    assert np.load(run.output / "work" / "images" / "p1.npy").shape == expected


def test_the_network_sees_the_files_grey_values(run: Run) -> None:
    found = np.load(run.output / "work" / "images" / "p1.npy")
    assert np.array_equal(found, stored(run.root, "p1", "image").T), "released: used as they are"


def test_the_published_network_is_trained(published: Path, tmp_path: Path) -> None:
    reproduce(published, tmp_path / "o", "--iterations", 1, "--patch", 32, 32, 32, specialist="unet_3d")
    assert {"conv1.conv1.0.weight", "final.weight"} <= weights_of(tmp_path / "o", 1).keys()


def test_a_patch_that_the_network_cannot_have_is_named(published: Path, tmp_path: Path) -> None:
    shown = reproduce(published, tmp_path / "output", "--patch", 30, 30, 30, specialist="unet_3d")
    assert shown.code == WRONG_USE and "unet_3d cannot have the patch (30, 30, 30)" in shown.text


@pytest.mark.parametrize("generalist", ["mind", "fused", "sam-med3d"])
def test_other_generalists_carry_the_labels(published: Path, tmp_path: Path, generalist: str) -> None:
    options = ("--generalist", generalist, "--checkpoint", "random", "--iterations", 1)
    shown = reproduce(published, tmp_path / "output", *options)
    assert shown.code == DONE and f"labels carried by {generalist}" in shown.text, shown.text


@pytest.mark.parametrize(
    "options", [("--device", "cuda:63"), ("--generalist", "sam-med3d"), ("--learner", "semisam")], ids=lambda o: o[1]
)
def test_what_is_not_here_is_said_before_anything_is_written(
    published: Path, tmp_path: Path, options: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMISAMO1_CHECKPOINT", str(tmp_path / "absent.pth"))
    shown = reproduce(published, tmp_path / "output", *options)
    assert shown.code == WRONG_USE and not (tmp_path / "output").exists(), shown.text


def test_features_are_kept_beside_the_data_for_all_runs(published: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(published, root, ignore=shutil.ignore_patterns("features"))
    reproduce(root, tmp_path / "first", "--generalist", "mind", "--rounds", 0)
    kept = {path: path.stat().st_mtime_ns for path in (root / "features").glob("*.h5")}
    reproduce(root, tmp_path / "second", "--generalist", "mind", "--rounds", 0)
    again = {path: path.stat().st_mtime_ns for path in (root / "features").glob("*.h5")}
    assert len(kept) == 3 and again == kept, f"the features of three cases, made once: {kept}, {again}"


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="folders are writable for an administrator")
def test_features_are_kept_with_the_run_where_the_data_are_read_only(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir(mode=0o555)
    assert features_folder(tmp_path / "root", tmp_path / "run") == tmp_path / "run" / "features"


# ---------------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def summary(run: Run) -> dict[str, Any]:
    value: dict[str, Any] = files.read_json(run.output / "summary.json")
    return value


def test_the_summary_has_a_row_for_every_round(summary: dict[str, Any]) -> None:
    assert [row["round"] for row in summary["rounds"]] == [0, 1, 2]


def test_the_summary_names_the_weights(run: Run, summary: dict[str, Any]) -> None:
    named = [row["weights"] for row in summary["rounds"][1:]]
    assert named == ["weights/round-1.pth", "weights/round-2.pth"] and all((run.output / n).is_file() for n in named)


def test_the_summary_says_what_the_refinement_found(summary: dict[str, Any]) -> None:
    found = [row.get("certain") for row in summary["rounds"]]
    assert found[0] is None and found[2] is None and isinstance(found[1], int), f"{found}"


def test_the_summary_has_the_deviations_that_were_shown(run: Run, summary: dict[str, Any]) -> None:
    assert summary["deviations"] and all(text in run.shown.out for text in summary["deviations"])


def test_the_summary_has_settings_and_label_values(run: Run, summary: dict[str, Any]) -> None:
    assert (summary["settings"]["root"], summary["label_values"]) == (str(run.root), [0, 1, 2, 3])


def test_the_end_says_what_comes_next(run: Run) -> None:
    assert f"semisamo1 test --root {run.root} --weights {run.output / 'weights' / 'round-2.pth'}" in run.shown.text


def test_for_machines_there_is_one_json_object(published: Path, tmp_path: Path) -> None:
    shown = reproduce(published, tmp_path / "output", "--iterations", 1, "--json")
    assert shown.json()["output"] == str(tmp_path / "output")


def test_the_output_folder_is_named_when_none_is_given(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shell("reproduce", "--root", published, "--generalist", "registration", "--rounds", 0, "--device", "cpu")
    assert (tmp_path / "reproduce-mt-1337" / "summary.json").is_file()


def test_the_labelled_case_is_not_predicted(run: Run) -> None:
    names = sorted(path.stem for path in (run.output / "work" / "probabilities" / "2").iterdir())
    assert names == ["p1", "p2"]


def test_more_labelled_cases_are_asked_for(published: Path, tmp_path: Path) -> None:
    shown = reproduce(published, tmp_path / "output", "--labeled-num", 2, "--iterations", 1)
    assert shown.code == DONE and "2 labelled, 1 unlabelled" in shown.text, shown.text


def test_the_log_has_the_losses(run: Run) -> None:
    rows, _ = files.read_lines(run.output / "log.jsonl")
    assert [row["round"] for row in rows if row["kind"] == "losses" and row["iteration"] == 4] == [1, 2]


# ---------------------------------------------------------------------- without a checkpoint


@pytest.mark.parametrize(
    "options", [("--generalist", "sam-med3d"), ("--learner", "semisam"), ("--learner", "semisam+")]
)
@pytest.mark.parametrize("expected", [NAME, "semisamo1 checkpoint fetch", "--generalist registration"])
def test_without_the_checkpoint_it_stops_and_names_it(
    published: Path, tmp_path: Path, no_checkpoint: Path, options: tuple[str, str], expected: str
) -> None:
    shown = reproduce(published, tmp_path / "output", *options)
    assert shown.code == WRONG_USE and expected in shown.text, shown.text


def test_without_the_checkpoint_nothing_is_computed(published: Path, tmp_path: Path, no_checkpoint: Path) -> None:
    shell("reproduce", "--root", published, "--output", tmp_path / "output")
    assert not (tmp_path / "output" / "work").exists()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (("--generalist", "sam-med3d"), ("--generalist", "registration")),
        (("--learner", "semisam"), ("--learner", "semisam", "--checkpoint", "random")),
        (("--patch", 18, 18, 18), ("--patch", 16, 16, 16)),
        (("--learner", "sloth"), ("--learner", "mt")),
    ],
)
def test_a_run_that_was_refused_does_not_stand_in_the_way(
    published: Path, tmp_path: Path, no_checkpoint: Path, wrong: tuple[object, ...], right: tuple[object, ...]
) -> None:
    """Who follows the advice of the error types the same command with one change: the same output."""
    refused = reproduce(published, tmp_path / "output", "--iterations", 1, *wrong)
    shown = reproduce(published, tmp_path / "output", "--iterations", 1, *right)
    assert (refused.code, shown.code) == (WRONG_USE, DONE), shown.text


def test_an_unknown_generalist_is_named(published: Path, tmp_path: Path) -> None:
    shown = reproduce(published, tmp_path / "output", "--generalist", "oracle")
    assert shown.code == WRONG_USE and "unknown generalist 'oracle'" in shown.text and "mind" in shown.text


# ---------------------------------------------------------------------- started again


def facts(output: Path) -> dict[str, tuple[int, str]]:
    """Time and hash of every file of weights."""
    found = [*(output / "weights").iterdir(), *(output / "work" / "weights").iterdir()]
    return {
        str(path.relative_to(output)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in found
    }


@pytest.fixture(scope="module")
def again(run: Run) -> tuple[dict[str, Any], dict[str, Any], Shown]:
    """Weights before and after the finished run was started again."""
    before = facts(run.output)
    shown = reproduce(run.root, run.output, "--rounds", 2, "--iterations", 4)
    return before, facts(run.output), shown


def test_started_again_it_finishes(again: tuple[dict[str, Any], dict[str, Any], Shown]) -> None:
    assert again[2].code == DONE, again[2].text


def test_started_again_it_trains_nothing(again: tuple[dict[str, Any], dict[str, Any], Shown]) -> None:
    assert len(again[0]) == 4 and again[1] == again[0], "weights of finished rounds were written again"


def test_started_again_the_summary_is_whole(run: Run, again: tuple[dict[str, Any], dict[str, Any], Shown]) -> None:
    assert len(files.read_json(run.output / "summary.json")["rounds"]) == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--seed", 5), "seed"),
        (("--iterations", 5), "iterations"),
        (("--learner", "uamt"), "learner"),
        (("--labeled-num", 2), "labelled"),
        (("--patch", 16, 16, 8), "patch"),
        (("--validate", "val.txt"), "validate"),
    ],
)
def test_other_settings_in_the_same_output_are_refused(run: Run, options: tuple[object, ...], expected: str) -> None:
    shown = reproduce(run.root, run.output, "--rounds", 2, "--iterations", 4, *options)
    assert shown.code == WRONG_USE and f"holds a run with other {expected}" in shown.text, shown.text


def test_a_run_of_an_older_program_goes_on(published: Path, tmp_path: Path) -> None:
    """Its settings know nothing of what came later."""
    reproduce(published, tmp_path, "--rounds", 0)
    path = tmp_path / "config.json"
    files.write_json(path, {key: one for key, one in files.read_json(path).items() if key not in BEFORE})
    shown = reproduce(published, tmp_path, "--rounds", 0)
    assert shown.code == DONE, shown.text


def test_another_list_in_the_same_output_is_refused(layout: Path, tmp_path: Path) -> None:
    """The first case of the list is the template; results of another one must not be taken for its own."""
    reproduce(layout, tmp_path / "output", "--rounds", 0)
    write_names(layout, "train", ["p1", "p0", "p2"])
    shown = reproduce(layout, tmp_path / "output", "--rounds", 0)
    assert shown.code == WRONG_USE and "holds a run with other labelled" in shown.text, shown.text


def test_a_folder_moved_elsewhere_is_other_data(run: Run, layout: Path) -> None:
    shown = reproduce(layout, run.output, "--rounds", 2, "--iterations", 4)
    assert shown.code == WRONG_USE and "holds a run with other root" in shown.text, shown.text


@pytest.mark.parametrize("asked", [2, 4, 6, 10], ids=["registration", "round 1", "prediction 1", "round 2"])
def test_stopped_and_started_again_it_ends_bitwise_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    questions = iter(range(1, 100))

    def ctrl_c(_: object) -> bool:
        if next(questions) == asked:
            raise KeyboardInterrupt
        return False

    with monkeypatch.context() as patched:
        patched.setattr(method_commands.Lines, "should_stop", ctrl_c, raising=False)
        stopped = reproduce(run.root, tmp_path / "output", "--rounds", 2, "--iterations", 4)
    assert stopped.code != DONE and not (tmp_path / "output" / "summary.json").exists(), "it was to be stopped"
    shown = reproduce(run.root, tmp_path / "output", "--rounds", 2, "--iterations", 4)
    assert shown.code == DONE, shown.text
    same = [same_tensors(weights_of(tmp_path / "output", n), weights_of(run.output, n)) for n in (1, 2)]
    assert same == [True, True], f"weights of rounds 1 and 2 equal those of the undisturbed run: {same}"


def test_rounds_differ(run: Run) -> None:
    """Else the test before would compare nothing."""
    assert not same_tensors(weights_of(run.output, 1), weights_of(run.output, 2))


def test_another_seed_gives_other_weights(run: Run, tmp_path: Path) -> None:
    reproduce(run.root, tmp_path / "output", "--iterations", 4, "--seed", 1)
    assert not same_tensors(weights_of(tmp_path / "output", 1), weights_of(run.output, 1))


# ---------------------------------------------------------------------- labels that nobody may read


@pytest.mark.parametrize("learner", ["mt", "dtc", "semisam+"])
def test_labels_of_unlabelled_cases_are_never_read(layout: Path, tmp_path: Path, learner: str) -> None:
    for name in ("p1", "p2"):
        with h5py.File(layout / "data" / f"{name}.h5", "r+") as file:
            shape = file["label"].shape
            del file["label"]  # its voxels lie in another file, which is not there: whoever reads them fails
            file.create_dataset("label", shape, "u1", external=[("absent.raw", 0, math.prod(shape))])
        with pytest.raises(OSError, match="external"):
            stored(layout, name)
    shown = reproduce(layout, tmp_path / "output", "--learner", learner, "--checkpoint", "random", "--rounds", 2)
    assert shown.code == DONE, shown.text


def test_labels_of_unlabelled_cases_change_nothing(run: Run, tmp_path: Path) -> None:
    other = write_layout(tmp_path / "other")
    for name in ("p1", "p2"):
        rewrite(other, name, label=None)
    reproduce(other, tmp_path / "output", "--rounds", 2, "--iterations", 4)
    assert same_tensors(weights_of(tmp_path / "output", 2), weights_of(run.output, 2))


def test_without_validate_no_label_of_the_list_is_read(layout: Path, tmp_path: Path) -> None:
    rewrite(layout, "p2", label=None)  # it is in val.txt too
    assert reproduce(layout, tmp_path / "output").code == DONE


# ---------------------------------------------------------------------- --validate


@pytest.fixture(scope="module")
def judged(
    published: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Shown, Path, dict[int, dict[str, Tensor]]]:
    """A run whose second iteration of four is judged the best; the network after every iteration."""
    seen: dict[int, dict[str, Tensor]] = {}
    values: Iterator[float] = iter([0.2, 0.9, 0.9, 0.5])
    real = training._keep_best

    def listening(number: int, iteration: int, learner: Any, *rest: Any) -> None:
        seen[iteration] = {name: one.clone() for name, one in learner.state_dict()["teacher"].items()}
        real(number, iteration, learner, *rest)

    output = tmp_path_factory.mktemp("judged") / "output"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "JUDGED_EVERY", 1)
        patched.setattr(training, "_keep_best", listening)
        patched.setattr(Judge, "__call__", lambda *_: next(values))
        shown = reproduce(published, output, "--iterations", 4, "--validate", "val.txt")
    return shown, output, seen


Judged = tuple[Shown, Path, dict[int, dict[str, Tensor]]]


def test_the_best_weights_are_kept(judged: Judged) -> None:
    _, output, seen = judged
    same = [iteration for iteration, state in seen.items() if same_tensors(state, weights_of(output, 1))]
    assert same == [2], f"the network after iteration 2 was expected, got that after {same}"


def test_the_summary_says_what_was_judged(judged: Judged) -> None:
    found = files.read_json(judged[1] / "summary.json")["rounds"][1]["validation"]
    expected = {"best": 0.9, "iteration": 2, "values": {"1": 0.2, "2": 0.9, "3": 0.9, "4": 0.5}}
    assert found == expected


def test_what_was_judged_is_a_curve(judged: Judged) -> None:
    assert curves(judged[1] / "curves" / "round-1")["validation Dice"] == pytest.approx([0.2, 0.9, 0.9, 0.5])


def test_what_was_judged_is_shown(judged: Judged) -> None:
    assert "judged: round 1, iteration 2, value 0.9" in judged[0].text


def test_the_start_says_that_labels_are_read(judged: Judged) -> None:
    assert "the best weights on val.txt are kept, as released: those labels are read" in judged[0].text


def test_the_best_weights_predict(
    published: Path, tmp_path: Path, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round 1 with the best weights, which is what the pseudo-labels of round 2 come from."""
    reproduce(published, tmp_path / "last", "--iterations", 4)
    found = [np.load(one / "work" / "probabilities" / "1" / "p1.npy") for one in (judged[1], tmp_path / "last")]
    assert not np.array_equal(*found), "the last weights predicted"


def test_validating_does_not_change_what_is_learnt(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judging must draw no random number, and give the dropout back."""
    monkeypatch.setattr(training, "JUDGED_EVERY", 1)
    reproduce(published, tmp_path / "a", "--iterations", 4, "--validate", "val.txt")
    reproduce(published, tmp_path / "b", "--iterations", 4)
    last = [Store(tmp_path / name / "work").tensors("weights", "round-1.pt")["learner"]["teacher"] for name in "ab"]
    assert same_tensors(*last), "the weights after the last iteration differ"


def test_a_real_judge_gives_a_dice(published: Path, tmp_path: Path) -> None:
    shown = reproduce(published, tmp_path / "output", "--iterations", 1, "--validate", "val.txt")
    found = files.read_json(tmp_path / "output" / "summary.json")["rounds"][1]["validation"]["best"]
    assert 0 <= found <= 1, shown.text


def test_a_stopped_run_with_validation_ends_the_same(
    published: Path, tmp_path: Path, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {1: 0.2, 2: 0.9, 3: 0.9, 4: 0.5}
    asked: list[int] = []
    real = training._keep_best

    def listening(number: int, iteration: int, *rest: Any) -> None:
        asked.append(iteration)
        real(number, iteration, *rest)
        if len(asked) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "JUDGED_EVERY", 1)
    monkeypatch.setattr(training, "_keep_best", listening)
    monkeypatch.setattr(Judge, "__call__", lambda *_: values[asked[-1]])
    for _ in range(2):
        reproduce(published, tmp_path / "output", "--iterations", 4, "--validate", "val.txt")
    assert same_tensors(weights_of(tmp_path / "output", 1), weights_of(judged[1], 1)), f"judged at {asked}"


@pytest.fixture
def by_hand(tmp_path: Path) -> Judge:
    """A judge with one case of 4×4×4 voxels whose label has the values 3 (two voxels) and 7 (one voxel)."""
    label = np.zeros((4, 4, 4), np.uint8)
    label[0, 0, :2] = 3
    label[1, 1, 1] = 7
    image = np.random.default_rng(0).normal(size=label.shape).astype(np.float32)
    write_published(tmp_path / "data" / "v.h5", image, label)
    return Judge(tmp_path, ["v"], ClassMap((0, 3, 7)))


def test_the_judge_reads_the_labels_and_gives_the_mean_dice(by_hand: Judge) -> None:
    """Class 1: one of two voxels found, 2/3. Class 2: nothing found, 0. Mean 1/3."""

    def predict(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        probabilities = np.zeros((3, *image.shape), np.float16)
        probabilities[0] = 0.5
        probabilities[1, 0, 0, 0] = 1
        return probabilities

    assert by_hand(predict, 3) == pytest.approx(1 / 3)


def test_names_of_a_validation_list_may_have_a_suffix(layout: Path, tmp_path: Path) -> None:
    write_names(layout, "val", ["p2.h5"])
    assert reproduce(layout, tmp_path / "output", "--validate", "val.txt").code == DONE


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["p2", "ghost", "phantom.h5"], "val.txt names 2 cases that are not in"),
        (["p2", "ghost"], "'ghost'"),
        ([], "names no case"),
    ],
)
def test_a_validation_list_with_absent_files(layout: Path, tmp_path: Path, names: list[str], expected: str) -> None:
    write_names(layout, "val", names)
    shown = reproduce(layout, tmp_path / "output", "--validate", "val.txt")
    assert shown.code == WRONG_USE and expected in shown.text, shown.text


def test_the_list_of_the_layout_wins_over_one_that_lies_here(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_names(tmp_path, "val", ["ghost"])
    monkeypatch.chdir(tmp_path)
    assert reproduce(published, tmp_path / "output", "--validate", "val.txt", "--rounds", 0).code == DONE


def test_a_validation_list_may_lie_elsewhere(published: Path, tmp_path: Path) -> None:
    write_names(tmp_path, "mine", ["ghost"])
    shown = reproduce(published, tmp_path / "output", "--validate", tmp_path / "mine.txt")
    assert shown.code == WRONG_USE and "mine.txt names 1 cases that are not in" in shown.text, shown.text


def test_a_validation_list_that_is_not_there(published: Path, tmp_path: Path) -> None:
    shown = reproduce(published, tmp_path / "output", "--validate", "value.txt")
    assert shown.code == WRONG_USE and "value.txt does not exist" in shown.text


def test_a_validation_case_without_label(layout: Path, tmp_path: Path) -> None:
    rewrite(layout, "p2", label=None)
    shown = reproduce(layout, tmp_path / "output", "--validate", "val.txt")
    assert shown.code == WRONG_USE and "p2" in shown.text and "'label'" in shown.text, shown.text


def test_a_validation_label_with_a_value_that_the_template_lacks(layout: Path, tmp_path: Path) -> None:
    label = stored(layout, "p2")
    label[0, 0, 0] = 9
    rewrite(layout, "p2", label=label)
    shown = reproduce(layout, tmp_path / "output", "--validate", "val.txt")
    assert shown.code == WRONG_USE and "p2" in shown.text and "[9]" in shown.text, shown.text


# ---------------------------------------------------------------------- bad input


def no_label(root: Path) -> None:
    rewrite(root, "p0", label=None)


def no_image(root: Path) -> None:
    rewrite(root, "p0", image=None)


def no_unlabelled_image(root: Path) -> None:
    rewrite(root, "p1", image=None)


def flat(root: Path) -> None:
    rewrite(root, "p0", image=stored(root, "p0", "image")[:, :, 3])


def flat_unlabelled(root: Path) -> None:
    rewrite(root, "p1", image=stored(root, "p1", "image")[:, :, 3])


def flat_label(root: Path) -> None:
    rewrite(root, "p0", label=stored(root, "p0")[:, :, 3])


def label_of_another_case(root: Path) -> None:
    rewrite(root, "p0", label=stored(root, "p0")[1:])


def empty_label(root: Path) -> None:
    rewrite(root, "p0", label=np.zeros_like(stored(root, "p0")))


def fractions_in_label(root: Path) -> None:
    rewrite(root, "p0", label=stored(root, "p0") * 0.5)


def negative_label(root: Path) -> None:
    rewrite(root, "p0", label=-stored(root, "p0").astype(np.int16))


def not_hdf5(root: Path) -> None:
    (root / "data" / "p0.h5").write_bytes(b"nonsense")


def not_hdf5_unlabelled(root: Path) -> None:
    (root / "data" / "p1.h5").write_bytes(b"nonsense")


def no_list(root: Path) -> None:
    (root / "train.txt").unlink()


def empty_list(root: Path) -> None:
    (root / "train.txt").write_text("\n  \n", encoding="utf-8")


def absent_cases(root: Path) -> None:
    write_names(root, "train", ["p0", "ghost", "p1", "spook.h5"])


def one_case(root: Path) -> None:
    write_names(root, "train", ["p0"])


def the_same_case_twice(root: Path) -> None:
    write_names(root, "train", ["p0", "p1", "p0.h5"])


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (no_label, ["p0", "has no dataset 'label'", "['image']", "name another case in the list"]),
        (no_image, ["p0", "has no dataset 'image'", "['label']"]),
        (no_unlabelled_image, ["p1", "has no dataset 'image'", "['label']"]),
        (flat, ["p0", "2D", "3D is needed"]),
        (flat_unlabelled, ["p1", "2D", "3D is needed"]),
        (flat_label, ["p0", "2D", "3D is needed"]),
        (label_of_another_case, ["p0", "do not fit together"]),
        (empty_label, ["p0", "empty", "expected at least one value above 0"]),
        (fractions_in_label, ["p0", "float64", "whole numbers"]),
        (negative_label, ["p0", "-3", "whole numbers"]),
        (not_hdf5, ["p0"]),
        (not_hdf5_unlabelled, ["p1", "cannot be read"]),
        (no_list, ["train.txt does not exist", "expected a text file with one case name a line"]),
        (empty_list, ["train.txt names no case", "expected one case name a line"]),
        (absent_cases, ["names 2 cases that are not in", "'ghost', 'spook'"]),
        (one_case, ["1 labelled cases were asked for", "names 1", "name more cases"]),
        (the_same_case_twice, ["p0", "more than once"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_input_is_named(layout: Path, tmp_path: Path, spoil: Callable[[Path], None], expected: list[str]) -> None:
    spoil(layout)
    shown = reproduce(layout, tmp_path / "output")
    absent = [text for text in expected if text not in shown.text]
    assert shown.code == WRONG_USE and not absent, f"{absent} expected in: {shown.text}"


@pytest.mark.parametrize("number", [-1, 0, 3, 4])
def test_a_wrong_number_of_labelled_cases(published: Path, tmp_path: Path, number: int) -> None:
    shown = reproduce(published, tmp_path / "output", "--labeled-num", number)
    expected = f"{number} labelled cases were asked for; train.txt in {published} names 3"
    assert shown.code == WRONG_USE and expected in shown.text, shown.text


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    shown = reproduce(tmp_path / "nowhere", tmp_path / "output")
    assert shown.code == WRONG_USE and "nowhere is not a folder" in shown.text


def test_bad_input_leaves_no_folder(layout: Path, tmp_path: Path) -> None:
    no_list(layout)
    reproduce(layout, tmp_path / "output")
    assert not (tmp_path / "output").exists() or not list((tmp_path / "output").iterdir())


def test_names_with_the_suffix_are_accepted(run: Run, tmp_path: Path) -> None:
    other = write_layout(tmp_path / "other")
    write_names(other, "train", ["p0.h5", "p1.h5", "p2.h5"])
    reproduce(other, tmp_path / "output", "--rounds", 2, "--iterations", 4)
    assert same_tensors(weights_of(tmp_path / "output", 1), weights_of(run.output, 1))


def test_a_volume_smaller_than_the_patch_is_no_obstacle(layout: Path, tmp_path: Path) -> None:
    rewrite(layout, "p1", image=stored(layout, "p1", "image")[3:13, 4:13, 3:11])
    shown = reproduce(layout, tmp_path / "output")
    assert shown.code == DONE, shown.text


def test_label_values_with_gaps_become_classes_in_ascending_order(layout: Path, tmp_path: Path) -> None:
    rewrite(layout, "p0", label=np.array([0, 200, 2, 7], np.uint8)[stored(layout, "p0")])
    reproduce(layout, tmp_path / "output", "--iterations", 1)
    assert files.read_json(tmp_path / "output" / "summary.json")["label_values"] == [0, 2, 7, 200]


def test_a_second_labelled_case_may_lack_a_value(layout: Path, tmp_path: Path) -> None:
    label = stored(layout, "p1")
    rewrite(layout, "p1", label=np.where(label == 2, 0, label))
    shown = reproduce(layout, tmp_path / "output", "--labeled-num", 2, "--learner", "dtc", "--iterations", 1)
    assert shown.code == DONE and "4 classes" in shown.text, shown.text


def test_axis_order_of_a_file_is_obeyed(layout: Path, tmp_path: Path) -> None:
    image, label = (stored(layout, "p0", key).transpose(2, 0, 1) for key in ("image", "label"))
    rewrite(layout, "p0", image=image, label=label)
    with h5py.File(layout / "data" / "p0.h5", "r+") as file:
        file.attrs["axis_order"] = "zxy"
    reproduce(layout, tmp_path / "a", "--iterations", 2)
    reproduce(write_layout(tmp_path / "plain"), tmp_path / "b", "--iterations", 2)
    assert same_tensors(weights_of(tmp_path / "a", 1), weights_of(tmp_path / "b", 1))


def test_an_axis_order_that_is_none(layout: Path, tmp_path: Path) -> None:
    with h5py.File(layout / "data" / "p1.h5", "r+") as file:
        file.attrs["axis_order"] = "ijk"
    shown = reproduce(layout, tmp_path / "output")
    assert shown.code == WRONG_USE and "p1" in shown.text and "'ijk'" in shown.text, shown.text


def test_an_image_without_numbers_is_named(layout: Path, tmp_path: Path) -> None:
    image = stored(layout, "p1", "image")
    image[5:9, 5:9] = np.nan
    rewrite(layout, "p1", image=image)
    shown = reproduce(layout, tmp_path / "output")
    assert shown.code == WRONG_USE and "p1" in shown.text and "NaN" in shown.text, shown.text
