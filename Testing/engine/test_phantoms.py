"""Phantoms: known truth, from a seed."""

import numpy as np
import pytest

from SemiSAMO1Lib.image_io import read_volume
from SemiSAMO1Lib.phantoms import LABELS, PhantomSettings, make_phantom, write_cohort

SMALL = PhantomSettings(spacing_mm=(3.5, 3.5, 3.5))


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(n, 0, SMALL) for n in range(4)]


def test_same_seed_gives_the_same_case(phantoms):
    again = make_phantom(0, 0, SMALL)
    assert (
        np.array_equal(again.image.array, phantoms[0].image.array)
        and again.image.geometry == phantoms[0].image.geometry
    )


@pytest.mark.parametrize("change", [{"number": 1}, {"seed": 1}])
def test_other_cases_differ(phantoms, change):
    other = make_phantom(**{"number": 0, "seed": 0, "settings": SMALL, **change})
    assert other.image.geometry != phantoms[0].image.geometry or not np.array_equal(
        other.image.array, phantoms[0].image.array
    )


def test_every_case_shows_every_label(phantoms):
    for phantom in phantoms:
        assert set(np.unique(phantom.label.array)) == {0, *LABELS}, f"{phantom.name} lacks a label"


def test_label_and_image_share_a_grid(phantoms):
    assert all(p.label.geometry == p.image.geometry for p in phantoms)


def test_grey_values_are_finite(phantoms):
    assert all(np.isfinite(p.image.array).all() and p.image.array.dtype == np.float32 for p in phantoms)


def test_labels_show_in_the_grey_values(phantoms):
    """The vessel is the brightest, the small organ the darkest of the structures, in every case."""
    for phantom in phantoms:
        mean = {v: phantom.image.array[phantom.label.array == v].mean() for v in LABELS}
        assert mean[2] < mean[1] < mean[3], f"{phantom.name}: {mean}"


def test_scanners_differ(phantoms):
    assert (
        len({p.image.geometry.spacing for p in phantoms}) == 4
        and len({p.image.geometry.direction for p in phantoms}) == 4
    )


def test_directions_are_rotations(phantoms):
    for phantom in phantoms:
        matrix = np.reshape(phantom.image.geometry.direction, (3, 3))
        assert np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-9) and np.linalg.det(matrix) > 0


def test_written_cohort_reads_back(tmp_path, phantoms):
    names = write_cohort(tmp_path, 2, 0, SMALL)
    label = read_volume(tmp_path / "labels" / f"{names[1]}.nrrd")
    assert np.array_equal(label.array, phantoms[1].label.array)


def test_written_image_keeps_its_place(tmp_path, phantoms):
    names = write_cohort(tmp_path, 1, 0, SMALL)
    image = read_volume(tmp_path / "images" / f"{names[0]}.nrrd")
    assert image.geometry.same_grid(phantoms[0].image.geometry)
