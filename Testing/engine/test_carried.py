"""The template carried to other scans: its label stays exact, its appearance becomes the case's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_helpers import identity_deformation, smooth_noise, tiny_config, tiny_plan

from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase, Propagation
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.data.carried import carry_template
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.rounds import train
from SemiSAMO1Lib.volume import Geometry, Volume

SHAPE = (24, 26, 28)
GRID = Geometry(SHAPE)
IMAGE = smooth_noise(SHAPE, 0)
LABEL = np.zeros(SHAPE, np.uint8)
LABEL[8:14, 9:16, 10:20] = 1
LABEL[14:17, 9:16, 10:20] = 2
KNOWN = np.ones(SHAPE, bool)


def moved(points: torch.Tensor, x: float = 3.0) -> torch.Tensor:
    return points + torch.tensor([x, 0.0, 0.0]).reshape(3, 1, 1, 1)


def test_image_and_label_are_moved_alike():
    image, label, seen = carry_template(IMAGE, LABEL, KNOWN, GRID, IMAGE, GRID, moved)
    inside = (..., slice(0, -3))
    assert np.array_equal(label[inside], LABEL[..., 3:]), "the label lies where its image lies"
    fine = image[inside] - IMAGE[..., 3:]
    assert np.abs(fine).mean() < 0.35 * np.abs(IMAGE).mean(), "only smooth differences may be added to the image"
    assert not seen[..., -3:].any() and seen[inside].all()


def test_the_case_lends_its_smooth_appearance():
    z = np.linspace(-1, 1, SHAPE[0]).reshape(-1, 1, 1)
    bias = (4 + 2 * z) * np.ones(SHAPE)
    image, _, _ = carry_template(IMAGE, LABEL, KNOWN, GRID, IMAGE + bias, GRID, lambda points: points)
    middle = slice(6, -6)
    assert np.abs(image - (IMAGE + bias))[middle].max() < 0.1


def test_what_the_template_does_not_show_is_the_case_itself():
    case = smooth_noise(SHAPE, 5)
    image, label, seen = carry_template(IMAGE, LABEL, KNOWN, GRID, case, GRID, moved)
    assert np.array_equal(image[~seen], case.astype(np.float16)[~seen]) and not label[~seen].any()


def test_what_the_label_does_not_say_is_not_known():
    known = KNOWN.copy()
    known[:, :, :10] = False
    _, _, seen = carry_template(IMAGE, LABEL, known, GRID, IMAGE, GRID, lambda points: points)
    assert np.array_equal(seen, known)


def test_a_finer_grid_keeps_the_labels_volume():
    fine = Geometry((48, 52, 56), (0.5, 0.5, 0.5), (-0.25, -0.25, -0.25))
    _, label, _ = carry_template(
        IMAGE, LABEL, KNOWN, GRID, np.zeros(fine.shape, np.float16), fine, lambda points: points
    )
    volumes = [float((label == value).sum()) / 8 / float((value == LABEL).sum()) for value in (1, 2)]
    assert volumes == pytest.approx([1, 1], rel=0.02)


@pytest.fixture
def cohort(tmp_path):
    """Three cases, each registered to the template by nothing."""
    store, plan = Store(tmp_path), tiny_plan(classes=3)
    template = LabelledCase("t", Volume(IMAGE, GRID), Volume(LABEL, GRID), weight=2.0)
    cases = [EngineCase(name, GRID, lambda: Volume(IMAGE, GRID)) for name in "abc"]
    found = Cohort(cases, [template], plan, store)
    probabilities = torch.zeros(3, *SHAPE)
    probabilities[0] = 1
    for name in "abc":
        found.save_propagation(name, Propagation(GRID, probabilities, torch.ones(SHAPE), [identity_deformation(GRID)]))
    return found


def test_the_share_of_the_labelled_patches_is_what_was_asked(cohort):
    carried = cohort.carried_cases(0, 0.75)
    assert len(carried) == 3
    chances = sum(case.chance for case in carried)
    assert chances / (chances + 2.0) == pytest.approx(0.75)


def test_none_are_made_when_none_are_asked(cohort):
    assert cohort.carried_cases(0, 0.0) == [] and not cohort.store.has("carried", "label", "a.npy")


def test_they_are_made_once(cohort):
    cohort.carried_cases(0, 0.5)
    path = cohort.store.path("carried", "image", "a.npy")
    before = path.stat().st_mtime_ns
    cohort.carried_cases(0, 0.5)
    assert path.stat().st_mtime_ns == before


def test_learners_with_distances_get_them(cohort):
    assert all(case.distances is not None for case in cohort.carried_cases(0, 0.5, with_distances=True))


def test_they_reach_the_training(cohort, monkeypatch):
    """The patches of the labelled place come from the carried template as often as it was asked."""
    from SemiSAMO1Lib.engine import rounds
    from SemiSAMO1Lib.engine.observer import Silent
    from SemiSAMO1Lib.engine.progress import Progress
    from SemiSAMO1Lib.engine.training import make_fabric

    config = tiny_config(carried_share=0.6)
    for case in cohort.ids:
        rounds._first_pseudo_label(cohort, case, config)
    seen = {}
    monkeypatch.setattr(rounds, "train_round", lambda number, source, *_: seen.update(source=source))
    train(cohort, 1, config, make_fabric("cpu", "32-true"), Progress(Silent(), cohort, config))
    chances = [case.chance for case in seen["source"].labelled]
    assert len(chances) == 4 and sum(chances[1:]) / sum(chances) == pytest.approx(0.6)


def test_labelled_scans_are_mapped_from_disk_too(cohort):
    (template,) = cohort.labelled_cases(0)
    arrays = (template.image, template.target, template.weight)
    assert all(isinstance(array, np.memmap) for array in arrays), "of many labelled scans none is kept in memory"
    assert np.array_equal(template.target, LABEL) and np.asarray(template.weight).min() == 1
