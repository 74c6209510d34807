"""The portable model: it runs in a Python without this library and segments as the specialists do here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from shell_runner import shell

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.data.boxes import box_around
from SemiSAMO1Lib.engine.data.grids import canonical
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.devices import make_fabric
from SemiSAMO1Lib.engine.inference.ensemble import predicted_by_all
from SemiSAMO1Lib.engine.inference.uncertainty import to_case_grid
from SemiSAMO1Lib.engine.observer import Silent
from SemiSAMO1Lib.engine.planning import Plan
from SemiSAMO1Lib.image_io import read_volume, write_volume
from SemiSAMO1Lib.phantoms import PhantomSettings, write_cohort
from SemiSAMO1Lib.project import Project
from SemiSAMO1Lib.project.label_reader import read_labels
from SemiSAMO1Lib.project.results import current_training
from SemiSAMO1Lib.tasks.bundle import CODE
from SemiSAMO1Lib.tasks.inputs import ClassMap
from SemiSAMO1Lib.tasks.train import config_of
from SemiSAMO1Lib.volume import Volume

SMALL = PhantomSettings(spacing_mm=(4.5, 4.0, 4.0))
TINY = {"patch_voxels": 4096, "filters": 4, "device": "cpu", "precision": "32-true", "test_time_passes": 2}


@pytest.fixture(scope="module", params=["mean_teacher", "dual_task"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project trained with two rounds, its bundle, and the bundle unpacked."""
    place = tmp_path_factory.mktemp("bundle")
    write_cohort(place / "cohort", 3, settings=SMALL)
    return trained_in(place, request.param, 30)


def trained_in(place: Path, learner: str, iterations: int) -> Path:
    """Train on the cohort of a folder, and unpack the bundle there."""
    project = place / "project"
    shell("init", project, "--images", place / "cohort" / "images")
    labels = place / "cohort" / "labels" / "phantom_000.nrrd"
    shell("template", project, "--case", "phantom_000", "--labels", labels)
    files.write_json(place / "tiny.json", TINY)
    options = ("--config", place / "tiny.json", "--rounds", 2, "--iterations", iterations, "--learner", learner)
    trained = shell("train", project, *options)
    assert trained.code == 0, trained.text
    done = shell("bundle", project, "--output", place / "model.zip")
    assert done.code == 0, done.text
    zipfile.ZipFile(place / "model.zip").extractall(place)
    return place


@pytest.fixture(scope="module")
def in_whole_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of scans that show far more than what is labelled."""
    place = tmp_path_factory.mktemp("whole")
    write_cohort(place / "small", 4, settings=SMALL)
    for number, path in enumerate(sorted((place / "small" / "images").iterdir())):
        generator = np.random.default_rng(number)
        image, label = (read_volume(place / "small" / kind / path.name) for kind in ("images", "labels"))
        geometry = replace(image.geometry, shape=tuple(2 * n for n in image.geometry.shape))
        at = tuple(slice(a, a + n) for n in image.array.shape for a in [int(generator.integers(2, n - 2))])
        noise = ndimage.gaussian_filter(generator.normal(size=geometry.shape), 2)
        around = image.array.mean() + image.array.std() * noise / noise.std()
        for kind, volume, outside in (("images", image, around), ("labels", label, np.zeros(geometry.shape))):
            array = outside.astype(volume.array.dtype)
            array[at] = volume.array
            write_volume(place / "cohort" / kind / path.name, Volume(array, geometry))
    return trained_in(place, "mean_teacher", 2)


def alone(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python in the bundle's folder so that it finds no SemiSAMO1Lib but the bundle's own."""
    blocked = folder / "blocked"
    blocked.mkdir(exist_ok=True)
    guard = "import sys; sys.path[:] = [p for p in sys.path if 'SemiSAMO1' not in p]\n"
    guard += (
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__name__', repr(f)).lower()]"
    )
    (blocked / "sitecustomize.py").write_text(guard, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(blocked)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=environment, cwd=folder / "model"
    )


def test_the_card_says_which_specialists_are_in_it(folder: Path) -> None:
    """Rounds go on from each other: the last one's specialist predicts, not the mean of two."""
    card = files.read_json(folder / "model" / "configs" / "metadata.json")
    assert card["description"].startswith("The specialist of round 2 (dynunet, ")


def specialists_alone(folder: Path, scan: Path) -> np.ndarray:
    """What the training's networks say here, without registration."""
    project = Project(folder / "project")
    job = current_training(project)
    store, config = Store(job.work), config_of(job)
    plan = Plan.model_validate(store.json("plan.json"))
    volume = read_volume(scan)
    cohort = Cohort([], [], plan, store)
    grid = cohort.grid(volume.geometry)
    fabric = make_fabric("cpu", plan.precision)
    found = predicted_by_all(cohort.scaled(volume, grid), plan, config, fabric, store, Silent())
    assert found is not None
    indices, _ = to_case_grid(found, grid, np.ones(grid.shape, bool), volume.geometry)
    return ClassMap.of(project.state.labels).to_values(indices).array


def test_it_gives_the_same_segmentation_in_a_fresh_python(folder: Path) -> None:
    scan = folder / "cohort" / "images" / "phantom_002.nrrd"
    done = alone(folder, "segment.py", scan, folder / "out.nrrd", "--uncertainty", folder / "doubt.nrrd")
    assert done.returncode == 0, done.stderr
    here, there = specialists_alone(folder, scan), read_volume(folder / "out.nrrd")
    assert here.any(), "an empty segmentation proves nothing"
    assert np.mean(here != there.array) < 1e-3, f"{np.mean(here != there.array):.4%} of the voxels differ"
    assert there.geometry.same_grid(read_volume(scan).geometry)
    assert read_volume(folder / "doubt.nrrd").array.max() <= 100


def test_in_a_whole_scan_it_looks_at_a_part_as_large_as_it_learned_from(in_whole_scans: Path) -> None:
    scan = in_whole_scans / "cohort" / "images" / "phantom_002.nrrd"
    done = alone(
        in_whole_scans, "segment.py", scan, in_whole_scans / "out.nrrd", "--uncertainty", in_whole_scans / "d.nrrd"
    )
    assert done.returncode == 0, done.stderr
    doubt, extent = read_volume(in_whole_scans / "d.nrrd"), files.read_json(in_whole_scans / "model" / "plan.json")
    assert doubt.geometry.same_grid(read_volume(scan).geometry)
    box = box_around(doubt.array)  # a network that has learned next to nothing doubts wherever it looks
    assert box is not None
    apart = np.abs(np.array(canonical(box.grid(doubt.geometry)).extent) - extent["surroundings_mm"])
    assert apart.max() <= 2 * max(doubt.geometry.spacing), f"the part is {apart} mm larger or smaller"


def test_a_further_whole_scan_is_segmented_by_what_a_finished_training_keeps(in_whole_scans: Path) -> None:
    scan = in_whole_scans / "cohort" / "images" / "phantom_003.nrrd"
    output = in_whole_scans / "further.nrrd"
    done = shell("predict", in_whole_scans / "project", "--input", scan, "--output", output)
    assert done.code == 0, done.text
    found, wanted = (read_volume(one) for one in (output, in_whole_scans / "cohort" / "labels" / scan.name))
    assert found.geometry.same_grid(wanted.geometry)
    overlap = 2 * np.count_nonzero((found.array > 0) & (wanted.array > 0))
    overlap /= np.count_nonzero(found.array) + np.count_nonzero(wanted.array)
    assert overlap > 0.6, f"a Dice of {overlap:.3f} of all labels together: it looked elsewhere"


def test_of_what_was_found_out_about_whole_scans_only_what_finds_it_in_further_ones_is_kept(
    in_whole_scans: Path,
) -> None:
    work = current_training(Project(in_whole_scans / "project")).work
    kept = {path.name for path in (work / "whole").iterdir()}
    assert kept == {"plan.json", "detours.json", "library", "library.json", "template-signature.npy", "transforms"}
    helpers = {f"{row['id']}.pt" for row in files.read_json(work / "whole" / "library.json")}
    assert {path.name for path in (work / "whole" / "transforms").iterdir()} == helpers


def test_it_writes_what_slicer_opens_as_segments(folder: Path) -> None:
    scan = folder / "cohort" / "images" / "phantom_002.nrrd"
    for name in ("segments.seg.nrrd", "map.nrrd"):
        done = alone(folder, "segment.py", scan, folder / name)
        assert done.returncode == 0, done.stderr
    read = read_labels(folder / "segments.seg.nrrd", read_volume(scan).geometry)
    assert np.array_equal(read.volume.array, read_volume(folder / "map.nrrd").array)
    assert list(read.names.values()) == [label.name for label in Project(folder / "project").state.labels]


def test_everybody_may_read_what_is_unpacked(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.zip") as bundle:
        closed = [one.filename for one in bundle.infolist() if not (one.external_attr >> 16) & 0o044]
    assert not closed, closed


@pytest.mark.parametrize(
    ("scan", "output", "message"),
    [
        ("nothing.nrrd", "out.nrrd", "is not a file"),
        ("plan.json", "out.tif", "unknown format"),
        ("plan.json", "out.nrrd", "error: "),
    ],
)
def test_what_it_cannot_do_is_one_line(folder: Path, scan: str, output: str, message: str) -> None:
    done = alone(folder, "segment.py", scan, output)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_monai_runs_it(folder: Path) -> None:
    scan = folder / "cohort" / "images" / "phantom_002.nrrd"
    given = f"config_file='configs/inference.json', scan={str(scan)!r}, output={str(folder / 'by_monai.nrrd')!r}"
    done = alone(folder, "-c", f"from monai.bundle import run; run('run', {given})")
    assert done.returncode == 0, done.stderr
    here = read_volume(folder / "by_monai.nrrd").array
    assert np.mean(here != specialists_alone(folder, scan)) < 1e-3


def test_monai_reads_it_as_a_bundle(folder: Path) -> None:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(folder / "model" / "configs" / "inference.json")
    parser.read_meta(folder / "model" / "configs" / "metadata.json")
    channels = parser["_meta_"]["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert channels == {"0": "background", "1": "label 1", "2": "label 2", "3": "label 3"}
    assert {"monai_version", "pytorch_version", "numpy_version", "version"} <= set(parser["_meta_"])


def test_its_network_takes_windows_of_the_plans_size(folder: Path) -> None:
    import torch

    network = torch.jit.load(str(folder / "model" / "models" / "model.ts"))
    plan = json.loads((folder / "model" / "plan.json").read_text(encoding="utf-8"))
    found = network(torch.randn(2, 1, *plan["patch"])).exp()
    assert found.shape == (2, plan["classes"], *plan["patch"])
    assert torch.allclose(found.sum(1), torch.ones(1), atol=1e-4)


def test_nothing_of_the_scans_travels_along(folder: Path) -> None:
    names = zipfile.ZipFile(folder / "model.zip").namelist()
    held = b"".join(zipfile.ZipFile(folder / "model.zip").read(name) for name in names if not name.endswith(".ts"))
    assert b"phantom_00" not in held and str(folder).encode() not in held


def test_the_code_that_travels_is_all_it_needs(folder: Path) -> None:
    inside = {name.partition("SemiSAMO1Lib/")[2] for name in zipfile.ZipFile(folder / "model.zip").namelist()}
    assert set(CODE) <= inside


def test_a_name_without_zip_is_refused(folder: Path) -> None:
    assert shell("bundle", folder / "project", "--output", folder / "model.pt").code == 2
