"""Inputs that must not crash the engine, and those that it must refuse with a reason."""

import numpy as np
import pytest
import torch
from engine_helpers import Recorder, smooth_noise, tiny_config, tiny_plan, turned

from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase
from SemiSAMO1Lib.engine.cohort import Cohort
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.propagation.descriptors import describe
from SemiSAMO1Lib.engine.rounds import run
from SemiSAMO1Lib.image_io import UnreadableImage
from SemiSAMO1Lib.project.cases import check_voxels
from SemiSAMO1Lib.volume import Geometry, Volume

CONFIG = tiny_config(rounds=1, iterations=2, registration={"use_affine": False})


def scan(shape, seed=0, spacing=(1.0, 1.0, 1.0), direction=None):
    direction = direction or Geometry(shape).direction
    return Volume(smooth_noise(shape, seed), Geometry(shape, spacing, (0.0, 0.0, 0.0), direction))


def block(volume, value=1):
    label = np.zeros(volume.array.shape, np.uint8)
    z, y, x = volume.array.shape
    label[z // 4 : z // 4 + max(1, z // 2), y // 4 : 3 * y // 4, x // 4 : 3 * x // 4] = value
    return Volume(label, volume.geometry)


def engine(folder, template, scans, label=None, classes=2, config=CONFIG, **fields):
    labelled = LabelledCase("template", template, label or block(template), **fields)
    cases = [EngineCase(f"case{n}", s.geometry, lambda s=s: s) for n, s in enumerate(scans)]
    return list(run(cases, [labelled], classes, config, Store(folder), Recorder()))


def check_results(results, scans):
    """Every scan has a finite result on its own grid in both rounds."""
    assert len(results) == 2 * len(scans), f"{len(results)} results for {len(scans)} scans and two rounds"
    for result, volume in zip(results, scans * 2, strict=True):
        assert result.prediction.geometry == volume.geometry, f"{result.case_id} came back on another grid"


@pytest.mark.parametrize("value", [0.0, 37.0, -1000.0])
def test_constant_scan(tmp_path, value):
    template = scan((16, 16, 16))
    scans = [Volume(np.full((16, 16, 16), value, np.float32), Geometry((16, 16, 16))), scan((16, 16, 16), 1)]
    check_results(engine(tmp_path, template, scans), scans)


def test_constant_template(tmp_path):
    template = Volume(np.full((16, 16, 16), 5.0, np.float32), Geometry((16, 16, 16)))
    scans = [scan((16, 16, 16), 1)]
    check_results(engine(tmp_path, template, scans), scans)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_a_number_is_refused_before_the_engine(bad):
    volume = scan((8, 8, 8))
    volume.array[3, 3, 3] = bad
    with pytest.raises(UnreadableImage):
        check_voxels(volume)


@pytest.mark.parametrize("shape", [(8, 8, 8), (5, 6, 7), (3, 3, 3)])
def test_tiny_scans(tmp_path, shape):
    scans = [scan(shape, 1), scan(shape, 2)]
    check_results(engine(tmp_path, scan(shape), scans), scans)


def test_one_slice(tmp_path):
    scans = [scan((1, 32, 32), 1, (5.0, 1.0, 1.0))]
    check_results(engine(tmp_path, scan((1, 32, 32), 0, (5.0, 1.0, 1.0)), scans), scans)


def test_slices_ten_times_thicker_than_pixels(tmp_path):
    spacing = (10.0, 1.0, 1.0)
    scans = [scan((6, 40, 40), 1, spacing), scan((7, 44, 36), 2, spacing, turned((5, 5, 5)))]
    check_results(engine(tmp_path, scan((6, 40, 40), 0, spacing), scans), scans)


def test_scans_of_very_different_size(tmp_path):
    scans = [scan((8, 8, 8), 1), scan((40, 30, 20), 2)]
    check_results(engine(tmp_path, scan((16, 16, 16)), scans), scans)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.float64])
def test_every_type_of_grey_value(tmp_path, kind):
    scans = [
        Volume((40 * v.array + 120).clip(0, 255).astype(kind), v.geometry)
        for v in (scan((16, 16, 16), s) for s in (0, 1))
    ]
    check_results(engine(tmp_path, scans[0], scans[1:]), scans[1:])


def test_ct(tmp_path):
    scans = [
        Volume((300 * v.array - 100).clip(-1000, 1500).astype(np.int16), v.geometry)
        for v in (scan((16, 16, 16), s) for s in (0, 1))
    ]
    check_results(engine(tmp_path, scans[0], scans[1:]), scans[1:])


def test_class_that_the_template_lacks(tmp_path):
    """Three classes in the table, the template shows one foreground class of them."""
    scans = [scan((16, 16, 16), 1)]
    found = engine(tmp_path, scan((16, 16, 16)), scans, classes=3)
    assert 2 not in found[0].prediction.array, "registration cannot show a class that the template does not have"


def test_class_that_gets_lost_in_a_case(tmp_path):
    """A class of one voxel may vanish on the way to a case: the training goes on with what is there."""
    template = scan((16, 16, 16))
    label = block(template)
    label.array[0, 0, 0] = 2
    scans = [scan((16, 16, 16), 1)]
    check_results(engine(tmp_path, template, scans, label=label, classes=3), scans)


def test_labelled_case_that_is_all_foreground(tmp_path):
    template = scan((16, 16, 16))
    scans = [scan((16, 16, 16), 1)]
    full = Volume(np.ones(template.array.shape, np.uint8), template.geometry)
    check_results(engine(tmp_path, template, scans, label=full), scans)


# ---------------------------------------------------------------------- refused with a reason, before any work


def test_empty_template_is_refused(tmp_path):
    template = scan((16, 16, 16))
    nothing = Volume(np.zeros(template.array.shape, np.uint8), template.geometry)
    with pytest.raises(ValueError, match="'template' is empty"):
        engine(tmp_path, template, [scan((16, 16, 16), 1)], label=nothing)


def test_empty_label_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="segment"):
        engine(tmp_path, scan((16, 16, 16)), [scan((16, 16, 16), 1)], classes=1)


def test_no_case_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no unlabelled case"):
        engine(tmp_path, scan((16, 16, 16)), [])


def test_no_labelled_case_is_refused(tmp_path):
    volume = scan((16, 16, 16))
    with pytest.raises(ValueError, match="template"):
        list(run([EngineCase("a", volume.geometry, lambda: volume)], [], 2, CONFIG, Store(tmp_path), Recorder()))


@pytest.mark.parametrize(("parameter", "known"), [("learner", "mean_teacher"), ("specialist", "dynunet")])
def test_unknown_names_are_refused(tmp_path, parameter, known):
    config = CONFIG.model_copy(update={parameter: "nonsense"})
    with pytest.raises(ValueError, match=f"'nonsense'.*{known}"):
        engine(tmp_path, scan((16, 16, 16)), [scan((16, 16, 16), 1)], config=config)


@pytest.mark.parametrize("parameter", ["learner", "specialist", "device"])
def test_unknown_names_are_refused_before_any_work(tmp_path, parameter):
    config = CONFIG.model_copy(update={parameter: "nonsense"})
    with pytest.raises(ValueError, match="nonsense"):
        engine(tmp_path, scan((16, 16, 16)), [scan((16, 16, 16), 1)], config=config)
    assert not (tmp_path / "propagation").exists(), "registration ran before the wrong name was noticed"


def test_array_that_does_not_fit_its_grid_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 3, 3\).*\(4, 4, 4\)"):
        Volume(np.zeros((3, 3, 3)), Geometry((4, 4, 4)))


# ---------------------------------------------------------------------- unknown classes


def partial_cohort(folder, unknown):
    template = scan((16, 16, 16))
    labelled = LabelledCase("template", template, block(template), unknown=unknown)
    return Cohort([], [labelled], tiny_plan(3), Store(folder)).labelled_cases(0)[0]


def test_background_of_a_template_with_an_unknown_class_weighs_nothing(tmp_path):
    case = partial_cohort(tmp_path, (2,))
    assert case.weight[np.asarray(case.target) == 0].max() == 0, (
        "where the label shows background the unknown class may be"
    )


def test_foreground_of_a_template_with_an_unknown_class_weighs_fully(tmp_path):
    case = partial_cohort(tmp_path, (2,))
    assert case.weight[np.asarray(case.target) == 1].min() == 1


def test_without_unknown_classes_every_voxel_weighs(tmp_path):
    assert np.asarray(partial_cohort(tmp_path, ()).weight).min() == 1


def test_run_with_an_unknown_class(tmp_path):
    scans = [scan((16, 16, 16), 1)]
    check_results(engine(tmp_path, scan((16, 16, 16)), scans, classes=3, unknown=(2,)), scans)


def test_constant_scan_is_described_without_nan():
    volume = Volume(np.full((9, 9, 9), 3, np.int16), Geometry((9, 9, 9)))
    described = describe(volume, 1.0, torch.device("cpu"), finest=True)
    assert torch.isfinite(described.coarse.channels).all()
