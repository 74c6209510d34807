"""Signals of quality: each is better for a good prediction than for a spoiled one, and what it is made of."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import identity_deformation, smooth_noise, tiny_config, tiny_plan
from scipy import ndimage

from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase, Propagation
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.evaluation.signals import _edge, cohort_signals
from SemiSAMO1Lib.engine.observer import Silent, Stopped
from SemiSAMO1Lib.engine.ranks import Ranks
from SemiSAMO1Lib.quality import DOUBTS
from SemiSAMO1Lib.volume import Geometry, Volume

GRID = Geometry((10, 12, 14))
TRUTH = np.zeros(GRID.shape, np.uint8)
TRUTH[2:7, 3:9, 3:9] = 1
TRUTH[3:5, 4:6, 4:6] = 2


def probabilities(label, sure=0.95):
    """Class probabilities (3, z, y, x) of a label map, each voxel equally sure."""
    p = np.where(label[None] == np.arange(3).reshape(-1, 1, 1, 1), sure, (1 - sure) / 2)
    return p.astype(np.float16)


def halved(label):
    """A label map of which one half is missing."""
    half = label.copy()
    half[:, :, 6:] = 0
    return half


def make(folder, predictions, registered=True, earlier=None):
    """A cohort whose cases were predicted like this in round 2, and answered so; registration gave the truth."""
    image = Volume(smooth_noise(GRID.shape, 0) + 2 * (TRUTH > 0), GRID)
    template = LabelledCase("template", image, Volume(TRUTH, GRID))
    cases = [EngineCase(name, GRID, lambda: image) for name in predictions]
    cohort = Cohort(cases, [template], tiny_plan(3), Store(folder))
    for name, (label, sure) in predictions.items():
        known = torch.from_numpy(probabilities(TRUTH).astype(np.float32))
        transforms = [identity_deformation(GRID)] if registered else []
        cohort.save_propagation(name, Propagation(GRID, known, torch.full(GRID.shape, 0.5), transforms, {}))
        first = earlier if earlier is not None else label
        cohort.store.save_array(probabilities(first, sure), "probabilities", "1", f"{name}.npy")
        cohort.store.save_array(probabilities(label, sure), "probabilities", "2", f"{name}.npy")
        cohort.save_answer(0, name, probabilities(TRUTH))
        cohort.save_answer(2, name, probabilities(label, sure))
    return cohort


@pytest.fixture
def good_and_bad(tmp_path):
    good = dict.fromkeys("abc", (TRUTH, 0.95))
    cohort = make(tmp_path, {**good, "spoiled": (halved(TRUTH), 0.6)}, earlier=TRUTH)
    return cohort_signals(cohort, 2, tiny_config(ensemble_rounds=False), Silent(), Ranks())


ALL = ("expected_dice", "boundary_entropy", "entropy_by_volume", "entropy_by_surface", "with_propagation")
ALL += (
    "network_with_propagation",
    "between_rounds",
    "volume_to_template",
    "volume_to_cohort",
    "reverse",
    "with_cohort",
)


@pytest.mark.parametrize("name", ALL)
def test_a_spoiled_prediction_shows(good_and_bad, name):
    good, bad = good_and_bad["a"][0][name], good_and_bad["spoiled"][0][name]
    assert (bad > good) if name in DOUBTS else (bad < good), f"{name}: good {good}, spoiled {bad}"


@pytest.mark.parametrize(
    "name", ["with_propagation", "network_with_propagation", "between_rounds", "reverse", "with_cohort"]
)
def test_a_perfect_prediction_agrees_with_everything(good_and_bad, name):
    assert [signals[name] for signals in good_and_bad["a"]] == [1.0, 1.0]


def test_agreements_are_dice_values(good_and_bad):
    whole, half = int((TRUTH == 1).sum()), int((halved(TRUTH) == 1).sum())
    assert good_and_bad["spoiled"][0]["with_propagation"] == pytest.approx(2 * half / (whole + half))


def test_the_prototype_is_the_templates_own_for_its_own_label(good_and_bad):
    assert good_and_bad["a"][0]["prototype"] == pytest.approx(1.0, abs=1e-3)


def test_entropy_does_not_know_the_number_of_classes(tmp_path):
    """A voxel that is half this class has one bit, with three classes as with two."""
    p = probabilities(TRUTH, 1.0).astype(np.float32)
    p[:, 2:7, 3:9, 3:9] = np.array([0.0, 0.5, 0.5]).reshape(3, 1, 1, 1)
    cohort = make(tmp_path, {"a": (TRUTH, 1.0)})
    cohort.save_answer(2, "a", p.astype(np.float16))
    signals = cohort_signals(cohort, 2, tiny_config(ensemble_rounds=False), Silent(), Ranks())
    assert signals["a"][0]["entropy_by_volume"] == pytest.approx(1.0, abs=0.01)


def test_without_registration_there_is_no_way_back(tmp_path):
    signals = cohort_signals(make(tmp_path, {"a": (TRUTH, 0.9)}, registered=False), 2, tiny_config(), Silent(), Ranks())
    assert signals["a"][0]["reverse"] is None and signals["a"][0]["with_cohort"] is None


def test_round_0_does_not_compare_the_propagation_with_itself(tmp_path):
    signals = cohort_signals(make(tmp_path, {"a": (TRUTH, 0.9)}), 0, tiny_config(), Silent(), Ranks())
    assert [signals["a"][0][name] for name in ("with_propagation", "between_rounds")] == [None, None]


def test_a_class_that_the_template_says_nothing_about_is_not_compared_with_it(tmp_path):
    cohort = make(tmp_path, {"a": (TRUTH, 0.9)})
    cohort.labelled[0] = replace(cohort.labelled[0], label=Volume(TRUTH * (TRUTH == 1), GRID), unknown=(2,))
    known, unknown = cohort_signals(cohort, 2, tiny_config(), Silent(), Ranks())["a"]
    with_template = ("reverse", "prototype", "volume_to_template")
    assert [unknown[name] for name in with_template] == [None] * 3
    assert all(known[name] is not None for name in with_template)


def test_with_one_case_there_is_no_cohort(tmp_path):
    signals = cohort_signals(make(tmp_path, {"a": (TRUTH, 0.9)}), 2, tiny_config(), Silent(), Ranks())
    assert signals["a"][0]["with_cohort"] is None and signals["a"][0]["reverse"] == 1.0


def test_a_class_that_was_not_found_has_signs_too(tmp_path):
    signals = cohort_signals(
        make(tmp_path, {"a": (np.where(TRUTH == 2, 1, TRUTH), 1.0)}), 2, tiny_config(), Silent(), Ranks()
    )
    assert all(value is None or np.isfinite(value) for value in signals["a"][1].values())
    assert signals["a"][1]["network_with_propagation"] == 0


def test_rounds_are_compared_one_by_one_though_their_mean_is_kept(tmp_path):
    """The second round's own answer is empty, the kept mean of both shows the first one's: they still disagree."""
    cohort = make(tmp_path, {"a": (TRUTH, 1.0)})
    first, second = probabilities(TRUTH, 0.9), probabilities(np.zeros_like(TRUTH), 0.9)
    cohort.store.save_array(first, "probabilities", "1", "a.npy")
    cohort.store.save_array(((first + second) / 2).astype(np.float16), "probabilities", "2", "a.npy")
    signals = cohort_signals(cohort, 2, tiny_config(ensemble_rounds=True), Silent(), Ranks())
    assert signals["a"][0]["between_rounds"] == 0


def a_ball(radius):
    z, y, x = np.ogrid[:24, :24, :24]
    return (z - 12) ** 2 + (y - 12) ** 2 + (x - 12) ** 2 <= radius**2


def test_a_border_on_an_edge_of_the_image_shows():
    """A bright ball: its own border lies on the edge, that of a smaller or a larger ball beside it."""
    gradient = ndimage.gaussian_gradient_magnitude(a_ball(7).astype(np.float32), 1.0)
    on, smaller, larger = (_edge(gradient, a_ball(radius)) for radius in (7, 5, 9))
    assert on > 2 * max(smaller, larger), (on, smaller, larger)


@pytest.mark.parametrize("mine", [np.zeros((24, 24, 24), bool), np.ones((24, 24, 24), bool)])
def test_what_has_no_border_lies_on_no_edge(mine):
    assert _edge(np.ones((24, 24, 24), np.float32), mine) is None


def test_an_image_without_edges_says_nothing():
    assert _edge(np.zeros((24, 24, 24), np.float32), a_ball(7)) is None


def test_a_stop_is_heard(tmp_path):
    class Asked(Silent):
        def should_stop(self) -> bool:
            return True

    with pytest.raises(Stopped):
        cohort_signals(make(tmp_path, {"a": (TRUTH, 0.9)}), 2, tiny_config(), Asked(), Ranks())


def with_residuals(cohort, **residuals):
    for name, value in residuals.items():
        kept = cohort.store.tensors("transforms", f"{name}.pt")
        cohort.store.save_tensors({**kept, "residual": value}, "transforms", f"{name}.pt")
    return cohort_signals(cohort, 2, tiny_config(), Silent(), Ranks())


def test_a_scan_that_the_template_fits_badly_shows(tmp_path):
    """As usual is 0; three times the usual residual its logarithm, for every class."""
    cohort = make(tmp_path, dict.fromkeys("abcd", (TRUTH, 0.95)))
    signals = with_residuals(cohort, d=0.3)
    assert signals["a"][0]["residual"] == pytest.approx(0)
    assert signals["d"][0]["residual"] == signals["d"][1]["residual"] == pytest.approx(np.log(3))


@pytest.mark.parametrize("value", [float("inf"), 0.0])
def test_a_residual_that_says_nothing_is_no_signal(tmp_path, value):
    signals = with_residuals(make(tmp_path, dict.fromkeys("abc", (TRUTH, 0.95))), a=value)
    assert signals["a"][0]["residual"] is None and signals["b"][0]["residual"] == pytest.approx(0)
