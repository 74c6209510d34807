"""What a training reads: the template's label and no other, unchanged images, known label values, enough disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_helpers import (
    events_of,
    image_of,
    labelled_project,
    make_project,
    make_training,
    run_to_end,
    truth_of,
)

from SemiSAMO1Lib import files
from SemiSAMO1Lib.image_io import read_volume, write_volume
from SemiSAMO1Lib.job import JobFolder, State, observe
from SemiSAMO1Lib.project import LabelError, Project, ProjectError, Role
from SemiSAMO1Lib.tasks import work
from SemiSAMO1Lib.tasks.inputs import read_inputs
from SemiSAMO1Lib.volume import Geometry, StoredVolume, Volume

pytestmark = pytest.mark.usefixtures("torch_left_alone")

#: A run that is over in a moment.
SHORT = {"rounds": 1, "iterations": 2}


def change_image(path: Path) -> None:
    """Another scan in the same place."""
    volume = read_volume(path)
    write_volume(path, Volume(volume.array + np.float32(1), volume.geometry))


def trap(path: Path) -> None:
    """A label file that nobody may open: whoever does waits for ever (a pipe) or reads nonsense (Windows)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
    else:
        path.write_bytes(b"not a label")


# ---------------------------------------------------------------------- the template's label only


def test_a_training_reads_the_templates_label_and_no_other(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path)
    project.add_label(names[1], truth_of(project, names[1]), role=Role.LABELLED)
    project.remove_label(names[1])
    job = make_training(project, **SHORT)
    shutil.rmtree(tmp_path / "cohort" / "labels")
    for name in names[1:]:
        trap(project.folder / "labels" / name / "1.seg.nrrd")
        trap(project.folder / "labels" / name / "draft.seg.nrrd")
        trap(job.inputs / "labels" / f"{name}.seg.nrrd")
        trap(tmp_path / "cohort" / "labels" / f"{name}.nrrd")
        trap(tmp_path / "cohort" / "images" / f"{name}-label.nrrd")
        trap(tmp_path / "cohort" / "images" / f"{name}.seg.nrrd")
    seen = run_to_end(job)
    assert seen.state is State.FINISHED, f"only the template's label may be read: {seen.message}\n{job.log_tail()}"


def test_a_training_reads_its_own_copy_of_the_label(tmp_path: Path) -> None:
    project, _ = labelled_project(tmp_path, 3)
    job = make_training(project, **SHORT)
    shutil.rmtree(project.folder / "labels")
    assert work(job.path) == 0, f"the label was copied when Train was pressed: {observe(job).message}"


def test_only_labels_in_force_are_copied(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path, 3)
    project.add_label(names[1], truth_of(project, names[1]), role=Role.LABELLED)
    project.remove_label(names[1])
    job = make_training(project)
    assert [path.name for path in (job.inputs / "labels").iterdir()] == [f"{names[0]}.seg.nrrd"]


def test_of_many_labelled_scans_only_the_template_is_kept_in_memory(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path, 3)
    project.add_label(names[1], truth_of(project, names[1]), role=Role.LABELLED)
    template, other = read_inputs(make_training(project)).labelled
    assert not isinstance(template.image, StoredVolume)
    assert isinstance(other.image, StoredVolume) and isinstance(other.label, StoredVolume)


def test_a_stored_label_is_read_as_class_indices(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path, 3)
    project.add_label(names[1], truth_of(project, names[1]), role=Role.LABELLED)
    label = read_inputs(make_training(project)).labelled[1].label
    assert np.array_equal(label.array, read_volume(truth_of(project, names[1])).array), "values 1, 2, 3 are indices too"


# ---------------------------------------------------------------------- changed and missing scans


@pytest.fixture
def damaged_cohort(tmp_path: Path) -> JobFolder:
    """A training of which one scan was changed and one removed after it was requested."""
    project, names = labelled_project(tmp_path)
    job = make_training(project, **SHORT)
    change_image(image_of(project, names[1]))
    image_of(project, names[2]).unlink()
    work(job.path)
    return job


def test_changed_and_missing_scans_are_skipped_and_the_run_goes_on(damaged_cohort: JobFolder) -> None:
    assert observe(damaged_cohort).state is State.FINISHED, observe(damaged_cohort).message
    index = files.read_json(damaged_cohort.index)
    assert [row["case"] for row in index["cases"]] == ["phantom_003"]
    reasons = {row["name"]: row["reason"] for row in index["skipped"]}
    assert "changed" in reasons["phantom_001"] and "missing" in reasons["phantom_002"], reasons
    assert {event["name"] for event in events_of(damaged_cohort, "skipped")} == {"phantom_001", "phantom_002"}


def test_a_scan_that_is_damaged_inside_is_skipped(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path)
    job = make_training(project, rounds=0)
    path = image_of(project, names[1])
    path.write_bytes(path.read_bytes()[:3000])
    rows = files.read_json(job.inputs / "cases.json")
    from SemiSAMO1Lib.project.cases import fingerprint

    rows["cases"][0]["fingerprint"] = fingerprint(path)  # damaged before it was added
    files.write_json(job.inputs / "cases.json", rows)
    work(job.path)
    assert [row["name"] for row in files.read_json(job.index)["skipped"]] == [names[1]]


def test_a_changed_template_scan_stops_before_any_work(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path, 3)
    job = make_training(project)
    change_image(image_of(project, names[0]))
    code = work(job.path)
    assert (code, (job.work / "plan.json").exists(), job.results.exists()) == (1, False, False)


def test_a_changed_template_scan_is_named(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path, 3)
    job = make_training(project)
    change_image(image_of(project, names[0]))
    work(job.path)
    assert f"labelled case {names[0]} cannot be used: the image was changed" in observe(job).message


@pytest.mark.parametrize("harm", ["changed", "missing"])
def test_a_further_labelled_scan_that_cannot_be_used_is_left_out_and_named(tmp_path: Path, harm: str) -> None:
    """A scan that somebody corrected and that is gone does not stop all further trainings."""
    project, names = labelled_project(tmp_path)
    project.add_label(names[1], truth_of(project, names[1]), role=Role.LABELLED)
    if harm == "changed":
        change_image(image_of(project, names[1]))
    else:
        image_of(project, names[1]).unlink()
    inputs = read_inputs(make_training(project, **SHORT))
    assert [one.id for one in inputs.labelled] == [names[0]]
    assert [row["name"] for row in inputs.skipped] == [names[1]] and harm in inputs.skipped[0]["reason"]


def test_the_results_say_which_labelled_scan_was_left_out(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path)
    project.add_label(names[1], truth_of(project, names[1]), role=Role.LABELLED)
    image_of(project, names[1]).unlink()
    job = make_training(project, **{**SHORT, "rounds": 0})
    work(job.path)
    assert observe(job).state is State.FINISHED, observe(job).message
    assert [row["name"] for row in files.read_json(job.index)["skipped"]] == [names[1]]
    assert [event["name"] for event in events_of(job, "skipped")] == [names[1]]


def test_without_a_template_the_first_labelled_scan_stands_for_it(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path)
    project.add_label(names[1], truth_of(project, names[1]), role=Role.LABELLED)
    project.exclude(names[0])
    image_of(project, names[1]).unlink()
    with pytest.raises(ProjectError, match=rf"image of case {names[1]}"):
        make_training(project)


def test_without_its_template_no_training_is_requested(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path)
    project.add_label(names[1], truth_of(project, names[1]), role=Role.LABELLED)
    change_image(image_of(project, names[0]))
    with pytest.raises(ProjectError, match=rf"image of case {names[0]} was changed"):
        make_training(project)


def test_a_failed_start_has_its_handshake_too(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path, 3)
    job = make_training(project)
    image_of(project, names[0]).unlink()
    work(job.path)
    assert [event["kind"] for event in events_of(job)] == ["handshake", "end"]


def test_a_label_that_was_changed_in_the_job_is_refused(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path, 3)
    job = make_training(project)
    label = job.inputs / "labels" / f"{names[0]}.seg.nrrd"
    label.write_bytes(label.read_bytes() + b" ")
    work(job.path)
    assert "was changed after the training was started" in observe(job).message


def test_without_any_readable_scan_nothing_is_trained(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path, 3)
    job = make_training(project)
    for name in names[1:]:
        image_of(project, name).unlink()
    work(job.path)
    assert "none of the scans can be read" in observe(job).message


def test_a_scan_that_went_missing_meanwhile_refuses_resume(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path, 3)
    job = make_training(project)
    files.write_json(job.work / "skipped.json", [])  # it began with all scans
    image_of(project, names[1]).unlink()
    work(job.path)
    assert names[1] in observe(job).message and "bring them back" in observe(job).message


# ---------------------------------------------------------------------- label values


def with_values(path: Path, values: dict[int, int], target: Path) -> Path:
    """A label map with other values."""
    label = read_volume(path)
    array = np.zeros(label.array.shape, np.uint16)
    for before, after in values.items():
        array[label.array == before] = after
    write_volume(target, Volume(array, label.geometry))
    return target


@pytest.fixture
def odd_values(tmp_path: Path) -> JobFolder:
    """A training on the label values 3, 7 and 300."""
    project, names = make_project(tmp_path, 3)
    truth = with_values(truth_of(project, names[0]), {1: 300, 2: 3, 3: 7}, tmp_path / "odd.nrrd")
    project.add_label(names[0], truth)
    job = make_training(project, rounds=0)
    work(job.path)
    return job


def test_label_values_with_gaps_and_above_255_come_back(odd_values: JobFolder) -> None:
    assert observe(odd_values).state is State.FINISHED, observe(odd_values).message
    for row in files.read_json(odd_values.index)["cases"]:
        array = read_volume(odd_values.results / row["prediction"]).array
        assert set(np.unique(array).tolist()) == {0, 3, 7, 300}, f"{row['case']} as {array.dtype}"
        assert sorted(row["scores"]["labels"], key=int) == ["3", "7", "300"], "scores stand under label values"


def test_every_label_value_means_the_same_organ_as_before(odd_values: JobFolder) -> None:
    truth = Project(odd_values.project)
    for row in files.read_json(odd_values.index)["cases"]:
        prediction = read_volume(odd_values.results / row["prediction"]).array == 300
        large = read_volume(truth_of(truth, row["case"])).array == 1
        dice = 2 * np.count_nonzero(prediction & large) / (prediction.sum() + large.sum())
        assert dice > 0.6, f"{row['case']}: label 300 is the large organ, Dice {dice:.2f}"


def test_an_unknown_label_value_is_refused(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path, 3)
    odd = with_values(truth_of(project, names[1]), {1: 1, 2: 2, 3: 9}, tmp_path / "odd.nrrd")
    with pytest.raises(LabelError, match=r"label values \[9\], which the label table \[1, 2, 3\] does not know"):
        project.add_label(names[1], odd, role=Role.LABELLED)


def test_a_refused_label_changes_nothing(tmp_path: Path) -> None:
    project, names = labelled_project(tmp_path, 3)
    before = files.read_json(project.file)
    odd = with_values(truth_of(project, names[1]), {1: 1, 2: 2, 3: 9}, tmp_path / "odd.nrrd")
    with pytest.raises(LabelError):
        project.add_label(names[1], odd, role=Role.LABELLED)
    assert files.read_json(project.file) == before


@pytest.mark.parametrize("stray", [5, 999])
def test_a_value_that_the_table_lacks_is_never_taken_for_background(stray: int) -> None:
    from SemiSAMO1Lib.tasks.inputs import ClassMap

    array = np.full((4, 4, 4), stray, np.uint16)
    with pytest.raises(LabelError, match=rf"label values \[{stray}\] are not in the label table"):
        ClassMap((0, 3, 300)).to_indices(Volume(array, Geometry((4, 4, 4))))


def test_class_indices_and_label_values_are_inverse() -> None:
    from SemiSAMO1Lib.tasks.inputs import ClassMap

    values = ClassMap((0, 3, 7, 300))
    array = np.array([[[0, 3], [7, 300]]], np.uint16)
    volume = Volume(array, Geometry(array.shape))
    assert np.array_equal(values.to_values(values.to_indices(volume)).array, array)


def test_an_empty_label_table_is_refused(tmp_path: Path) -> None:
    project, _ = labelled_project(tmp_path, 3)
    job = make_training(project)
    files.write_json(job.path / "job.json", {**job.spec(), "labels": []})
    work(job.path)
    assert "the label table is empty" in observe(job).message


# ---------------------------------------------------------------------- disk, versions, parameters


def test_a_disk_too_small_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, _ = labelled_project(tmp_path, 3)
    job = make_training(project)
    monkeypatch.setattr(files, "free_bytes", lambda _: 5 << 20)
    work(job.path)
    message = observe(job).message
    assert "needs about" in message and "5 MiB free" in message and not (job.work / "plan.json").exists(), message


@pytest.mark.parametrize("part", ["torch", "numpy", "monai", "python"])
def test_another_version_refuses_resume_and_names_both(tmp_path: Path, part: str) -> None:
    project, _ = labelled_project(tmp_path, 3)
    job = make_training(project)
    environment = current_environment()
    files.write_json(job.work / "environment.json", {**environment, part: "0.1.2"})
    work(job.path)
    assert f"{part}: began with 0.1.2, now {environment[part]}" in observe(job).message


def test_another_device_refuses_resume(tmp_path: Path) -> None:
    project, _ = labelled_project(tmp_path, 3)
    job = make_training(project)
    files.write_json(job.work / "environment.json", {**current_environment(), "device": "cuda"})
    work(job.path)
    assert "device: began with cuda, now cpu" in observe(job).message


def current_environment() -> dict[str, Any]:
    import platform

    import monai
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "numpy": np.__version__,
        "device": "cpu",
    }


def test_the_threads_of_job_json_are_used(tmp_path: Path) -> None:
    import torch

    project, names = labelled_project(tmp_path, 3)
    job = make_training(project)
    files.write_json(job.path / "job.json", {**job.spec(), "threads": 2})
    image_of(project, names[0]).unlink()  # stops after torch was prepared
    work(job.path)
    assert torch.get_num_threads() == 2


def test_the_parameter_threads_wins(tmp_path: Path) -> None:
    import torch

    project, names = labelled_project(tmp_path, 3)
    job = make_training(project, threads=3)
    image_of(project, names[0]).unlink()
    work(job.path)
    assert torch.get_num_threads() == 3


def test_a_wrong_parameter_is_named(tmp_path: Path) -> None:
    project, _ = labelled_project(tmp_path, 3)
    job = make_training(project, iterations=-1)
    work(job.path)
    assert "iterations" in observe(job).message


def test_an_unknown_learner_is_answered_with_those_there_are(tmp_path: Path) -> None:
    project, _ = labelled_project(tmp_path, 3)
    job = make_training(project, learner="wizard", **SHORT)
    work(job.path)
    assert "unknown learner 'wizard'; there are: " in observe(job).message
