"""The template advisor: who is central, who does not fit; it needs no torch and knows no orientation or grey scale."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scans import write_scan

from SemiSAMO1Lib.image_io import write_volume
from SemiSAMO1Lib.job import JobFolder
from SemiSAMO1Lib.phantoms import PhantomSettings, make_phantom
from SemiSAMO1Lib.project import Project, ProjectError, Skipped
from SemiSAMO1Lib.project.advising import read_advice, request_advice
from SemiSAMO1Lib.project.advisor import MOST_COMPARED, Frame, Ranked, rank, sketch
from SemiSAMO1Lib.project.importing import candidates, look
from SemiSAMO1Lib.volume import Geometry, Volume

SMALL = PhantomSettings(spacing_mm=(4.0, 3.5, 3.5), deformation_mm=2.0)


@pytest.fixture(scope="module")
def cohort() -> dict[str, Volume]:
    return {f"case_{n}": make_phantom(n, settings=SMALL).image for n in range(7)}


def ranked(volumes: dict[str, Volume]) -> dict[str, Ranked]:
    frame = Frame.of([one.geometry for one in volumes.values()])
    return {one.case: one for one in rank({name: sketch(one, frame) for name, one in volumes.items()})}


def with_odd(cohort: dict[str, Volume], odd: Volume) -> list[Ranked]:
    return list(ranked({**cohort, "odd": odd}).values())


def inverted(volume: Volume) -> Volume:
    """The same anatomy with bright and dark exchanged, as another modality shows it."""
    return Volume(volume.array.max() - volume.array, volume.geometry)


def other_body(volume: Volume) -> Volume:
    """Another anatomy in the same kind of image: three thin bones off the centre."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in volume.array.shape), indexing="ij")
    bones = sum(np.exp(-(((y - a) ** 2 + (x - b) ** 2) / 0.02)) for a, b in ((-0.8, 0.8), (0.8, 0.7), (-0.1, -0.9)))
    noise = np.random.default_rng(0).normal(0, 0.05, z.shape)
    return Volume((100 + 400 * bones + 60 * z + 30 * noise).astype(np.float32), volume.geometry)


def empty_half(volume: Volume) -> Volume:
    array = volume.array.copy()
    array[array.shape[0] // 3 :] = 0
    return Volume(array, volume.geometry)


def noise(volume: Volume) -> Volume:
    return Volume(np.random.default_rng(0).normal(0, 1, volume.array.shape).astype(np.float32), volume.geometry)


def whole_body(volume: Volume) -> Volume:
    spacing = tuple(2 * one for one in volume.geometry.spacing)
    return Volume(volume.array, replace(volume.geometry, spacing=spacing))


class TestOutliers:
    @pytest.mark.parametrize(
        ("make", "warning"),
        [
            (inverted, "another modality or contrast?"),
            (other_body, "another body part"),
            (empty_half, "slices along one axis are empty"),
            (noise, "noise, or a damaged file"),
            (whole_body, "times the usual one: another body part or protocol?"),
        ],
    )
    def test_a_scan_that_does_not_fit_is_named_and_comes_last(self, cohort, make, warning) -> None:
        ranking = with_odd(cohort, make(cohort["case_0"]))
        assert ranking[-1].case == "odd" and warning in ranking[-1].warning, ranking

    def test_the_others_are_not_blamed(self, cohort) -> None:
        assert [one.warning for one in with_odd(cohort, noise(cohort["case_0"]))[:-1]] == [""] * len(cohort)

    def test_a_cohort_without_outliers_has_none(self, cohort) -> None:
        assert not any(one.warning for one in ranked(cohort).values())


class TestOrder:
    def test_the_undeformed_anatomy_is_more_central_than_extreme_ones(self) -> None:
        """Six scans that are bent more and more: the middle of them is recommended, not an end."""
        bent = {}
        for number in range(5):
            volume = make_phantom(0, settings=replace(SMALL, noise=1.0)).image
            rolled = np.roll(volume.array, 3 * (number - 2), axis=(1, 2))
            bent[f"shift_{number}"] = Volume(rolled, volume.geometry)
        assert next(iter(ranked(bent))) == "shift_2"

    def test_it_does_not_depend_on_names(self, cohort) -> None:
        order = [one for one, _ in ranked(cohort).items()]
        renamed = {f"{9 - int(name[-1])}": volume for name, volume in cohort.items()}
        assert [f"case_{9 - int(one)}" for one in ranked(renamed)] == order

    def test_it_does_not_depend_on_how_a_scan_is_stored(self, cohort) -> None:
        volume = cohort["case_3"]
        geometry = volume.geometry
        direction = np.reshape(geometry.direction, (3, 3)).copy()
        direction[:, 2] *= -1
        origin = (geometry.index_to_space @ np.array([0, 0, geometry.shape[0] - 1, 1.0]))[:3]
        stored = Geometry(geometry.shape, geometry.spacing, tuple(origin), tuple(direction.ravel()))
        other = {**cohort, "case_3": Volume(volume.array[::-1].copy(), stored)}
        assert ranked(other)["case_3"].centrality == pytest.approx(ranked(cohort)["case_3"].centrality, abs=1e-3)

    def test_it_does_not_depend_on_the_grey_scale(self, cohort) -> None:
        other = {
            **cohort,
            "case_3": Volume(5 * cohort["case_3"].array.astype(np.float32) - 900, cohort["case_3"].geometry),
        }
        assert ranked(other)["case_3"].centrality == pytest.approx(ranked(cohort)["case_3"].centrality, abs=1e-3)

    def test_more_scans_than_are_compared(self, cohort) -> None:
        frame = Frame.of([one.geometry for one in cohort.values()])
        some = [sketch(one, frame) for one in cohort.values()]
        many = {f"{n:03d}": some[n % len(some)] for n in range(MOST_COMPARED + 5)}
        assert len(rank(many)) == MOST_COMPARED + 5

    def test_a_constant_scan_is_no_reason_to_fail(self, cohort) -> None:
        flat = Volume(np.zeros_like(cohort["case_0"].array), cohort["case_0"].geometry)
        assert with_odd(cohort, flat)[-1].case == "odd"


#: Runs a job where neither torch nor the other parts of the engine can be imported.
PROGRAM = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "monai", "scipy", "lightning_fabric", "h5py", "pydantic"):
            raise ModuleNotFoundError(f"{name} is not needed", name=name)

sys.meta_path.insert(0, Blocker())
from SemiSAMO1Lib.worker import main
sys.exit(main(sys.argv[1:]))
"""


def project_of(folder: Path, volumes: dict[str, Volume]) -> Project:
    for name, volume in volumes.items():
        write_volume(folder / "scans" / f"{name}.nrrd", volume)
    project = Project.create(folder / "project")
    for candidate in candidates(folder / "scans", project.folder):
        assert not isinstance(candidate, Skipped)
        found = look(candidate)
        assert not isinstance(found, Skipped)
        project.add(found)
    return project


class TestJob:
    def run(self, job: JobFolder) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, str(job.path)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    def test_it_needs_numpy_and_simpleitk_only(self, tmp_path: Path, cohort) -> None:
        project = project_of(tmp_path, cohort)
        done = self.run(request_advice(project))
        assert done.returncode == 0, done.stdout + done.stderr
        assert sorted(one.case for one in read_advice(project)) == sorted(cohort)

    def test_a_scan_that_was_lost_is_named(self, tmp_path: Path, cohort) -> None:
        project = project_of(tmp_path, cohort)
        (tmp_path / "scans" / "case_2.nrrd").unlink()
        self.run(request_advice(project))
        assert "missing" in {one.case: one.warning for one in read_advice(project)}["case_2"]

    def test_of_two_scans_none_is_recommended(self, tmp_path: Path) -> None:
        project = Project.create(tmp_path / "project")
        write_scan(tmp_path / "a.nrrd")
        with pytest.raises(ProjectError, match="3 are needed"):
            request_advice(project)

    def test_before_an_advice_there_is_none(self, tmp_path: Path) -> None:
        assert read_advice(Project.create(tmp_path / "project")) == []
