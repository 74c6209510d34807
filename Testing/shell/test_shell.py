"""The shell: every command as a person or a script uses it, its exit codes, and no traceback ever."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from shell_runner import Shown, shell

from SemiSAMO1Lib import files, lock, worker
from SemiSAMO1Lib.engine.data.boxes import box_around
from SemiSAMO1Lib.engine.data.hdf5_layout import write_case
from SemiSAMO1Lib.image_io import read_volume, write_volume
from SemiSAMO1Lib.job import JobFolder, JobKind, State, kill, observe
from SemiSAMO1Lib.phantoms import PhantomSettings, write_cohort
from SemiSAMO1Lib.project import Project, reviews
from SemiSAMO1Lib.project.began import Began
from SemiSAMO1Lib.project.drafts import save_draft
from SemiSAMO1Lib.project.label_writer import write_segmentation
from SemiSAMO1Lib.project.results import predictions
from SemiSAMO1Lib.shell import app, commands
from SemiSAMO1Lib.tasks.predict import doubt_of
from SemiSAMO1Lib.volume import Geometry, Volume

os.environ["OMP_NUM_THREADS"] = "1"

#: Exit codes, as the shell promises them.
DONE, FAILED, WRONG_USE, STOPPED, BUSY = 0, 1, 2, 3, 4

COMMANDS = (
    "init",
    "template",
    "train",
    "status",
    "cancel",
    "resume",
    "predict",
    "evaluate",
    "report",
    "demo",
    "doctor",
    "reproduce",
    "test",
    "export-h5",
    "import-h5",
    "checkpoint",
    "queue",
    "accept",
    "correct",
    "discard",
    "exclude",
    "include",
    "reject",
    "skip",
    "undo",
    "use",
    "score",
    "advise",
    "locate",
    "apply",
    "bundle",
    "export",
    "simulate",
)

TINY = {"rounds": 1, "iterations": 6, "patch_voxels": 4096, "filters": 4, "checkpoint_seconds": 0, "threads": 1}


def program(*arguments: object, cwd: Path | None = None) -> Shown:
    """A command as a process of its own."""
    command = [sys.executable, "-m", "SemiSAMO1Lib.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180, cwd=cwd)
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return Shown(done.returncode, done.stdout, done.stderr)


def wait_until(happened: Callable[[], bool], what: str, patience_s: float = 90) -> None:
    deadline = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s in vain until {what}"
        time.sleep(0.02)


def end_workers(folder: Path) -> None:
    for spec in folder.rglob("job.json"):
        job = JobFolder(spec.parent)
        with contextlib.suppress(ValueError):  # a status that a test damaged
            if job.status.exists() and observe(job).pid != os.getpid():  # some tests play the worker themselves
                kill(job)


@pytest.fixture(autouse=True)
def no_worker_left(tmp_path: Path) -> Iterator[None]:
    yield
    end_workers(tmp_path)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three phantoms: images/ and labels/."""
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, 3, settings=PhantomSettings(spacing_mm=(4.5, 4.0, 4.0)))
    return folder


@dataclass(frozen=True)
class Story:
    """A project from init to the end of its training, and what each command printed."""

    project: Path
    init: Shown
    template: Shown
    train: Shown


def config(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.json"
    files.write_json(path, {**TINY, **changes})
    return path


@pytest.fixture(scope="session")
def story(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story with spaces [and] ümlauts")
    project = folder / "project"
    first = shell("init", project, "--images", cohort / "images", "--json")
    label = cohort / "labels" / "phantom_000.nrrd"
    second = shell("template", project, "--case", "phantom_000", "--labels", label, "--json")
    options = ("--preset", "quick", "--device", "cpu", "--seed", "3", "--config", config(folder), "--json")
    return Story(project, first, second, program("train", project, *options))


@pytest.fixture
def untrained(cohort: Path, tmp_path: Path) -> Path:
    """A project whose template is labelled."""
    project = tmp_path / "project"
    shell("init", project, "--images", cohort / "images")
    shell("template", project, "--case", "phantom_000", "--labels", cohort / "labels" / "phantom_000.nrrd")
    return project


@pytest.fixture
def busy(untrained: Path) -> JobFolder:
    """A project whose training is played by this very process."""
    from SemiSAMO1Lib.project.training import request_training

    job = request_training(Project(untrained), {"preset": "quick"})
    status = {"state": "running", **lock.identity(), "heartbeat": time.time(), "stage": "propagation 1/2"}
    files.write_json(job.status, {**status, "fraction": 0.1})
    return job


# ---------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(command: str) -> None:
    shown = shell(command, "--help")
    assert shown.code == DONE and f"Example: semisamo1 {command}" in shown.text


def test_every_command_is_tested_here() -> None:
    from typer.main import get_command

    assert sorted(get_command(app).commands) == sorted(COMMANDS)  # type: ignore[attr-defined]


def test_without_a_command_the_help_is_shown() -> None:
    shown = shell()
    assert "One labelled volume in" in shown.text and shown.code in (DONE, WRONG_USE)


def test_the_version() -> None:
    from SemiSAMO1Lib import __version__

    assert shell("--version").out.strip() == __version__


def test_the_program_is_installed_under_its_name() -> None:
    name = Path(sys.executable).with_name("semisamo1")
    done = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == DONE, done.stderr


@pytest.mark.parametrize(
    "arguments", [("fly",), ("train",), ("train", "p", "--rounds", "many"), ("status", "p", "--x")]
)
def test_wrong_use_is_code_2(arguments: tuple[str, ...]) -> None:
    assert shell(*arguments).code == WRONG_USE


# ---------------------------------------------------------------------- init


def test_init_names_the_cases(story: Story) -> None:
    assert story.init.code == DONE, story.init.err
    assert story.init.json()["cases"] == ["phantom_000", "phantom_001", "phantom_002"]


def test_init_says_what_comes_next(cohort: Path, tmp_path: Path) -> None:
    shown = shell("init", tmp_path / "project", "--images", cohort / "images")
    assert "3 scans in" in shown.text and "Next: semisamo1 advise" in shown.text


def test_init_lists_what_it_skips(cohort: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "good.nrrd").write_bytes((cohort / "images" / "phantom_000.nrrd").read_bytes())
    (images / "bad[1].nrrd").write_bytes(b"nonsense")
    shown = shell("init", tmp_path / "project", "--images", images)
    assert shown.code == DONE and "skipped bad[1].nrrd: " in shown.text


def test_init_again_adds_nothing_twice(cohort: Path, untrained: Path) -> None:
    shown = shell("init", untrained, "--images", cohort / "images", "--json")
    assert len(shown.json()["cases"]) == 3


def test_init_without_a_folder_of_scans(tmp_path: Path) -> None:
    shown = shell("init", tmp_path / "project", "--images", tmp_path / "nowhere")
    assert shown.code == WRONG_USE and "is not a folder" in shown.text


def test_init_names_the_cases_whose_files_are_called_otherwise(cohort: Path, tmp_path: Path) -> None:
    scan = read_volume(cohort / "images" / "phantom_000.nrrd")
    write_volume(tmp_path / "scans" / "Scan Weiß.nrrd", scan)
    assert "Scan Weiß is case Scan-Weiss" in shell("init", tmp_path / "project", "--images", tmp_path / "scans").text


def test_a_case_may_be_given_by_the_name_of_its_file(cohort: Path, tmp_path: Path) -> None:
    write_volume(tmp_path / "scans" / "Scan Weiß.nrrd", read_volume(cohort / "images" / "phantom_000.nrrd"))
    shell("init", tmp_path / "project", "--images", tmp_path / "scans")
    label = cohort / "labels" / "phantom_000.nrrd"
    shown = shell("template", tmp_path / "project", "--case", "Scan Weiß", "--labels", label, "--json")
    assert shown.json()["case"] == "Scan-Weiss"


def test_init_of_the_project_folder_itself_is_refused(cohort: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    write_volume(scans / "one.nrrd", read_volume(cohort / "images" / "phantom_000.nrrd"))
    shown = shell("init", scans, "--images", scans)
    assert shown.code == WRONG_USE and "a folder of its own" in shown.text
    assert [path.name for path in scans.iterdir()] == ["one.nrrd"], "nothing is left behind"


def test_init_of_an_empty_folder_makes_no_project(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert shell("init", tmp_path / "project", "--images", tmp_path / "empty").code == WRONG_USE
    assert not (tmp_path / "project").exists()


def test_init_again_says_how_many_are_new(cohort: Path, untrained: Path) -> None:
    shown = shell("init", untrained, "--images", cohort / "images")
    assert "3 scans" in shown.text and "0 of them new" in shown.text and "skipped" not in shown.text


def test_init_of_a_folder_without_a_usable_scan_fails(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "bad.nrrd").write_text("nonsense")
    shown = shell("init", tmp_path / "project", "--images", tmp_path / "scans")
    assert shown.code == FAILED and "no usable scan" in shown.text


def test_init_where_a_file_is_in_the_way(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "project").touch()
    shown = shell("init", tmp_path / "project", "--images", cohort / "images")
    assert shown.code == WRONG_USE and "cannot be written" in shown.text


# ---------------------------------------------------------------------- template


def test_template_says_what_it_took(story: Story) -> None:
    value = story.template.json()
    assert (value["case"], value["role"], value["version"], value["exact"]) == ("phantom_000", "template", 1, True)


def test_a_second_label_makes_a_labelled_case(cohort: Path, untrained: Path) -> None:
    label = cohort / "labels" / "phantom_001.nrrd"
    shown = shell("template", untrained, "--case", "phantom_001", "--labels", label, "--json")
    assert shown.json()["role"] == "labelled"


def test_template_remove_takes_the_label_out_of_force(untrained: Path) -> None:
    shown = shell("template", untrained, "--case", "phantom_000", "--remove", "--json")
    assert shown.json() == {"case": "phantom_000", "role": "unlabelled"}


def test_template_remove_keeps_the_file(untrained: Path) -> None:
    shell("template", untrained, "--case", "phantom_000", "--remove")
    assert (untrained / "labels" / "phantom_000" / "1.seg.nrrd").exists(), "a label is never deleted"


@pytest.mark.parametrize("options", [(), ("--remove", "--labels", "x.nrrd")])
def test_template_wants_labels_or_remove(untrained: Path, options: tuple[str, ...]) -> None:
    shown = shell("template", untrained, "--case", "phantom_000", *options)
    assert shown.code == WRONG_USE and "either --labels FILE or --remove" in shown.text


def test_template_of_an_unknown_case_names_those_there_are(cohort: Path, untrained: Path) -> None:
    shown = shell("template", untrained, "--case", "nobody", "--labels", cohort / "labels" / "phantom_000.nrrd")
    assert shown.code == WRONG_USE and "no case 'nobody'" in shown.text and "phantom_001" in shown.text


def test_template_without_its_file(untrained: Path, tmp_path: Path) -> None:
    shown = shell("template", untrained, "--case", "phantom_000", "--labels", tmp_path / "no.nrrd")
    assert shown.code == WRONG_USE and "does not exist" in shown.text


def test_template_with_a_scan_as_its_label(cohort: Path, untrained: Path) -> None:
    shown = shell("template", untrained, "--case", "phantom_000", "--labels", cohort / "images" / "phantom_000.nrrd")
    assert shown.code == WRONG_USE and "not labels" in shown.text


def test_template_with_a_scan_of_whole_numbers_as_its_label(cohort: Path, untrained: Path, tmp_path: Path) -> None:
    scan = read_volume(cohort / "images" / "phantom_000.nrrd")
    low = float(scan.array.min())
    write_volume(tmp_path / "scan.nrrd", Volume(np.rint(50 * (scan.array - low)).astype(np.uint16), scan.geometry))
    shown = shell("template", untrained, "--case", "phantom_001", "--labels", tmp_path / "scan.nrrd")
    assert shown.code == WRONG_USE and "looks like a scan" in shown.text


def test_a_label_that_is_called_like_another_case_is_doubted(cohort: Path, untrained: Path) -> None:
    label = cohort / "labels" / "phantom_002.nrrd"
    given = ("template", untrained, "--case", "phantom_001", "--labels", label)
    shown = shell(*given)
    assert shown.code == WRONG_USE and "phantom_002.nrrd is called like case phantom_002" in shown.text
    assert "--sure" in shown.text and shell(*given, "--sure").code == DONE


def test_a_label_on_the_grid_of_another_case_is_doubted(cohort: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scan = read_volume(cohort / "images" / "phantom_000.nrrd")
    wide = tuple(1.3 * side for side in scan.geometry.spacing)
    stretched = Geometry(scan.geometry.shape, wide, scan.geometry.origin, scan.geometry.direction)
    write_volume(scans / "whole.nrrd", scan)
    write_volume(scans / "wide.nrrd", Volume(scan.array, stretched))
    shell("init", tmp_path / "project", "--images", scans)
    label = cohort / "labels" / "phantom_000.nrrd"
    shown = shell("template", tmp_path / "project", "--case", "wide", "--labels", label)
    assert shown.code == WRONG_USE and "phantom_000.nrrd lies on the grid of case whole" in shown.text


def test_a_label_map_of_another_size_is_doubted(cohort: Path, untrained: Path, tmp_path: Path) -> None:
    """On the same lattice voxels are copied exactly; that another patient's label is smaller is still asked about."""
    label = read_volume(cohort / "labels" / "phantom_000.nrrd")
    write_volume(tmp_path / "drawn.nrrd", copied_to_smaller(label))
    shown = shell("template", untrained, "--case", "phantom_000", "--labels", tmp_path / "drawn.nrrd")
    away = 2 * label.geometry.spacing[0]
    assert shown.code == WRONG_USE and f"their corners are {away:.3g} mm apart" in shown.text


def copied_to_smaller(label: Volume) -> Volume:
    """Without the last two slices."""
    z, y, x = label.geometry.shape
    grid = Geometry((z - 2, y, x), label.geometry.spacing, label.geometry.origin, label.geometry.direction)
    return Volume(label.array[:-2], grid)


def test_template_says_what_comes_next(cohort: Path, untrained: Path) -> None:
    shown = shell("template", untrained, "--case", "phantom_000", "--labels", cohort / "labels" / "phantom_000.nrrd")
    assert f"Next: semisamo1 train {untrained}" in shown.text


def test_template_with_an_unknown_value_says_how_to_add_it(cohort: Path, untrained: Path, tmp_path: Path) -> None:
    label = read_volume(cohort / "labels" / "phantom_001.nrrd")
    write_volume(tmp_path / "odd.nrrd", Volume(label.array * np.uint8(2), label.geometry))
    shown = shell("template", untrained, "--case", "phantom_001", "--labels", tmp_path / "odd.nrrd")
    assert shown.code == WRONG_USE and "--add-labels" in shown.text


def test_template_with_a_priority_that_is_no_list(cohort: Path, untrained: Path) -> None:
    label = cohort / "labels" / "phantom_001.nrrd"
    shown = shell("template", untrained, "--case", "phantom_001", "--labels", label, "--priority", "organ")
    assert shown.code == WRONG_USE


# ---------------------------------------------------------------------- train


def test_train_ends_with_a_result_for_every_scan(story: Story) -> None:
    assert story.train.code == DONE, story.train.err
    value = story.train.json()
    assert (value["cases"], value["round"], Path(value["report"]).exists()) == (2, 1, True)


def test_options_and_the_config_file_reach_the_job(story: Story) -> None:
    parameters = JobFolder(story.project / "jobs" / story.train.json()["job"]).spec()["parameters"]
    expected = {**TINY, "preset": "quick", "device": "cpu", "seed": 3}
    assert {key: parameters.get(key) for key in expected} == expected


def test_scans_that_a_training_left_out_are_named_with_their_reason(cohort: Path, tmp_path: Path) -> None:
    shutil.copytree(cohort / "images", tmp_path / "images")
    project, label = tmp_path / "project", cohort / "labels" / "phantom_000.nrrd"
    shell("init", project, "--images", tmp_path / "images")
    shell("template", project, "--case", "phantom_000", "--labels", label)
    (tmp_path / "images" / "phantom_002.nrrd").unlink()
    config_path = tmp_path / "none.json"
    files.write_json(config_path, {"preset": "quick", "rounds": 0, "device": "cpu", "threads": 1})
    shown = program("train", project, "--config", config_path)
    assert shown.code == DONE and "1 scan segmented" in shown.text, shown.text
    assert re.search("left out phantom_002: .*missing", shown.text), shown.text


@pytest.fixture
def requested(untrained: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Train without a worker: the parameters that a job would have got."""
    monkeypatch.setattr("SemiSAMO1Lib.shell.commands.start", lambda job: None)

    def parameters(*options: object) -> dict[str, Any]:
        shown = shell("train", untrained, "--detach", "--json", *options)
        assert shown.code == DONE, shown.err
        return JobFolder(untrained / "jobs" / shown.json()["job"]).spec()["parameters"]  # type: ignore[no-any-return]

    return parameters


def test_seed_and_device_of_the_config_file_count(requested: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    found = requested("--config", config(tmp_path, seed=5, device="cpu"))
    assert (found["seed"], found["device"]) == (5, "cpu"), "options that were not given must not hide the file's"


def test_an_option_wins_over_the_config_file(requested: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    found = requested("--config", config(tmp_path, seed=5, preset="thorough"), "--seed", 6, "--preset", "quick")
    assert (found["seed"], found["preset"]) == (6, "quick")


def test_without_a_preset_it_is_standard(requested: Callable[..., dict[str, Any]]) -> None:
    assert requested()["preset"] == "standard"


def test_an_unknown_preset_is_named(untrained: Path) -> None:
    shown = shell("train", untrained, "--preset", "sloppy")
    assert shown.code == WRONG_USE and "'sloppy'" in shown.text and "quick, standard, thorough" in shown.text


def test_an_unknown_preset_in_the_config_file_is_named(untrained: Path, tmp_path: Path) -> None:
    shown = shell("train", untrained, "--config", config(tmp_path, preset="sloppy"))
    assert shown.code == WRONG_USE and "'sloppy'" in shown.text


def test_an_unknown_device_is_named(untrained: Path, tmp_path: Path) -> None:
    shown = shell("train", untrained, "--preset", "quick", "--config", config(tmp_path), "--device", "abacus")
    assert shown.code == WRONG_USE and "unknown device 'abacus'" in shown.text


def test_a_device_that_is_not_here_makes_no_job(untrained: Path) -> None:
    shown = shell("train", untrained, "--device", "cuda:63")
    said = "--device cpu" in shown.text or "counted from 0" in shown.text
    assert shown.code == WRONG_USE and said, shown.text
    assert len(list((untrained / "jobs").glob("*-train"))) == 0


def test_an_unknown_specialist_makes_no_job(untrained: Path, tmp_path: Path) -> None:
    shown = shell("train", untrained, "--config", config(tmp_path, specialist="abacus"))
    assert shown.code == WRONG_USE and "dynunet" in shown.text
    assert len(list((untrained / "jobs").glob("*-train"))) == 0


def test_the_published_name_of_a_learner_will_do(requested: Callable[..., dict[str, Any]]) -> None:
    assert requested("--learner", "uamt")["learner"] == "uncertainty_mean_teacher"


def test_a_value_out_of_range_is_one_plain_line(untrained: Path) -> None:
    shown = shell("train", untrained, "--rounds", "-1")
    assert shown.err.strip() == "error: rounds: Input should be greater than or equal to 0 (given: -1)"


def test_an_unknown_parameter_is_named(untrained: Path, tmp_path: Path) -> None:
    shown = shell("train", untrained, "--config", config(tmp_path, iterrations=5))
    assert shown.code == WRONG_USE and "iterrations" in shown.text


def test_a_wrong_parameter_starts_nothing(untrained: Path) -> None:
    shell("train", untrained, "--iterations", "0")
    assert [job.name for job in (untrained / "jobs").iterdir() if job.name.endswith("-train")] == []


@pytest.mark.parametrize("content", ["[1, 2]", "{", "3"])
def test_a_config_file_that_is_none(untrained: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content, encoding="utf-8")
    shown = shell("train", untrained, "--config", tmp_path / "bad.json")
    assert shown.code == WRONG_USE and "bad.json" in shown.text


def test_a_config_file_that_is_missing(untrained: Path, tmp_path: Path) -> None:
    assert shell("train", untrained, "--config", tmp_path / "no.json").code == WRONG_USE


def test_a_folder_as_config_file(untrained: Path, tmp_path: Path) -> None:
    assert shell("train", untrained, "--config", tmp_path).code in (FAILED, WRONG_USE)


def test_a_project_without_a_template_is_told_so(cohort: Path, tmp_path: Path) -> None:
    shell("init", tmp_path / "project", "--images", cohort / "images")
    shown = shell("train", tmp_path / "project")
    assert shown.code == WRONG_USE and "label one as the template" in shown.text


def test_two_trainings_at_once_are_refused(busy: JobFolder) -> None:
    shown = shell("train", busy.project, "--preset", "quick")
    assert shown.code != DONE and f"training {busy.id} is under way" in shown.text


def test_one_that_another_computer_left_behind_says_how_it_is_taken_over(busy: JobFolder) -> None:
    files.write_json(busy.status, {**files.read_json(busy.status), "host": "elsewhere"})
    shown = shell("train", busy.project, "--preset", "quick")
    assert "resume" in shown.text and "--elsewhere" in shown.text


def test_two_trainings_at_once_are_code_4(busy: JobFolder) -> None:
    assert shell("train", busy.project, "--preset", "quick").code == BUSY


def test_of_two_trainings_in_one_moment_one_starts(untrained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "SemiSAMO1Lib.cli", "train", str(untrained), "--preset", "quick", "--detach"]
    command += ["--config", str(config(tmp_path))]
    both = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    codes = sorted(one.wait(timeout=60) for one in both)
    running = [JobFolder(path.parent) for path in (untrained / "jobs").glob("*-train/status.json")]
    wait_until(lambda: all(observe(job).pid is not None for job in running), "the worker said who it is")
    assert (codes, len(running)) == ([DONE, BUSY], 1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl+C to a whole console")
def test_ctrl_c_ends_the_watching_not_the_training(untrained: Path, tmp_path: Path) -> None:
    long = config(tmp_path, iterations=100_000)
    command = [sys.executable, "-m", "SemiSAMO1Lib.cli", "train", str(untrained), "--config", str(long)]
    # what was started in the background of a script ignores Ctrl+C, and so would what it starts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watching = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    job = JobFolder(untrained / "jobs" / "0002-train")
    wait_until(lambda: job.status.exists() and observe(job).pid is not None, "the training runs")
    time.sleep(0.5)
    os.killpg(watching.pid, signal.SIGINT)
    _, message = watching.communicate(timeout=30)
    state = observe(job).state
    kill(job)
    assert (watching.returncode, state) == (STOPPED, State.RUNNING), message
    assert "goes on in the background" in message and "Traceback" not in message


def test_a_project_that_somebody_writes_is_busy(untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*_: object, **__: object) -> None:
        raise lock.Locked(untrained / "project.lock", {"user": "ann", "host": "ward-7", "pid": 5})

    monkeypatch.setattr(Project, "change", taken)
    shown = shell("template", untrained, "--case", "phantom_000", "--remove")
    assert shown.code == BUSY and "ann on ward-7" in shown.text


# ---------------------------------------------------------------------- status, cancel, resume


def test_status_for_machines(busy: JobFolder) -> None:
    value = shell("status", busy.project, "--json").json()
    expected = {"state": "running", "pid": os.getpid(), "stage": "propagation 1/2", "fraction": 0.1}
    assert {key: value[key] for key in expected} == expected


def test_status_for_people(story: Story) -> None:
    shown = shell("status", story.project)
    assert "-train: finished" in shown.out and "report.html" in shown.out


def test_status_shows_the_training_though_an_import_came_later(story: Story, cohort: Path) -> None:
    shell("init", story.project, "--images", cohort / "images")
    assert shell("status", story.project, "--json").json()["job"].endswith("-train")


def test_status_lists_all_jobs(story: Story) -> None:
    jobs = shell("status", story.project, "--all", "--json").json()
    assert [row["job"] for row in jobs][:2] == ["0001-import", "0002-train"]


def test_status_says_how_long_it_will_take(busy: JobFolder) -> None:
    files.write_json(busy.status, {**files.read_json(busy.status), "eta_s": 600})
    assert "about 10 minutes left" in shell("status", busy.project).text


def test_status_of_an_interrupted_training_names_the_way_on(busy: JobFolder) -> None:
    files.write_json(busy.status, {**files.read_json(busy.status), "state": "interrupted"})
    assert f"Next: semisamo1 resume {busy.project}" in shell("status", busy.project).text


def test_status_says_that_scans_are_missing(story: Story, tmp_path: Path) -> None:
    shutil.copytree(story.project, tmp_path / "far" / "project")
    gone = Project(tmp_path / "far" / "project")
    nowhere = {"relative": "x/y", "absolute": "/x/y"}
    gone.change(lambda state: replace(state, cases=tuple(replace(case, **nowhere) for case in state.cases)))
    text = shell("status", gone.folder).text
    assert "3 scans are not where they were" in text and "semisamo1 locate" in text


def test_the_queue_during_the_first_training_names_it(busy: JobFolder) -> None:
    text = shell("queue", busy.project).text
    assert f"{busy.id} is under way" in text and "semisamo1 status" in text


def test_the_score_of_all_cases_is_no_random_one(reviewed: Path) -> None:
    for case in ("phantom_001", "phantom_002"):
        assert shell("accept", reviewed, "--case", case).code == DONE
    text = shell("score", reviewed).text
    assert "from all 2 cases" in text and "at random" not in text


def test_locate_says_what_is_missing_and_why(story: Story, tmp_path: Path) -> None:
    shutil.copytree(story.project, tmp_path / "far" / "project")
    gone = Project(tmp_path / "far" / "project")
    name = Path(gone.state.cases[1].absolute).name
    lost = lambda c: replace(c, relative=f"x/{Path(c.absolute).name}", absolute=f"/x/{Path(c.absolute).name}")  # noqa: E731
    gone.change(lambda state: replace(state, cases=tuple(map(lost, state.cases))))
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / name).write_bytes(b"another scan")
    shown = shell("locate", gone.folder, "--folder", tmp_path / "found")
    assert shown.code == 1
    assert "still missing: phantom_001; a file of its name is there, with other contents" in shown.text


def test_locate_where_nothing_is_missing(story: Story, cohort: Path) -> None:
    shown = shell("locate", story.project, "--folder", cohort)
    assert shown.code == DONE and "No scan is missing" in shown.text


def test_status_shows_why_a_job_failed(busy: JobFolder) -> None:
    files.write_json(busy.status, {**files.read_json(busy.status), "state": "failed", "message": "no [GPU] memory"})
    assert "no [GPU] memory" in shell("status", busy.project).text


def test_status_of_a_job_by_name(busy: JobFolder) -> None:
    value = shell("status", busy.project, "--job", "0001-import", "--json").json()
    assert (value["job"], value["state"]) == ("0001-import", "finished")


def test_status_of_an_unknown_job_names_those_there_are(busy: JobFolder) -> None:
    shown = shell("status", busy.project, "--job", "0099-train")
    assert shown.code == WRONG_USE and busy.id in shown.text


def test_cancel_asks_the_worker_to_stop(busy: JobFolder) -> None:
    value = shell("cancel", busy.project, "--json").json()
    assert (value["state"], busy.cancel_request.exists()) == ("stopping", True)


@pytest.mark.parametrize("command", ["cancel", "resume"])
def test_a_finished_training_is_neither_cancelled_nor_resumed(story: Story, command: str) -> None:
    shown = shell(command, story.project)
    assert shown.code == BUSY and "finished" in shown.text


def test_a_running_training_is_not_resumed(busy: JobFolder) -> None:
    assert shell("resume", busy.project).code == BUSY


@pytest.mark.parametrize("command", ["cancel", "resume"])
def test_without_a_training_there_is_nothing_to_stop(untrained: Path, command: str) -> None:
    shown = shell(command, untrained)
    assert shown.code == WRONG_USE and "semisamo1 train" in shown.text


def test_a_training_is_stopped_with_code_3_and_goes_on(untrained: Path, tmp_path: Path) -> None:
    started = shell("train", untrained, "--detach", "--json", "--preset", "quick", "--config", config(tmp_path))
    job = JobFolder(untrained / "jobs" / started.json()["job"])
    wait_until(job.events.exists, "the worker shook hands")
    shell("cancel", untrained)
    wait_until(lambda: observe(job).state is State.INTERRUPTED, "the training stopped")
    watched = subprocess.Popen([sys.executable, "-m", "SemiSAMO1Lib.cli", "resume", str(untrained)])
    wait_until(lambda: observe(job).state is State.RUNNING, "the training goes on")
    shell("cancel", untrained)
    assert watched.wait(timeout=90) == STOPPED


def test_cancel_now_ends_the_worker(untrained: Path, tmp_path: Path) -> None:
    started = shell("train", untrained, "--detach", "--json", "--preset", "quick", "--config", config(tmp_path))
    job = JobFolder(untrained / "jobs" / started.json()["job"])
    wait_until(lambda: observe(job).pid is not None, "the worker said who it is")
    value = shell("cancel", untrained, "--now", "--json").json()
    assert (value["state"], value["stopped"]) == ("interrupted", True), "a person's stop is no failure"


def test_resume_finds_the_unfinished_training_behind_a_newer_one(story: Story, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    shutil.copytree(story.project, copy)
    older = JobFolder(copy / "jobs" / "0002-train")
    shutil.copytree(older.path, copy / "jobs" / "0099-train")
    files.write_json(older.status, {**files.read_json(older.status), "state": "failed", "message": "no memory"})
    assert shell("resume", copy, "--detach", "--json").json()["job"] == "0002-train"
    wait_until(lambda: not observe(older).state.active, "the training ended")


# ---------------------------------------------------------------------- review


@pytest.fixture
def reviewed(story: Story, tmp_path: Path) -> Path:
    """A copy of the trained project, to be decided about."""
    shutil.copytree(story.project, tmp_path / "project")
    return tmp_path / "project"


def test_the_queue_for_machines(reviewed: Path) -> None:
    rows = shell("queue", reviewed, "--json").json()
    assert {row["case"] for row in rows} == {"phantom_001", "phantom_002"}
    keys = {"case", "state", "score", "level", "random", "error", "checked", "training"}
    assert all(set(row) == keys and row["state"] == "not_seen" and 0 <= row["score"] <= 1 for row in rows)
    assert all(row["error"] > 0 and row["checked"] is False for row in rows), "a number stands with its error"


def test_the_queue_shows_what_is_asked_for(reviewed: Path) -> None:
    assert shell("skip", reviewed, "--case", "phantom_001").code == 0
    skipped = shell("queue", reviewed, "--show", "skipped", "--json").json()
    assert [row["case"] for row in skipped] == ["phantom_001"]
    assert "Nothing of this kind (draft) waits" in shell("queue", reviewed, "--show", "draft").text


def test_the_queue_for_people(reviewed: Path) -> None:
    text = shell("queue", reviewed).text
    assert "phantom_001" in text and "not yet checked on your scans: 0 of 10 are reviewed" in text


def test_what_is_to_be_mended_is_a_copy(reviewed: Path) -> None:
    text = shell("queue", reviewed).text
    assert "To be mended, a copy of: " in text
    assert f"--training {Project(reviewed).state.current_training}" in text, "the step names whose prediction it is"


@pytest.mark.parametrize("command", ["accept", "reject", "skip"])
def test_a_decision_about_predictions_of_before_is_refused(reviewed: Path, command: str) -> None:
    shown = shell(command, reviewed, "--case", "phantom_001", "--training", "0001-train")
    assert shown.code == WRONG_USE and "was predicted anew by" in shown.text
    assert Project(reviewed).state.case("phantom_001").review == "not_seen"


def test_a_correction_says_whose_prediction_it_began_from(reviewed: Path, cohort: Path) -> None:
    labels, current = cohort / "labels" / "phantom_001.nrrd", Project(reviewed).state.current_training
    given = ("--case", "phantom_001", "--labels", labels, "--training", current)
    assert f"prediction of {current}" in shell("correct", reviewed, *given).text


def test_a_correction_of_a_training_that_is_not_there_is_refused(reviewed: Path, cohort: Path) -> None:
    labels = cohort / "labels" / "phantom_001.nrrd"
    refused = shell("correct", reviewed, "--case", "phantom_001", "--labels", labels, "--training", "0009-train")
    assert refused.code == WRONG_USE and "0009-train is not a training" in refused.text


def test_a_correction_may_lie_in_the_hdf5_layout(reviewed: Path, cohort: Path, tmp_path: Path) -> None:
    image, label = (read_volume(cohort / kind / "phantom_001.nrrd") for kind in ("images", "labels"))
    write_case(tmp_path / "mended.h5", image, label)
    assert shell("correct", reviewed, "--case", "phantom_001", "--labels", tmp_path / "mended.h5").code == DONE
    opened = Project(reviewed)
    saved = read_volume(opened.label_path(opened.state.case("phantom_001")))
    assert np.array_equal(saved.array, label.array)


@pytest.fixture
def painted(reviewed: Path, cohort: Path) -> Path:
    """The project, in which phantom_001 is a draft."""
    opened = Project(reviewed)
    label = read_volume(cohort / "labels" / "phantom_001.nrrd")
    draft = save_draft(opened, "phantom_001", label, opened.state.labels, Began(str(opened.state.current_training)))
    reviews.begin_draft(opened, "phantom_001")
    return draft


def test_a_correction_does_not_throw_painting_away(painted: Path, reviewed: Path, cohort: Path) -> None:
    before = painted.read_bytes()
    given = ("--case", "phantom_001", "--labels", cohort / "labels" / "phantom_001.nrrd")
    refused = shell("correct", reviewed, *given)
    assert refused.code == WRONG_USE and "there is unfinished painting of case phantom_001" in refused.text
    assert painted.read_bytes() == before
    assert shell("correct", reviewed, "--case", "phantom_001", "--labels", painted).code == DONE


def test_what_can_be_done_about_a_draft_is_said(painted: Path, reviewed: Path) -> None:
    refused = shell("accept", reviewed, "--case", "phantom_001")
    assert "save what was painted as a correction, or discard it" in refused.text
    assert f"--labels {painted}" in shell("queue", reviewed, "--show", "draft").text


def test_the_stronger_of_two_layers_can_be_named_for_a_correction(reviewed: Path, cohort: Path, tmp_path: Path) -> None:
    """As Slicer writes overlapping segments: each in a layer of its own."""
    label = sitk.ReadImage(str(cohort / "labels" / "phantom_001.nrrd"))
    layers = sitk.Compose([sitk.Cast(label > 0, sitk.sitkUInt8), sitk.Cast(label > 1, sitk.sitkUInt8)])
    for number, value in enumerate((1, 2)):
        for key, text in (("ID", f"s{value}"), ("Name", f"s{value}"), ("LabelValue", "1"), ("Layer", str(number))):
            layers.SetMetaData(f"Segment{number}_{key}", text)
    sitk.WriteImage(layers, str(tmp_path / "mended.seg.nrrd"))
    given = ("--case", "phantom_001", "--labels", tmp_path / "mended.seg.nrrd", "--absent", 3)
    assert "say which label wins" in shell("correct", reviewed, *given).text
    assert shell("correct", reviewed, *given, "--priority", "2,1").code == DONE


@pytest.mark.parametrize("name", ["a[red]b", "x[/b]"])
def test_brackets_in_a_projects_path_are_shown_as_they_are(reviewed: Path, tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    place.mkdir(parents=True)
    moved = reviewed.rename(place / "project")
    shown = shell("queue", moved)
    assert shown.code == DONE and str(moved) in shown.text
    assert shell("queue", moved, "--show", "draft").code == DONE


def test_a_prediction_that_was_mended_in_place_is_told_of(reviewed: Path, cohort: Path) -> None:
    opened = Project(reviewed)
    path = predictions(opened)["phantom_001"]["prediction"]
    write_segmentation(path, read_volume(cohort / "labels" / "phantom_001.nrrd"), opened.state.labels)
    shown = shell("correct", reviewed, "--case", "phantom_001", "--labels", path)
    assert shown.code == DONE and "how good it was is not counted" in shown.text


def test_a_template_is_recommended(reviewed: Path) -> None:
    value = shell("advise", reviewed, "--json").json()
    assert value["recommended"] == value["ranking"][0]["case"] and len(value["ranking"]) == 3


def test_the_score_says_what_to_do_next(reviewed: Path) -> None:
    value = shell("score", reviewed, "--json").json()
    assert value["score"] is None and value["verdict"] == "review" and value["reason"]
    assert value["reviewed"] == [], "nothing was reviewed before this training"


def test_a_case_is_left_out_and_taken_in_again(reviewed: Path) -> None:
    roles = [shell(word, reviewed, "--case", "phantom_001", "--json").json()["role"] for word in ("exclude", "include")]
    assert roles == ["excluded", "unlabelled"]


def test_unfinished_painting_is_discarded(reviewed: Path, cohort: Path) -> None:
    label = cohort / "labels" / "phantom_001.nrrd"
    shell("correct", reviewed, "--case", "phantom_001", "--labels", label)
    shell("undo", reviewed, "--case", "phantom_001")
    refused = shell("accept", reviewed, "--case", "phantom_001")
    assert refused.code == WRONG_USE and "unfinished painting of case phantom_001" in refused.text
    assert shell("discard", reviewed, "--case", "phantom_001").code == DONE
    assert shell("accept", reviewed, "--case", "phantom_001").code == DONE


def test_nothing_to_discard_is_said(reviewed: Path) -> None:
    shown = shell("discard", reviewed, "--case", "phantom_001")
    assert shown.code == WRONG_USE and "no unfinished painting of case phantom_001" in shown.text


def test_a_training_that_is_not_there_is_not_used(reviewed: Path) -> None:
    shown = shell("use", reviewed, "--training", "0099-train")
    assert shown.code == WRONG_USE and "0099-train is not a training" in shown.text


def test_an_earlier_training_counts_again(reviewed: Path) -> None:
    current = Project(reviewed).state.current_training
    assert shell("use", reviewed, "--training", current, "--json").json() == {"current_training": current}


@pytest.mark.parametrize("given", ["nothing.nrrd", "."], ids=["no file", "a folder"])
def test_a_correction_that_is_no_file_is_named(reviewed: Path, given: str) -> None:
    shown = shell("correct", reviewed, "--case", "phantom_001", "--labels", given)
    assert shown.code == WRONG_USE and ("does not exist" in shown.text or "is a folder" in shown.text)
    assert "HDF5" not in shown.text and "sitk" not in shown.text


def test_a_label_that_comes_with_a_correction_is_named(reviewed: Path, cohort: Path, tmp_path: Path) -> None:
    label = read_volume(cohort / "labels" / "phantom_001.nrrd")
    array = label.array.copy()
    array[0, 0, 0] = 9
    write_volume(tmp_path / "more.nrrd", Volume(array, label.geometry))
    given = ("--case", "phantom_001", "--labels", tmp_path / "more.nrrd", "--add-labels")
    assert "label 9 (label 9) is new" in shell("correct", reviewed, *given).text


@pytest.mark.parametrize("command", ["reject", "skip"])
def test_a_decision_and_its_undo(reviewed: Path, command: str) -> None:
    state = shell(command, reviewed, "--case", "phantom_001", "--json").json()["state"]
    back = shell("undo", reviewed, "--case", "phantom_001", "--json").json()["state"]
    assert (state, back) == ({"reject": "rejected", "skip": "skipped"}[command], "not_seen")


def test_corrected_labels_are_taken(reviewed: Path, cohort: Path) -> None:
    labels = cohort / "labels" / "phantom_001.nrrd"
    value = shell("correct", reviewed, "--case", "phantom_001", "--labels", labels, "--json").json()
    assert (value["state"], value["role"], value["label_version"]) == ("corrected", "labelled", 1)


def test_an_accepted_case_leaves_the_queue(reviewed: Path) -> None:
    shown = shell("accept", reviewed, "--case", "phantom_001")
    if shown.code == WRONG_USE:  # a network of six iterations may not find every organ: they are declared absent
        shown = shell("accept", reviewed, "--case", "phantom_001", *absent_of(shown.text))
    assert shown.code == DONE, shown.text
    assert [row["case"] for row in shell("queue", reviewed, "--json").json()] == ["phantom_002"]


def absent_of(message: str) -> list[str]:
    """The --absent options for the values that a refusal names."""
    return [word for value in re.findall(r"(\d+) \(label", message) for word in ("--absent", value)]


def test_a_step_that_is_not_possible_says_what_is(reviewed: Path) -> None:
    shell("reject", reviewed, "--case", "phantom_001")
    shown = shell("accept", reviewed, "--case", "phantom_001")
    assert shown.code == WRONG_USE and "Take that decision back first (undo)" in shown.text


# ---------------------------------------------------------------------- predict, evaluate, report


@pytest.fixture(scope="session")
def predicted(story: Story, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Shown, Path, Path]:
    folder = tmp_path_factory.mktemp("predicted")
    output, map_file = folder / "new.seg.nrrd", folder / "uncertainty.nrrd"
    scan = cohort / "images" / "phantom_001.nrrd"
    options = ("--input", scan, "--output", output, "--uncertainty", map_file, "--device", "cpu", "--json")
    return shell("predict", story.project, *options), output, map_file


def test_predict_says_where_the_segmentation_is(predicted: tuple[Shown, Path, Path]) -> None:
    shown, output, _ = predicted
    assert shown.code == DONE and shown.json()["output"] == str(output), shown.err


def test_predict_writes_on_the_grid_of_the_scan(predicted: tuple[Shown, Path, Path], cohort: Path) -> None:
    scan = read_volume(cohort / "images" / "phantom_001.nrrd").geometry
    assert all(read_volume(path).geometry.same_grid(scan) for path in predicted[1:])


def test_predict_in_an_unknown_format_says_so_before_it_works(story: Story, cohort: Path, tmp_path: Path) -> None:
    scan = cohort / "images" / "phantom_001.nrrd"
    shown = shell("predict", story.project, "--input", scan, "--output", tmp_path / "new.docx")
    assert shown.code == WRONG_USE and "new.docx: unknown format" in shown.text


def test_predict_without_its_scan(story: Story, tmp_path: Path) -> None:
    shown = shell("predict", story.project, "--input", tmp_path / "no.nrrd", "--output", tmp_path / "new.nrrd")
    assert shown.code == WRONG_USE and "does not exist" in shown.text


def test_predict_a_damaged_scan(story: Story, tmp_path: Path) -> None:
    (tmp_path / "bad.nrrd").write_bytes(b"nonsense")
    shown = shell("predict", story.project, "--input", tmp_path / "bad.nrrd", "--output", tmp_path / "new.nrrd")
    assert shown.code == WRONG_USE and "cannot be read" in shown.text


def test_predict_on_an_unknown_device(story: Story, cohort: Path, tmp_path: Path) -> None:
    scan, output = cohort / "images" / "phantom_001.nrrd", tmp_path / "new.nrrd"
    shown = shell("predict", story.project, "--input", scan, "--output", output, "--device", "abacus")
    assert shown.code == WRONG_USE and "abacus" in shown.text


@pytest.mark.parametrize("command", [("predict", "--input", "a.nrrd", "--output", "b.nrrd"), ("report",)])
def test_without_a_finished_training(untrained: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "a.nrrd").touch()
    options = [tmp_path / one if one.endswith(".nrrd") else one for one in command[1:]]
    shown = shell(command[0], untrained, *options)
    assert shown.code == WRONG_USE and "no finished training" in shown.text


@pytest.mark.parametrize("option", ["--output", "--uncertainty"])
def test_predict_never_writes_over_its_scan(story: Story, cohort: Path, tmp_path: Path, option: str) -> None:
    scan = tmp_path / "scan.nrrd"
    scan.write_bytes((cohort / "images" / "phantom_001.nrrd").read_bytes())
    options = {"--output": tmp_path / "new.nrrd", option: scan}
    shown = shell("predict", story.project, "--input", scan, *(word for pair in options.items() for word in pair))
    assert shown.code == WRONG_USE and "would be overwritten" in shown.text


def test_predict_never_writes_over_a_scan_of_the_project(story: Story, cohort: Path) -> None:
    scan, other = cohort / "images" / "phantom_001.nrrd", cohort / "images" / "phantom_002.nrrd"
    shown = shell("predict", story.project, "--input", scan, "--output", other)
    assert shown.code == WRONG_USE and "scan of case phantom_002" in shown.text


def test_predict_one_file_cannot_hold_both(story: Story, cohort: Path, tmp_path: Path) -> None:
    scan, both = cohort / "images" / "phantom_001.nrrd", tmp_path / "both.nrrd"
    shown = shell("predict", story.project, "--input", scan, "--output", both, "--uncertainty", both)
    assert shown.code == WRONG_USE and "both" in shown.text


@pytest.mark.parametrize(
    ("certainty", "warned"), [(0.4, False), (0.6, True), (None, True)], ids=["as usual", "unusual", "nothing found"]
)
def test_predict_warns_of_a_scan_unlike_those_of_the_project(
    tmp_path: Path, certainty: float | None, warned: bool
) -> None:
    job = JobFolder(tmp_path / "jobs" / "0001-train")
    rows = [{"scores": {"label_uncertainty": value}} for value in (0.2, 0.5, None)]
    files.write_json(job.index, {"cases": rows})
    assert ("same anatomy" in doubt_of(job, {"label_uncertainty": certainty})) is warned


@pytest.fixture(scope="session")
def evaluated(story: Story, cohort: Path) -> Shown:
    return shell("evaluate", story.project, cohort / "labels", "--json")


def test_evaluate_has_a_mean_and_an_entry_for_every_case(evaluated: Shown) -> None:
    value = evaluated.json()
    assert [row["case"] for row in value["cases"]] == ["phantom_001", "phantom_002"]
    assert value["mean_dice"] == pytest.approx(np.mean([row["mean_dice"] for row in value["cases"]]))


def test_evaluate_measures_distances_in_mm(evaluated: Shown) -> None:
    assert {"mean_hd95_mm", "mean_asd_mm"} <= set(evaluated.json())


def test_evaluate_a_folder_against_itself_is_perfect(cohort: Path) -> None:
    shown = shell("evaluate", cohort / "labels", cohort / "labels", "--no-distances", "--json")
    assert shown.json()["mean_dice"] == 1.0


def test_evaluate_for_people_is_a_table(cohort: Path) -> None:
    shown = shell("evaluate", cohort / "labels", cohort / "labels", "--no-distances")
    assert "phantom_002" in shown.text and "1.000" in shown.text


def test_evaluate_names_what_has_no_reference(story: Story, cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "phantom_001.nrrd").write_bytes((cohort / "labels" / "phantom_001.nrrd").read_bytes())
    shown = shell("evaluate", story.project, tmp_path, "--no-distances")
    assert "no reference of the same name (1): phantom_002" in shown.text


def test_evaluate_leaves_uncertainty_maps_out(cohort: Path, tmp_path: Path) -> None:
    """`apply` writes one beside each segmentation."""
    shutil.copytree(cohort / "labels", tmp_path / "applied")
    shutil.copy(cohort / "labels" / "phantom_001.nrrd", tmp_path / "applied" / "phantom_001-uncertainty.nrrd")
    shown = shell("evaluate", tmp_path / "applied", cohort / "labels", "--no-distances", "--json").json()
    assert shown["without_reference"] == []


def test_evaluate_without_references(cohort: Path, tmp_path: Path) -> None:
    shown = shell("evaluate", cohort / "labels", tmp_path)
    assert shown.code == WRONG_USE and "no prediction has a reference of the same name" in shown.text


def test_evaluate_takes_a_reference_that_was_saved_cropped(
    story: Story, cohort: Path, evaluated: Shown, tmp_path: Path
) -> None:
    """As Slicer saves a segmentation: what a prediction has outside of its extent is wrong all the same."""
    for path in (cohort / "labels").iterdir():
        label = read_volume(path)
        box = box_around(label.array)
        assert box is not None
        write_volume(tmp_path / path.name, box.of(label))
    shown = shell("evaluate", story.project, tmp_path, "--no-distances", "--json")
    assert shown.json()["mean_dice"] == evaluated.json()["mean_dice"]


def test_evaluate_on_another_grid(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "phantom_000.nrrd").write_bytes((cohort / "labels" / "phantom_001.nrrd").read_bytes())
    shown = shell("evaluate", cohort / "labels", tmp_path)
    assert shown.code == WRONG_USE and "another grid" in shown.text


@pytest.fixture(scope="session")
def page(story: Story, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "page.html"
    shown = shell("report", story.project, "--references", cohort / "labels", "--output", path, "--json")
    assert shown.json() == {"report": str(path)}
    return path.read_text(encoding="utf-8")


def test_a_report_with_references_replaces_none_without(reviewed: Path, cohort: Path) -> None:
    named = shell("report", reviewed, "--references", cohort / "labels", "--json").json()["report"]
    assert Path(named).name == "report-with-references.html" and Path(named).with_name("report.html").is_file()


def test_the_report_needs_no_other_file(page: str) -> None:
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|(https?://[^\s"'<]*)|@import""", page)
    outside = [link for found in links for link in found if link and not link.startswith("data:")]
    assert outside == [], "the report is one file; nothing is fetched"


def test_the_report_shows_every_case(page: str) -> None:
    assert page.count("data:image/png;base64,") >= 3, "a picture for each of two cases, and the losses"


def test_the_report_compares_with_the_references(page: str) -> None:
    assert "Comparison with references" in page


def test_the_report_is_no_other_kind_of_file(story: Story, cohort: Path) -> None:
    scan = cohort / "images" / "phantom_001.nrrd"
    before = scan.read_bytes()
    shown = shell("report", story.project, "--output", scan)
    assert shown.code == WRONG_USE and scan.read_bytes() == before


def test_the_report_with_references_that_are_not_there(story: Story, tmp_path: Path) -> None:
    shown = shell("report", story.project, "--references", tmp_path / "nope")
    assert shown.code == WRONG_USE and "is not a folder" in shown.text


def test_the_report_names_what_has_no_reference(story: Story, cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "phantom_001.nrrd").write_bytes((cohort / "labels" / "phantom_001.nrrd").read_bytes())
    shell("report", story.project, "--references", tmp_path / "truth", "--output", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "reference of the same name (1): phantom_002" in text


def test_the_demo_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    shown = shell("demo", tmp_path)
    assert shown.code == WRONG_USE and "not empty" in shown.text


def test_a_long_path_is_printed_on_one_line(story: Story, tmp_path: Path) -> None:
    path = tmp_path / ("a folder [with brackets] " * 4).strip() / "page.html"
    shown = shell("report", story.project, "--output", path)
    assert str(path) in shown.out.splitlines(), "a path that is broken or changed cannot be copied"


# ---------------------------------------------------------------------- doctor and the worker's door


def test_doctor_for_machines() -> None:
    value = shell("doctor", "--json").json()
    assert value["ready"] is True and {"python", "packages", "devices", "missing", "write_access"} <= set(value)


def test_doctor_for_people() -> None:
    assert "torch" in shell("doctor").text


def test_the_worker_has_the_doctor_too() -> None:
    path = Path(worker.__file__)
    done = subprocess.run([sys.executable, path, "--doctor"], capture_output=True, text=True, check=False, timeout=120)
    assert json.loads(done.stdout)["packages"]["torch"]["version"], done.stderr


def test_the_doctor_works_without_any_package() -> None:
    path = Path(worker.__file__)
    command = [sys.executable, "-I", "-S", path, "--doctor"]  # -S: no site-packages
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    value = json.loads(done.stdout)
    assert value["ready"] is False and "torch" in [one["package"] for one in value["missing"]]


def test_without_the_shells_packages_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from SemiSAMO1Lib.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == WRONG_USE and "semisamo1[shell]" in done.stderr, done.stderr


# ---------------------------------------------------------------------- no traceback


@pytest.mark.parametrize(
    "command",
    [
        ("template", "--case", "a", "--remove"),
        ("train",),
        ("status",),
        ("cancel",),
        ("resume",),
        ("predict", "--input", "a.nrrd", "--output", "b.nrrd"),
        ("report",),
    ],
)
def test_a_missing_project_is_named(tmp_path: Path, command: tuple[str, ...]) -> None:
    shown = shell(command[0], tmp_path / "nothing", *command[1:])
    expected = (
        "a.nrrd does not exist" if command[0] == "predict" and "does not exist" in shown.text else "is not a project"
    )
    assert shown.code == WRONG_USE and expected in shown.text


def test_a_damaged_project_file_is_named(untrained: Path) -> None:
    (untrained / "project.json").write_text("{", encoding="utf-8")
    shown = shell("status", untrained)
    assert shown.code == WRONG_USE and "project.json is not valid JSON" in shown.text


def test_a_project_of_a_newer_program_is_refused(untrained: Path) -> None:
    value = files.read_json(untrained / "project.json")
    files.write_json(untrained / "project.json", {**value, "schema": 99})
    shown = shell("train", untrained)
    assert shown.code == WRONG_USE and "schema 99" in shown.text


def test_a_damaged_job_is_no_traceback(untrained: Path) -> None:
    job = JobFolder.create(untrained / "jobs", JobKind.TRAIN, {}, [])
    files.write_text(job.status, "[]")
    shown = shell("status", untrained)
    assert shown.code == WRONG_USE and "status.json is not the status of a job" in shown.text


def test_an_error_that_nobody_thought_of_is_one_line(untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("SemiSAMO1Lib.shell.commands.observe", broken)
    shown = shell("status", untrained)
    assert shown.code == FAILED and "unexpected ZeroDivisionError: a bug" in shown.text


def test_errors_go_to_the_other_stream(tmp_path: Path) -> None:
    shown = shell("status", tmp_path, "--json")
    assert shown.out == "" and "error:" in shown.err, "a script that reads JSON must not read an error"


def test_a_lack_of_memory_says_what_to_do(untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("SemiSAMO1Lib.shell.commands.observe", too_large)
    shown = shell("status", untrained)
    assert shown.code == FAILED and "Close other programs" in shown.text


def test_an_export_from_the_shell(reviewed: Path, tmp_path: Path) -> None:
    value = shell("export", reviewed, "--output", tmp_path / "out", "--format", "nifti", "--json").json()
    assert value["exported"] == {"phantom_000": "label", "phantom_001": "prediction", "phantom_002": "prediction"}
    assert (tmp_path / "out" / "phantom_001.nii.gz").is_file() and value["left_out"] == {}


def test_an_export_into_the_project_is_refused(reviewed: Path) -> None:
    shown = shell("export", reviewed, "--output", reviewed / "out")
    assert shown.code == WRONG_USE and "Export into a folder of its own" in shown.text


def test_further_scans_are_segmented_as_the_cases_are(story: Story, cohort: Path, tmp_path: Path) -> None:
    """A scan under another name gets the segmentation that `predict` gives it; a broken one is listed."""
    images = tmp_path / "new scäns"
    images.mkdir()
    shutil.copyfile(cohort / "images" / "phantom_001.nrrd", images / "another.nrrd")
    (images / "broken.nrrd").write_bytes(b"NRRD0004")
    given = ("--images", images, "--output", tmp_path / "out", "--device", "cpu")
    value = shell("apply", story.project, *given, "--json").json()
    assert value["segmented"] == {"another": "another.seg.nrrd"} and list(value["left_out"]) == ["broken.nrrd"]
    one = ("--input", images / "another.nrrd", "--output", tmp_path / "one.nrrd", "--device", "cpu")
    shell("predict", story.project, *one)
    together = read_volume(tmp_path / "out" / "another.seg.nrrd").array
    assert np.array_equal(together, read_volume(tmp_path / "one.nrrd").array)


def test_segmentations_of_an_earlier_call_do_not_stay(story: Story, cohort: Path, tmp_path: Path) -> None:
    """They may be another model's, and the table would not name them."""
    images, out = tmp_path / "images", tmp_path / "out"
    for folder in (images, out):
        folder.mkdir()
    shutil.copyfile(cohort / "images" / "phantom_001.nrrd", images / "new.nrrd")
    for name in ("old.seg.nrrd", "old-uncertainty.nrrd", "mine.nrrd"):
        (out / name).write_bytes(b"")
    files.write_text(out / "predictions.csv", "scan,file\nold,old.seg.nrrd\n")
    assert shell("apply", story.project, "--images", images, "--output", out, "--device", "cpu").code == DONE
    assert sorted(path.name for path in out.iterdir() if path.suffix == ".nrrd") == [
        "mine.nrrd",
        "new-uncertainty.nrrd",
        "new.seg.nrrd",
    ]


@pytest.mark.parametrize("place", ["images/inside", "."])
def test_segmentations_never_lie_among_the_scans(story: Story, cohort: Path, place: str) -> None:
    shown = shell("apply", story.project, "--images", cohort / "images", "--output", cohort / place)
    assert shown.code == WRONG_USE and "a folder of their own" in shown.text


def test_the_scans_folder_is_not_written_into(story: Story, cohort: Path) -> None:
    images = cohort / "images"
    shown = shell("apply", story.project, "--images", images, "--output", images)
    assert shown.code == WRONG_USE and "a folder of their own" in shown.text


def test_a_finished_training_works_on_after_its_scans_were_moved(story: Story, cohort: Path, tmp_path: Path) -> None:
    """The job noted where the scans lay when it was started; the project knows where they are now."""
    shutil.copytree(cohort / "images", tmp_path / "scans")
    shutil.copytree(story.project, tmp_path / "project")
    project = Project(tmp_path / "project")
    gone = {case.id: str(tmp_path / "gone" / Path(case.absolute).name) for case in project.state.cases}
    cases = tuple(replace(case, absolute=gone[case.id], relative=gone[case.id]) for case in project.state.cases)
    project.change(lambda state: replace(state, cases=cases))
    listing = project.jobs / str(project.state.current_training) / "inputs" / "cases.json"
    value = files.read_json(listing)
    for row in (*value["labelled"], *value["cases"]):
        row["places"] = [gone[row["id"]]]
    files.write_json(listing, value)
    one = ("--input", cohort / "images" / "phantom_001.nrrd", "--output", tmp_path / "one.seg.nrrd", "--device", "cpu")
    lost = shell("predict", project.folder, *one)
    assert lost.code != DONE and "semisamo1 locate" in lost.text
    assert shell("locate", project.folder, "--folder", tmp_path / "scans").code == DONE
    assert shell("predict", project.folder, *one).code == DONE


class TestWhatIsSaidByTheWay:
    def test_undo_says_that_the_correction_is_kept(self, reviewed: Path, cohort: Path) -> None:
        given = ("--case", "phantom_001", "--labels", cohort / "labels" / "phantom_001.nrrd")
        assert shell("correct", reviewed, *given).code == DONE
        assert f"semisamo1 discard {reviewed} --case phantom_001" in shell("undo", reviewed, *given[:2]).text
        again = shell("correct", reviewed, *given)
        assert again.code == WRONG_USE and f"semisamo1 discard {reviewed} --case phantom_001" in again.text
        assert shell("discard", reviewed, *given[:2]).code == DONE
        assert shell("correct", reviewed, *given).code == DONE

    def test_a_template_that_is_left_out_is_warned_of(self, reviewed: Path) -> None:
        assert "this is the template" in shell("exclude", reviewed, "--case", "phantom_000").text
        assert "this is the template" not in shell("exclude", reviewed, "--case", "phantom_001").text

    def test_an_older_training_does_not_take_over_in_silence(
        self, reviewed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What `resume` says at its end."""
        said: list[str] = []
        monkeypatch.setattr(commands, "say", lambda _value, _as_json, text: said.append(text))
        job = JobFolder(reviewed / "jobs" / str(Project(reviewed).state.current_training))
        newer = "0099-train"
        project = Project(reviewed)
        project.change(lambda state: replace(state, current_training=newer))
        commands._watch(job, False, False)
        assert f"The predictions of {newer}, which is newer, go on counting" in said[0]
        assert f"semisamo1 use {reviewed} --training {job.id}" in said[0]

    def test_no_export_says_in_which_folders_the_scans_lie(self, reviewed: Path, tmp_path: Path) -> None:
        """Folders are often called after patients."""
        project = Project(reviewed)
        lost = tmp_path / "Doe, Jane" / "scan.nrrd"
        moved = [
            replace(one, absolute=lost.as_posix(), relative=lost.as_posix()) if one.id == "phantom_001" else one
            for one in project.state.cases
        ]
        changed = write_other_image(lost)
        project.change(lambda state: replace(state, cases=tuple(moved)))
        shell("export", reviewed, "--output", tmp_path / "out")
        said = (tmp_path / "out" / "left_out.csv").read_text()
        assert "was changed since it was added (scan.nrrd)" in said and "Jane" not in said, changed


def write_other_image(path: Path) -> Path:
    path.parent.mkdir()
    write_volume(path, Volume(np.zeros((4, 4, 4), np.int16), Geometry((4, 4, 4))))
    return path
