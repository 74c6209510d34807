"""The simulated reviewer: what it corrects in which order, what it leaves behind, and that it goes on later."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from method_helpers import WRONG_USE
from numpy.typing import NDArray
from shell_runner import shell

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.observer import Silent, Stopped
from SemiSAMO1Lib.image_io import read_volume, write_volume
from SemiSAMO1Lib.job import running_training
from SemiSAMO1Lib.phantoms import PhantomSettings, write_cohort
from SemiSAMO1Lib.project import Project, ProjectError, Review
from SemiSAMO1Lib.shell.console import ending_as_ctrl_c
from SemiSAMO1Lib.tasks import simulate as module
from SemiSAMO1Lib.volume import Volume

SMALL = PhantomSettings(spacing_mm=(4.5, 4.0, 4.0))
TINY = {
    "patch_voxels": 4096,
    "filters": 4,
    "neighbours": 2,
    "registration": {"use_affine": False},
    "device": "cpu",
    "threads": 1,
}
OPTIONS: tuple[Any, ...] = ("--steps", "1,2", "--rounds", 1, "--iterations", 4, "--orders", "queue,entropy")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Six phantoms, five of them to segment; two orders, one and two corrected."""
    folder = tmp_path_factory.mktemp("effort")
    write_cohort(folder / "cohort", 6, settings=SMALL)
    project, labels = folder / "project", folder / "cohort" / "labels"
    shell("init", project, "--images", folder / "cohort" / "images")
    shell("template", project, "--case", "phantom_000", "--labels", labels / "phantom_000.nrrd")
    files.write_json(folder / "tiny.json", TINY)
    given = ("--references", labels, "--output", folder / "effort", "--config", folder / "tiny.json")
    done = shell("simulate", project, *given, *OPTIONS, "--json")
    assert done.code == 0, done.text
    return folder, done.json()


def test_every_order_has_a_row_for_every_step(played: tuple[Path, dict[str, Any]]) -> None:
    steps = {order: [row["corrected"] for row in rows] for order, rows in played[1]["curves"].items()}
    assert steps == {"queue": [0, 1, 2], "entropy": [0, 1, 2]}


def test_all_begin_with_the_same_predictions(played: tuple[Path, dict[str, Any]]) -> None:
    assert len({(rows[0]["untouched"], rows[0]["common"]) for rows in played[1]["curves"].values()}) == 1


def test_orders_are_compared_over_the_cases_that_none_corrects(played: tuple[Path, dict[str, Any]]) -> None:
    rows = {order: files.read_json(played[0] / "effort" / order / "rows.json") for order in ("queue", "entropy")}
    common = set(rows["queue"][0]["dice"]) - {case for one in rows.values() for row in one for case in row["cases"]}
    last = played[1]["differences"][-1]
    wanted = sum(rows["queue"][2]["dice"][case] - rows["entropy"][2]["dice"][case] for case in common) / len(common)
    assert (last["order"], last["against"], last["corrected"], last["cases"]) == ("queue", "entropy", 2, len(common))
    assert last["mean"] == pytest.approx(wanted, abs=1e-4) and last["low"] <= last["mean"] <= last["high"]


def test_an_excluded_case_takes_no_part(played: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """It has a reference, and no prediction."""
    shutil.copytree(played[0] / "project", tmp_path / "project")
    Project(tmp_path / "project").exclude("phantom_003")
    labels, config = played[0] / "cohort" / "labels", played[0] / "tiny.json"
    given = ("--references", labels, "--output", tmp_path / "effort", "--config", config)
    quickly = ("--steps", "1", "--rounds", 0, "--orders", "queue,entropy")
    done = shell("simulate", tmp_path / "project", *given, *quickly, "--json")
    assert done.code == 0, done.text
    rows = files.read_json(tmp_path / "effort" / "queue" / "rows.json")
    assert done.json()["cases"] == 4 and "phantom_003" not in rows[-1]["dice"]


def test_references_are_all_that_has_to_be_given(played: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """It plays the product: every order there is, and trainings that go on from each other."""
    shutil.copytree(played[0] / "project", tmp_path / "project")
    labels, config = played[0] / "cohort" / "labels", played[0] / "tiny.json"
    quickly = ("--config", config, "--steps", "1", "--rounds", 0)
    done = shell("simulate", tmp_path / "project", "--references", labels, *quickly, "--json")
    assert done.code == 0, done.text
    assert list(done.json()["curves"]) == ["queue", "random", "entropy"]
    assert (tmp_path / "project-effort" / "effort.png").is_file()
    assert files.read_json(tmp_path / "project-effort" / "plan.json")["go_on"] is True


def test_what_a_file_of_parameters_says_holds_where_no_option_does(
    played: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def planned(project: Project, references: Path, output: Path, plan: module.Plan, observer: object) -> None:
        seen.append(plan.parameters)
        raise ValueError("seen")

    monkeypatch.setattr("SemiSAMO1Lib.tasks.simulate.simulate", planned)
    files.write_json(tmp_path / "given.json", {"preset": "standard", "seed": 3, "rounds": 5})
    given = (played[0] / "project", "--references", tmp_path, "--output", tmp_path / "effort")
    shell("simulate", *given, "--config", tmp_path / "given.json", "--rounds", 1)
    shell("simulate", *given)
    assert seen == [{"preset": "standard", "seed": 3, "rounds": 1}, {"preset": "quick", "seed": 0}]


def test_a_file_of_parameters_that_is_a_list_is_refused(played: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    files.write_json(tmp_path / "list.json", [1])
    given = ("--references", tmp_path, "--output", tmp_path / "effort", "--config", tmp_path / "list.json")
    shown = shell("simulate", played[0] / "project", *given)
    assert shown.code == WRONG_USE and "must hold one JSON object" in shown.text


DATA = Path(os.environ.get("SEMISAMO1_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


@pytest.mark.real_scans
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real scans in {DATA}; set SEMISAMO1_DATA to test on them")
def test_the_loop_on_real_scans(tmp_path: Path) -> None:
    """Five hippocampi, registration alone: one is corrected, the others are carried from two labelled scans then."""
    images = sorted((DATA / "hippocampus" / "images").iterdir())[:5]
    labels, project = DATA / "hippocampus" / "labels", tmp_path / "project"
    for path in images:
        (tmp_path / "scans").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "scans")
    files.write_json(tmp_path / "tiny.json", {**TINY, "neighbours": 1})
    shell("init", project, "--images", tmp_path / "scans")
    shell("template", project, "--case", images[0].name.split(".")[0], "--labels", labels / images[0].name)
    given = ("--references", labels, "--config", tmp_path / "tiny.json", "--orders", "queue")
    done = shell("simulate", project, *given, "--steps", "1", "--rounds", 0, "--json")
    assert done.code == 0, done.text
    before, after = done.json()["curves"]["queue"]
    assert (before["corrected"], after["corrected"]) == (0, 1)
    assert after["common"] > before["common"] - 0.02 > 0.6, f"{before} {after}: a second labelled scan does harm"


def test_the_references_become_corrections(played: tuple[Path, dict[str, Any]]) -> None:
    project = Project(played[0] / "effort" / "queue")
    corrected = [case for case in project.state.cases if case.review == Review.CORRECTED]
    assert len(corrected) == 2 and all(project.label_record(one)["reviewer"] == "simulated" for one in corrected)


def test_entropy_takes_the_least_certain(played: tuple[Path, dict[str, Any]]) -> None:
    start = Project(played[0] / "effort" / "start")
    rows = module.predictions(start)
    worst = min(rows, key=lambda case: (-rows[case]["scores"]["label_uncertainty"], case))
    assert files.read_json(played[0] / "effort" / "entropy" / "rows.json")[1]["cases"] == [worst]


def test_the_project_itself_is_not_changed(played: tuple[Path, dict[str, Any]]) -> None:
    project = Project(played[0] / "project")
    assert project.state.current_training is None and not project.reviews.exists()


def test_a_picture_is_drawn(played: tuple[Path, dict[str, Any]]) -> None:
    assert (played[0] / "effort" / "effort.png").stat().st_size > 10_000


def test_what_is_done_is_not_done_again(played: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: object) -> None:
        raise AssertionError("a training was started again")

    monkeypatch.setattr(module, "_train", no_more)
    folder = played[0]
    given = ("--references", folder / "cohort" / "labels", "--output", folder / "effort")
    again = shell("simulate", folder / "project", *given, "--config", folder / "tiny.json", *OPTIONS, "--json")
    assert again.code == 0 and again.json()["curves"] == played[1]["curves"], again.text


def spoiled(folder: Path, tmp_path: Path, spoil: Callable[[NDArray[Any]], NDArray[Any]]) -> Path:
    """The references, of which one is another."""
    labels = tmp_path / "labels"
    shutil.copytree(folder / "cohort" / "labels", labels)
    label = read_volume(labels / "phantom_003.nrrd")
    write_volume(labels / "phantom_003.nrrd", Volume(spoil(label.array.astype(np.uint8)), label.geometry))
    return labels


def test_a_reference_that_shows_nothing_is_a_correction(played: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """All labels are absent from that scan."""
    labels = spoiled(played[0], tmp_path, np.zeros_like)
    project = module._copy(Project(played[0] / "effort" / "start"), tmp_path / "copy")
    module._require_usable(project, {"phantom_003": labels / "phantom_003.nrrd"})
    module._correct(project, "phantom_003", labels / "phantom_003.nrrd")
    assert project.label_record(project.state.case("phantom_003"))["absent"] == list(project.state.labels.values)


def test_without_a_template_nothing_is_simulated(played: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    project = tmp_path / "none"
    shell("init", project, "--images", played[0] / "cohort" / "images")
    given = ("--references", played[0] / "cohort" / "labels", "--output", tmp_path / "effort")
    refused = shell("simulate", project, *given, "--steps", "1,2")
    assert refused.code == 2 and "label one as the template first" in refused.text, refused.text


def test_a_reference_that_cannot_be_used_is_found_before_anything_is_trained(
    played: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    def other_values(array: NDArray[Any]) -> NDArray[Any]:
        array[0, 0, 0] = 77
        return array

    given = ("--references", spoiled(played[0], tmp_path, other_values), "--output", tmp_path / "effort")
    refused = shell("simulate", played[0] / "project", *given, "--steps", "1,2")
    assert refused.code == 2 and "has label 77, which the template lacks" in refused.text
    assert not (tmp_path / "effort" / "start").exists(), "nothing was trained"


def test_a_reference_on_another_grid_is_found_before_anything_is_trained(
    played: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    labels = spoiled(played[0], tmp_path, np.asarray)
    label = read_volume(labels / "phantom_003.nrrd")
    finer = replace(label.geometry, spacing=tuple(mm / 2 for mm in label.geometry.spacing))
    write_volume(labels / "phantom_003.nrrd", Volume(label.array, finer))
    given = ("--references", labels, "--output", tmp_path / "effort", "--steps", "1,2")
    refused = shell("simulate", played[0] / "project", *given)
    assert refused.code == WRONG_USE and "lies on another grid than the scan of phantom_003" in refused.text
    assert not (tmp_path / "effort" / "start").exists(), "nothing was trained"


def test_steps_with_other_references_are_not_taken_for_these(
    played: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    labels = spoiled(played[0], tmp_path, lambda array: np.where(array == 1, 0, array))
    given = ("--references", labels, "--output", played[0] / "effort", "--config", played[0] / "tiny.json")
    refused = shell("simulate", played[0] / "project", *given, *OPTIONS)
    assert refused.code == WRONG_USE and "holds a simulation with other references" in refused.text


def test_a_simulation_that_is_stopped_takes_its_training_with_it(
    played: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    class Impatient(Silent):
        def should_stop(self) -> bool:
            return running_training(tmp_path / "effort" / "start" / "jobs") is not None

    plan = module.Plan(["queue"], [1], {**TINY, "preset": "quick", "iterations": 100_000})
    with pytest.raises(Stopped):
        module.simulate(
            Project(played[0] / "project"), played[0] / "cohort" / "labels", tmp_path / "effort", plan, Impatient()
        )
    deadline = time.monotonic() + 60
    while (left := running_training(tmp_path / "effort" / "start" / "jobs")) is not None:
        assert time.monotonic() < deadline, f"{left.id} goes on by itself"
        time.sleep(0.2)


def test_the_folder_of_a_training_that_goes_on_is_left_alone(
    played: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    job = module.request_training(module._copy(Project(played[0] / "project"), folder), TINY)
    files.write_json(job.status, {"state": "running", "heartbeat": time.time(), "host": "another computer"})
    with pytest.raises(ProjectError, match=f"{job.id} is under way in"):
        module._copy(Project(played[0] / "project"), folder)
    assert job.path.is_dir()


def test_a_project_that_was_reviewed_is_refused(played: tuple[Path, dict[str, Any]]) -> None:
    folder = played[0]
    given = ("--references", folder / "cohort" / "labels", "--output", folder / "third")
    refused = shell("simulate", folder / "effort" / "queue", *given, "--steps", "1")
    assert refused.code == 2 and "2 cases of this project were reviewed" in refused.text


def test_a_project_that_moved_with_its_scans_is_played_too(played: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A copy lies deeper than its project: it must know where the scans are now."""
    for name in ("project", "cohort"):
        shutil.copytree(played[0] / name, tmp_path / "moved" / name)
    (played[0] / "cohort").rename(played[0] / "away")
    try:
        copied = module._copy(Project(tmp_path / "moved" / "project"), tmp_path / "deep" / "er" / "copy")
        assert not copied.missing()
    finally:
        (played[0] / "away").rename(played[0] / "cohort")


def test_the_references_folder_is_not_written_into(played: tuple[Path, dict[str, Any]]) -> None:
    labels = played[0] / "cohort" / "labels"
    refused = shell("simulate", played[0] / "project", "--references", labels, "--output", labels, "--steps", "1")
    assert refused.code == 2 and "holds other files" in refused.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "3,1"), "growing numbers"),
        (("--steps", "one"), "growing numbers"),
        (("--orders", "alphabet"), "unknown order 'alphabet'"),
        (("--steps", "1,5"), "leave none untouched"),
    ],
)
def test_wrong_use_is_refused(played: tuple[Path, dict[str, Any]], options: tuple[str, ...], message: str) -> None:
    folder = played[0]
    given = ("--references", folder / "cohort" / "labels", "--output", folder / "other")
    refused = shell("simulate", folder / "project", *given, *options)
    assert refused.code == 2 and message in refused.text, refused.text


def test_kill_ends_it_as_ctrl_c_does() -> None:
    """Its training would go on by itself otherwise."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ending_as_ctrl_c():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before
