"""What the tests of the published protocol share: a layout, one finished run, no checkpoint of this computer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from method_helpers import SMALL, Run, Trained, reproduce, write_layout
from shell_runner import shell

from SemiSAMO1Lib import files
from SemiSAMO1Lib.phantoms import write_cohort

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def no_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No checkpoint of this computer's user plays a part; gives the cache folder that is used instead."""
    from SemiSAMO1Lib.engine.generalists.sam_med3d import checkpoint

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv(checkpoint.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "semisamo1"


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases as the published files are; read only."""
    return write_layout(tmp_path_factory.mktemp("layout with spaces [and] ümlauts"))


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """The same, to be changed."""
    return write_layout(tmp_path / "layout")


@pytest.fixture(scope="session")
def run(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Mean teacher, two rounds of four iterations; read only."""
    output = tmp_path_factory.mktemp("run") / "output"
    shown = reproduce(published, output, "--rounds", 2, "--iterations", 4)
    assert shown.code == 0, shown.text
    return Run(published, output, shown)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Three phantoms, the first labelled, carried to the others by MIND-SSC; tests add trainings, nothing else."""
    folder = tmp_path_factory.mktemp("trained")
    names = write_cohort(folder, 3, settings=SMALL)
    project, config = folder / "project", folder / "tiny.json"
    files.write_json(config, {"preset": "quick", "patch_voxels": 4096, "filters": 4, "device": "cpu", "threads": 1})
    shell("init", project, "--images", folder / "images")
    shell("template", project, "--case", names[0], "--labels", folder / "labels" / f"{names[0]}.nrrd")
    shown = shell("train", project, "--generalist", "mind", "--rounds", 0, "--config", config, "--json")
    return Trained(project, config, shown)
