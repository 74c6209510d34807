"""Propagation by prototypes: labels become cells, cells become prototypes, prototypes find their like again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import Recorder, dice, smooth_noise, tiny_config, tiny_plan, turned

from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase, Propagation
from SemiSAMO1Lib.engine.config import GeneralistConfig
from SemiSAMO1Lib.engine.data.grids import pooled
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.generalists import registry as generalists
from SemiSAMO1Lib.engine.generalists.base import FeatureMap
from SemiSAMO1Lib.engine.generalists.mind_features import MindFeatures
from SemiSAMO1Lib.engine.generalists.sam_med3d.checkpoint import NAME, VARIABLE, CheckpointError
from SemiSAMO1Lib.engine.generalists.sam_med3d.generalist import SamMed3DFeatures
from SemiSAMO1Lib.engine.generalists.sam_med3d.preprocessing import prepare
from SemiSAMO1Lib.engine.propagation.fusion import FusedPropagator
from SemiSAMO1Lib.engine.propagation.prototypes import PrototypePropagator, cell_shares
from SemiSAMO1Lib.engine.propagation.registration import RegistrationPropagator
from SemiSAMO1Lib.engine.propagation.registry import Request, make_propagator
from SemiSAMO1Lib.engine.rounds import run
from SemiSAMO1Lib.phantoms import LABELS, PhantomSettings, make_phantom
from SemiSAMO1Lib.volume import Geometry, Volume

CPU = torch.device("cpu")
OBLIQUE = Geometry((6, 8, 10), (2.0, 1.5, 1.0), (12.0, -30.0, 55.0), turned())


def labelled(label, geometry=None, **changes):
    """A labelled case; its scan is the label, so that a generalist may look at it."""
    label = np.asarray(label)
    geometry = geometry or Geometry(label.shape)
    values = {"image": Volume(label.astype(np.float32), geometry), "label": Volume(label.astype(np.uint8), geometry)}
    return LabelledCase("t", **{**values, **changes})


def cells_of(geometry, channels, weight=None):
    channels = np.asarray(channels, np.float16)
    weight = np.ones(geometry.shape) if weight is None else weight
    return FeatureMap(geometry, channels.reshape(len(channels), *geometry.shape), weight.astype(np.float32))


class Given:
    """A generalist that has seen everything: each scan's features are given, found by the scan's array."""

    key = "given"

    def __init__(self, *pairs):
        self.maps = {id(volume.array): found for volume, found in pairs}

    def features(self, volume):
        return self.maps[id(volume.array)]


class CellNumbers:
    """Each cell has a channel of its own: a prototype then shows which cells it was made from."""

    key = "cell numbers"

    def __init__(self, cells_for, weight=None):
        self.cells_for = cells_for
        self.weight = weight

    def features(self, volume):
        geometry = self.cells_for(volume)
        return cells_of(geometry, np.eye(geometry.voxels), self.weight)


def propagator(generalist, classes=2, warned=None, spacing=(1.0, 1.0, 1.0), **settings):
    warn = (lambda text: None) if warned is None else warned.append
    return PrototypePropagator(generalist, classes, spacing, GeneralistConfig(**settings), 0, warn)


def cells_used(case, stride, classes, warned=None, weight=None, **settings):
    """For every class the cells (flat) that its prototype is made from."""
    generalist = CellNumbers(lambda volume: pooled(volume.geometry, stride), weight)
    prepared = propagator(generalist, classes, warned, **settings).prepare([case])
    return [set(np.flatnonzero(one[0] > 0).tolist()) if len(one) else set() for one in prepared.vectors]


# ---------------------------------------------------------------------- labels become shares of cells


def test_shares_of_a_cell_by_hand():
    """Cells of 2³ voxels; the first one has 3 voxels of class 1 and 1 of class 2."""
    label = np.zeros((2, 2, 4), int)
    label[0, :, 0] = 1
    label[1, 0, 1] = 1
    label[1, 1, 1] = 2
    found = cell_shares(labelled(label), pooled(Geometry(label.shape), 2), 3)
    assert found.reshape(3, 2).T.tolist() == [[4 / 8, 3 / 8, 1 / 8], [1, 0, 0]]


def test_last_cells_are_shared_by_the_voxels_that_are_there():
    """5 voxels in cells of 2: the third cell holds one voxel, which fills it."""
    found = cell_shares(labelled(np.array([0, 0, 1, 0, 1]).reshape(1, 1, 5)), pooled(Geometry((1, 1, 5)), 2), 2)
    assert found[1].ravel().tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("direction", [turned(), turned((170.0, 80.0, -40.0)), (0.0, -1.0, 0.0, -1.0, 0, 0, 0, 0, -1)])
def test_shares_do_not_depend_on_where_the_scan_lies(direction):
    label = np.random.default_rng(0).integers(0, 3, (6, 8, 10))
    straight = Geometry(label.shape, (2.0, 1.5, 1.0))
    there = Geometry(label.shape, straight.spacing, (12.3, -45.6, 78.9), direction)
    expected = cell_shares(labelled(label, straight), pooled(straight, 2), 3)
    assert np.allclose(cell_shares(labelled(label, there), pooled(there, 2), 3), expected)


def test_oblique_voxels_count_for_the_cell_they_lie_in():
    """Cells along the patient's axes, voxels oblique: class 1 is one voxel at a known place."""
    cells = Geometry((8, 8, 8), (3.0, 3.0, 3.0), (9.0, -33.0, 52.0))
    for index in [(0, 0, 0), (5, 7, 9), (2, 6, 3), (4, 1, 8)]:
        label = np.zeros(OBLIQUE.shape, int)
        label[index] = 1
        place = OBLIQUE.index_to_space @ [*index[::-1], 1.0]
        expected = np.rint(np.linalg.inv(cells.index_to_space) @ place)[2::-1].astype(int)
        found = np.argwhere(cell_shares(labelled(label, OBLIQUE), cells, 2)[1] > 0)
        assert found.tolist() == [expected.tolist()], f"voxel {index} counts for cells {found}, it lies in {expected}"


def test_shares_of_a_cell_sum_to_one():
    label = np.random.default_rng(0).integers(0, 3, OBLIQUE.shape)
    inner = Geometry((2, 2, 2), (3.0, 3.0, 3.0), tuple(OBLIQUE.centre - 1.5))
    assert np.allclose(cell_shares(labelled(label, OBLIQUE), inner, 3).sum(0), 1)


def test_voxels_larger_than_cells_are_repeated():
    """Each cell of half a voxel takes the voxel that it lies in, also where it holds no voxel's centre."""
    label = np.random.default_rng(0).integers(0, 3, (3, 4, 5))
    coarse = Geometry(label.shape, (2.0, 2.0, 2.0))
    cells = Geometry((6, 8, 10), (1.0, 1.0, 1.0), (-0.5, -0.5, -0.5))
    fine = label.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    assert np.array_equal(cell_shares(labelled(label, coarse), cells, 3), np.stack([fine == v for v in range(3)]))


def test_cells_beyond_the_label_have_no_share():
    cells = Geometry((1, 1, 6), (1.0, 1.0, 1.0), (-2.0, 0.0, 0.0))
    found = cell_shares(labelled(np.ones((1, 1, 2), int)), cells, 2)
    assert found[:, 0, 0].tolist() == [[0] * 6, [0, 0, 1, 1, 0, 0]]


def test_unknown_voxels_count_for_no_class():
    """Class 2 came later: where this label shows background it may be. 2 of 8 voxels are known."""
    label = np.zeros((2, 2, 2), int)
    label[0, 0] = 1
    found = cell_shares(labelled(label, unknown=(2,)), pooled(Geometry(label.shape), 2), 3)
    assert found.ravel().tolist() == [0, 0.25, 0]


# ---------------------------------------------------------------------- shares become cells of a class


def blocks(**classes):
    """8³ voxels, cells of 4³: 'c1' = [(cell, voxels)] fills so many voxels of a cell with class 1."""
    label = np.zeros((2, 2, 2, 64), int)
    for name, where in classes.items():
        for cell, count in where:
            free = np.flatnonzero(label.reshape(8, 64)[cell] == 0)
            label.reshape(8, 64)[cell, free[:count]] = int(name[1:])
    return label.reshape(2, 2, 2, 4, 4, 4).transpose(0, 3, 1, 4, 2, 5).reshape(8, 8, 8)


def test_a_cell_is_the_class_of_its_largest_share():
    found = cells_used(labelled(blocks(c1=[(0, 64), (3, 40)], c2=[(5, 33), (6, 20)])), 4, 3)
    assert found == [{1, 2, 4, 6, 7}, {0, 3}, {5}]


@pytest.fixture
def small_class():
    """Class 1 has 5 voxels of cell 2 and 9 of cell 6: no cell is won."""
    return labelled(blocks(c1=[(2, 5), (6, 9)]))


def test_a_class_that_wins_no_cell_takes_that_of_its_largest_share(small_class):
    assert cells_used(small_class, 4, 2) == [{0, 1, 2, 3, 4, 5, 7}, {6}]


def test_a_class_that_wins_no_cell_is_told(small_class):
    warned = []
    cells_used(small_class, 4, 2, warned)
    assert len(warned) == 1 and "class 1 of t" in warned[0] and "14%" in warned[0], (
        f"expected one warning, got {warned}"
    )


def test_a_class_that_wins_a_cell_is_no_warning():
    warned = []
    cells_used(labelled(blocks(c1=[(0, 64)])), 4, 2, warned)
    assert not warned


def test_a_small_class_does_not_take_the_only_cell_of_another():
    """Class 2 has its largest share in the cell that is all class 1 has; it takes its second best."""
    found = cells_used(labelled(blocks(c1=[(3, 40)], c2=[(3, 20), (4, 6)])), 4, 3)
    assert found[1:] == [{3}, {4}], f"cells of classes 1 and 2: {found[1:]}"


def test_two_small_classes_in_one_cell_are_told():
    warned = []
    cells_used(labelled(blocks(c1=[(3, 10)], c2=[(3, 20)])), 4, 3, warned)
    assert len(warned) == 2 and "class 2 of t has no cell" in warned[1], f"expected two warnings, got {warned}"


def test_cells_that_saw_nothing_make_no_prototype():
    weight = np.ones((2, 2, 2))
    weight[0, 0, 0] = weight[1, 1, 1] = 0
    found = cells_used(labelled(blocks(c1=[(0, 64), (1, 64)])), 4, 2, weight=weight)
    assert found == [{2, 3, 4, 5, 6}, {1}]


def test_a_small_class_takes_a_cell_that_was_seen(small_class):
    weight = np.ones(8)
    weight[6] = 0
    assert cells_used(small_class, 4, 2, weight=weight.reshape(2, 2, 2))[1] == {2}


def test_mostly_unknown_cells_make_no_prototype():
    """Of cell 5 the label says 20 voxels of 64: the other 44 may be class 2."""
    found = cells_used(labelled(blocks(c1=[(0, 64), (3, 40), (5, 20)]), unknown=(2,)), 4, 3)
    assert found == [set(), {0, 3}, set()]


# ---------------------------------------------------------------------- as released: nearest, centre


def released_cells(volume):
    return pooled(prepare(volume, "released", "centre", 64, 16).volume.geometry, 16)


RELEASED = {"label_cells": "nearest", "coverage": "centre"}
SHAPES = [(64, 64, 64), (70, 50, 64), (67, 75, 63), (20, 64, 129)]


def first_voxels(label):
    """Word by word: pad with zeros (floor before, the rest behind), crop the middle, every 16th voxel."""
    missing = [max(64 - n, 0) for n in label.shape]
    label = np.pad(label, [(n // 2, n - n // 2) for n in missing])
    a, b, c = ((n - 64) // 2 for n in label.shape)
    return label[a : a + 64, b : b + 64, c : c + 64][::16, ::16, ::16]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("geometry", [Geometry((1, 1, 1)), OBLIQUE], ids=["straight", "oblique"])
def test_released_cells_are_the_first_voxels_of_their_patches(shape, geometry):
    label = np.random.default_rng(0).integers(0, 3, shape)
    case = labelled(label, replace(geometry, shape=shape))
    prepared = propagator(CellNumbers(released_cells), 3, **RELEASED).prepare([case])
    found = [set(np.flatnonzero(one[0] > 0).tolist()) for one in prepared.vectors]
    expected = first_voxels(label).ravel()
    assert found == [set(np.flatnonzero(expected == value).tolist()) for value in range(3)]


def test_released_cells_of_an_unknown_background_are_not_background():
    label = np.zeros((64, 64, 64), int)
    label[:16] = 1
    case = labelled(label, unknown=(2,))
    prepared = propagator(CellNumbers(released_cells), 3, **RELEASED).prepare([case])
    assert [len(one) for one in prepared.vectors] == [0, 1, 0], "where the label says nothing there is no prototype"


def test_nearest_cells_need_the_centre():
    with pytest.raises(ValueError, match="'nearest' reproduces the released code and needs coverage 'centre'"):
        GeneralistConfig(label_cells="nearest", coverage="full")


def test_nearest_cells_go_with_the_centre():
    assert GeneralistConfig(**RELEASED).label_cells == "nearest"


# ---------------------------------------------------------------------- cells become prototypes


LINE = Geometry((1, 1, 4))


def on_a_line(labels, features, **changes):
    """A case of four voxels in a row that are cells too, and its features (one row a cell)."""
    case = labelled(np.reshape(labels, (1, 1, -1)), Geometry((1, 1, len(labels))), **changes)
    return case, (case.image, cells_of(case.image.geometry, np.transpose(features)))


def unit(vector):
    return np.asarray(vector, float) / np.linalg.norm(vector)


def test_prototype_is_the_normalised_mean_of_its_cells():
    """Cells keep their length in the mean (SemiSAM-O1): (2, 0) and (0, 6) give (1, 3), not (1, 1)."""
    case, known = on_a_line([0, 0, 1, 1], [(4, 0), (4, 0), (2, 0), (0, 6)])
    found = propagator(Given(known)).prepare([case]).vectors
    assert np.allclose(found[1], [unit((1, 3))], atol=1e-4)


def test_background_has_a_prototype_of_its_own():
    case, known = on_a_line([0, 0, 1, 1], [(1, 3), (3, 1), (2, 0), (0, 6)])
    assert np.allclose(propagator(Given(known)).prepare([case]).vectors[0], [unit((1, 1))], atol=1e-4)


def test_several_templates_are_averaged_then_normalised():
    """Each template counts alike, however many cells and however strong: (1, 0) and (0, 1) give (1, 1)."""
    one, here = on_a_line([1, 1, 1, 0], [(8, 0), (8, 0), (8, 0), (-1, 0)])
    other, there = on_a_line([1, 0, 0, 0], [(0, 1), (-1, 0), (-1, 0), (-1, 0)])
    found = propagator(Given(here, there)).prepare([one, other]).vectors
    assert np.allclose(found[1], [unit((1, 1))], atol=1e-4)


def test_templates_count_by_their_weight():
    one, here = on_a_line([1, 0], [(1, 0), (-1, 0)], weight=3.0)
    other, there = on_a_line([1, 0], [(0, 1), (-1, 0)], weight=1.0)
    found = propagator(Given(here, there)).prepare([one, other]).vectors
    assert np.allclose(found[1], [unit((3, 1))], atol=1e-4)


def test_a_class_of_one_template_alone_is_taken_from_there():
    one, here = on_a_line([1, 0], [(1, 0), (-1, 0)])
    other, there = on_a_line([0, 0], [(0, 1), (-1, 0)])
    found = propagator(Given(here, there)).prepare([one, other]).vectors
    assert np.allclose(found[1], [(1, 0)], atol=1e-4)


@pytest.fixture
def two_clusters():
    """Class 1 looks like x in half of its cells and like y in the others; background like z."""
    generator = np.random.default_rng(0)
    centres = np.repeat(np.eye(3), [20, 20, 10], 0)
    return on_a_line([1] * 40 + [0] * 10, 5 * centres + 0.2 * generator.normal(size=(50, 3)))


@pytest.mark.parametrize("axis", [0, 1])
def test_k_means_finds_both_looks_of_a_class(two_clusters, axis):
    case, known = two_clusters
    found = propagator(Given(known), prototypes=2).prepare([case]).vectors[1]
    assert found[:, axis].max() > 0.99, f"no prototype of class 1 near axis {axis}: {np.round(found, 2)}"


def test_there_are_as_many_prototypes_as_asked_for(two_clusters):
    case, known = two_clusters
    assert [len(one) for one in propagator(Given(known), prototypes=3).prepare([case]).vectors] == [3, 3]


def test_prototypes_are_no_more_than_cells():
    case, known = on_a_line([0, 0, 0, 1], [(1, 0), (1, 0.1), (1, 0.2), (0, 1)])
    assert [len(one) for one in propagator(Given(known), prototypes=5).prepare([case]).vectors] == [3, 1]


@pytest.mark.parametrize("count", [1, 2])
def test_prototypes_have_length_one(two_clusters, count):
    case, known = two_clusters
    found = np.concatenate(propagator(Given(known), prototypes=count).prepare([case]).vectors)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_k_means_is_repeatable(two_clusters):
    case, known = two_clusters
    one, other = (propagator(Given(known), prototypes=3).prepare([case]).vectors for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True)), "the same seed gave other clusters"


def test_two_looks_are_found_again_where_their_mean_is_not(two_clusters):
    """A scan of x-like and z-like cells: with a prototype for each look, x is class 1."""
    case, known = two_clusters
    scan = Volume(np.zeros((1, 1, 2), np.float32), Geometry((1, 1, 2)))
    generalist = Given(known, (scan, cells_of(scan.geometry, [(1, 0), (0, 0), (0, 1)])))
    one = propagator(generalist, prototypes=2)
    found = one.propagate(one.prepare([case]), scan, scan.geometry).probabilities
    assert found[1, 0, 0, 0] > 0.99, f"probability of class 1: {found[1, 0, 0]}"


def test_no_foreground_cell_is_an_error():
    case = labelled(np.zeros((4, 4, 4), int))
    with pytest.raises(ValueError, match=r"no foreground class in any cell.*--generalist registration"):
        cells_used(case, 2, 3)


def test_no_foreground_in_the_released_cells_is_an_error():
    label = np.zeros((64, 64, 64), int)
    label[5:9, 5:9, 5:9] = 1
    with pytest.raises(ValueError, match="label_cells 'share'"):
        propagator(CellNumbers(released_cells), **RELEASED).prepare([labelled(label)])


# ---------------------------------------------------------------------- prototypes find their like


CLASSES = 4


@pytest.fixture(scope="module")
def noisy():
    """A template with random features in cells of 4³, another scan with others, and its grid of 1 mm voxels."""
    generator = np.random.default_rng(1)
    geometry = Geometry((12, 8, 16), (1.0, 1.0, 1.0), (5.0, 6.0, 7.0), turned())
    cells = pooled(geometry, 4)
    label = generator.integers(0, CLASSES, cells.shape).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    template = labelled(label, geometry)
    scan = Volume(np.zeros(geometry.shape, np.float32), geometry)
    maps = [cells_of(cells, generator.normal(1.0, 0.3, (6, *cells.shape))) for _ in range(2)]
    return Given((template.image, maps[0]), (scan, maps[1])), template, scan, maps[1]


def carried(noisy, grid=None, **settings):
    generalist, template, scan, _ = noisy
    one = propagator(generalist, CLASSES, **settings)
    prepared = one.prepare([template])
    return prepared, one.propagate(prepared, scan, grid or scan.geometry)


@pytest.mark.parametrize("upsampling", ["trilinear", "nearest"])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_probabilities_sum_to_one(noisy, upsampling, temperature):
    total = carried(noisy, upsampling=upsampling, temperature=temperature)[1].probabilities.float().sum(0)
    assert float((total - 1).abs().max()) < 2e-3, f"sums from {float(total.min())} to {float(total.max())}"


def test_label_is_that_of_the_largest_cosine(noisy):
    prepared, found = carried(noisy, upsampling="nearest")
    features = noisy[3].channels.reshape(6, -1).T.astype(float)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features @ np.concatenate(prepared.vectors).T.astype(float)
    expected = cosines.argmax(1).reshape(noisy[3].geometry.shape).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    assert np.array_equal(found.probabilities.numpy().argmax(0), expected)


def test_probabilities_are_the_softmax_of_the_cosines(noisy):
    prepared, found = carried(noisy, upsampling="nearest", temperature=0.2)
    features = noisy[3].channels[:, 1, 1, 2].astype(float)
    cosines = np.concatenate(prepared.vectors) @ features / np.linalg.norm(features)
    expected = np.exp(cosines / 0.2) / np.exp(cosines / 0.2).sum()
    assert np.allclose(found.probabilities[:, 5, 6, 9], expected, atol=1e-3)


def test_nearly_equal_cosines_are_told_apart():
    """Real features are much alike: cosines 0.9900 and 0.9903. Half precision of the cosines would not show it."""
    angles = np.arccos([0.9900, 0.9903])
    known = on_a_line([0, 1], [(np.cos(angles[0]), np.sin(angles[0])), (np.cos(angles[1]), -np.sin(angles[1]))])
    scan = Volume(np.zeros((1, 1, 1), np.float32), Geometry((1, 1, 1)))
    one = propagator(Given(known[1], (scan, cells_of(scan.geometry, [(1.0,), (0.0,)]))))
    found = one.propagate(one.prepare([known[0]]), scan, scan.geometry).probabilities[:, 0, 0, 0]
    assert found[1] > found[0], f"probabilities {found}; class 1 is the more alike"


def test_trilinear_upsampling_goes_from_one_cell_to_the_next_step_by_step():
    case, known = on_a_line([0, 1], [(1, 0), (0, 1)])
    fine = Geometry((1, 1, 9), (1.0, 1.0, 0.125))
    one = propagator(Given(known), temperature=1.0)
    found = one.propagate(one.prepare([case]), case.image, fine).probabilities[1, 0, 0].numpy()
    assert (np.diff(found) > 0).all() and found[4] == pytest.approx(0.5, abs=1e-3), f"class 1 along the line: {found}"


def test_nearest_upsampling_has_two_values():
    case, known = on_a_line([0, 1], [(1, 0), (0, 1)])
    fine = Geometry((1, 1, 10), (1.0, 1.0, 0.2), (-0.4, 0.0, 0.0))
    one = propagator(Given(known), upsampling="nearest")
    found = one.propagate(one.prepare([case]), case.image, fine).probabilities.argmax(0).ravel()
    assert found.tolist() == [0] * 5 + [1] * 5


def test_a_class_that_the_template_lacks_is_never_predicted(noisy):
    generalist, template, scan, _ = noisy
    lacking = replace(
        template, label=Volume(np.where(template.label.array == 2, 0, template.label.array), scan.geometry)
    )
    one = propagator(generalist, CLASSES)
    found = one.propagate(one.prepare([lacking]), scan, scan.geometry).probabilities
    assert float(found[2].max()) == 0, "class 2 is not in the template"


def test_a_template_all_foreground_has_no_background(noisy):
    generalist, template, scan, _ = noisy
    full = replace(template, label=Volume(np.ones_like(template.label.array), scan.geometry))
    one = propagator(generalist, CLASSES)
    found = one.propagate(one.prepare([full]), scan, scan.geometry).probabilities
    assert float(found[1].min()) == 1, "one class in the template: it is everywhere"


@pytest.fixture(scope="module")
def beyond(noisy):
    """Propagated to a grid of which the first half along x lies outside the features."""
    inside = noisy[2].geometry
    origin = tuple(float(v) for v in (inside.index_to_space @ [-8.0, 0.0, 0.0, 1.0])[:3])
    return carried(noisy, replace(inside, origin=origin))[1]


def test_beyond_the_features_is_background(beyond):
    outside = beyond.probabilities[:, :, :, :8]
    assert (outside[0] == 1).all() and not outside[1:].any(), "expected background with probability 1, all others 0"


def test_beyond_the_features_nothing_is_known(beyond):
    assert not beyond.confidence[:, :, :8].any(), "confidence beyond the features, expected 0 = unknown"


def test_within_the_features_something_is_known(beyond):
    assert (beyond.confidence[:, :, 8:] > 0).any()


def test_cells_that_saw_nothing_are_unknown_background(noisy):
    generalist, template, scan, known = noisy
    weight = known.weight.copy()
    weight[1] = 0
    blind = Given((template.image, generalist.features(template.image)), (scan, replace(known, weight=weight)))
    found = carried((blind, template, scan, known))[1]
    assert not found.confidence[4:8].any() and (found.probabilities[0, 4:8] == 1).all()


def test_confidence_is_a_share(noisy):
    confidence = carried(noisy)[1].confidence
    assert 0 <= float(confidence.min()) <= float(confidence.max()) <= 1


def test_sharper_answers_are_more_confident(noisy):
    sharp, blunt = (carried(noisy, temperature=t)[1].confidence.mean() for t in (0.02, 1.0))
    assert sharp > blunt


def test_confidence_is_at_most_the_reliability(noisy):
    """Answers without a doubt are worth as much as the template's own label that these features find again."""
    found = carried(noisy, temperature=1e-3, upsampling="nearest")[1]
    assert 0.1 < found.reliability < 0.95, f"reliability {found.reliability:.2f}: this shows nothing"
    assert float(found.confidence.max()) == pytest.approx(found.reliability, abs=0.01)


def test_signature_is_the_global_feature(noisy):
    """f_g: the normalised mean over the cells (SemiSAM-O1)."""
    mean = noisy[3].channels.astype(float).mean((1, 2, 3))
    assert np.allclose(carried(noisy)[1].signature, unit(mean), atol=1e-3)


def test_signature_leaves_out_cells_that_saw_nothing():
    found = cells_of(LINE, [(3, 0, 9, 9), (0, 4, 9, 9)], np.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 4))
    assert np.allclose(found.global_feature(), [0.6, 0.8], atol=1e-4)


def test_template_has_a_signature_too(noisy):
    generalist, template, *_ = noisy
    one = propagator(generalist, CLASSES)
    mean = generalist.features(template.image).channels.astype(float).mean((1, 2, 3))
    assert np.allclose(one.template_signature(one.prepare([template])), unit(mean), atol=1e-3)


def test_prototypes_have_no_transforms(noisy):
    assert carried(noisy)[1].transforms == ()


def test_template_is_described_once():
    asked = []

    class Asked(CellNumbers):
        def features(self, volume):
            asked.append(volume)
            return super().features(volume)

    propagator(Asked(lambda volume: pooled(volume.geometry, 4))).prepare([labelled(blocks(c1=[(0, 64)]))])
    assert len(asked) == 1, f"the template was described {len(asked)} times"


# ---------------------------------------------------------------------- how far it can be trusted


class Truth:
    """A perfect generalist: every voxel is a cell, its feature is its class (the scans here are their labels)."""

    key = "truth"

    def features(self, volume):
        return cells_of(volume.geometry, [volume.array == value for value in range(1 + len(LABELS))])


class Blind:
    """A useless one: all cells look alike."""

    key = "blind"

    def features(self, volume):
        return cells_of(volume.geometry, np.ones((3, *volume.geometry.shape)))


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(n, 1, PhantomSettings(spacing_mm=(3.0, 3.0, 3.0))) for n in range(2)]


def from_phantom_to_phantom(phantoms, generalist):
    template, case = (labelled(p.label.array, p.label.geometry) for p in phantoms)
    one = propagator(generalist, 1 + len(LABELS), spacing=template.image.geometry.spacing)
    return one.propagate(one.prepare([template]), case.image, case.image.geometry)


@pytest.mark.parametrize("value", LABELS)
def test_perfect_features_give_the_truth(phantoms, value):
    found = from_phantom_to_phantom(phantoms, Truth()).probabilities.argmax(0).numpy()
    overlap = dice(found, phantoms[1].label.array, value)
    assert overlap > 0.9, f"Dice of class {value} is {overlap:.3f} with features that are the truth"


def test_perfect_features_are_reliable(phantoms):
    assert from_phantom_to_phantom(phantoms, Truth()).reliability > 0.9


def test_useless_features_are_not_reliable(phantoms):
    assert from_phantom_to_phantom(phantoms, Blind()).reliability < 0.1


def test_what_useless_features_say_is_not_confident(phantoms):
    assert float(from_phantom_to_phantom(phantoms, Blind()).confidence.max()) < 0.1


# ---------------------------------------------------------------------- fused


class Says:
    """A propagator that says the same of every scan."""

    def __init__(self, value, confidence, reliability=1.0, name="one", classes=3):
        self.found = Propagation(
            LINE,
            torch.nn.functional.one_hot(torch.full(LINE.shape, value), classes).movedim(-1, 0).half(),
            torch.as_tensor(confidence, dtype=torch.float32).expand(LINE.shape).clone(),
            [name],
            {name: 1},
            np.full(2, float(len(name)), np.float16),
            reliability,
        )

    def prepare(self, cases):
        return [case.id for case in cases]

    def template_signature(self, prepared):
        return self.found.signature

    def propagate(self, prepared, volume, grid, through=()):
        assert prepared == ["t"], "a part got what another one prepared"
        return self.found


def fuse(*parts):
    one = FusedPropagator(parts)
    case = labelled(np.ones(LINE.shape, int))
    return one.propagate(one.prepare([case]), case.image, LINE)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_the_confident_part_wins(order):
    parts = {1: Says(1, 0.9), 2: Says(2, 0.2)}
    found = fuse(*(parts[value] for value in order)).probabilities
    assert (found.argmax(0) == 1).all() and float(found[1].min()) > 0.75


def test_each_voxel_goes_by_its_own_confidence():
    found = fuse(Says(1, [1.0, 1.0, 0.0, 0.0]), Says(2, [0.0, 0.5, 0.5, 1.0])).probabilities.argmax(0)
    assert found.ravel().tolist() == [1, 1, 2, 2]


def test_an_unreliable_part_changes_nothing():
    found = fuse(Says(1, 0.1), Says(2, 1.0, reliability=0.0)).probabilities
    assert torch.equal(found, Says(1, 0.1).found.probabilities)


def test_where_nobody_is_confident_all_count_alike():
    assert torch.allclose(
        fuse(Says(1, 0.0), Says(2, 0.0)).probabilities[:, 0, 0, 0], torch.tensor([0, 0.5, 0.5]).half()
    )


def test_fused_probabilities_sum_to_one():
    total = fuse(Says(1, [0.3, 0.5, 0.0, 1.0]), Says(2, 0.7, 0.4), Says(0, 0.2, 0.9)).probabilities.float().sum(0)
    assert float((total - 1).abs().max()) < 2e-3


def test_fused_confidence_is_the_largest():
    assert torch.allclose(
        fuse(Says(1, [0.1, 0.9, 0, 0]), Says(2, 0.5)).confidence.ravel(), torch.tensor([0.5, 0.9, 0.5, 0.5])
    )


def test_transforms_are_those_of_the_first_part():
    assert fuse(Says(1, 0.1, name="first"), Says(2, 0.9, name="second")).transforms == ["first"]


def test_signature_is_that_of_the_first_part():
    found = fuse(Says(1, 0.1, name="first"), Says(2, 0.9, name="second")).signature
    assert found[0] == len("first")


def test_template_signature_is_that_of_the_first_part():
    one = FusedPropagator([Says(1, 0.1, name="first"), Says(2, 0.9, name="second")])
    assert one.template_signature(one.prepare([]))[0] == len("first")


def test_facts_of_all_parts_are_kept():
    assert set(fuse(Says(1, 0.1, name="first"), Says(2, 0.9, name="second")).facts) == {"first", "second"}


# ---------------------------------------------------------------------- by name


def request(generalist, observer=None, **settings):
    config = tiny_config(generalist=generalist, generalists={"architecture": "small", **settings})
    return Request(tiny_plan(), config, CPU, observer or Recorder())


@pytest.fixture
def no_checkpoint(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("there", ["registration", "sam-med3d", "mind", "fused"])
def test_unknown_name_lists_those_there_are(there):
    with pytest.raises(ValueError, match=f"unknown generalist 'magic'.*{there}"):
        make_propagator(request("magic"))


def test_registration_is_made_by_its_name():
    assert isinstance(make_propagator(request("registration")), RegistrationPropagator)


@pytest.mark.parametrize(("name", "kind"), [("mind", MindFeatures), ("sam-med3d", SamMed3DFeatures)])
def test_generalists_are_made_by_their_name(name, kind):
    made = make_propagator(request(name, checkpoint="random"))
    assert isinstance(made, PrototypePropagator) and isinstance(made.generalist.generalist, kind)


def test_sam_med3d_without_a_checkpoint_is_an_error(no_checkpoint):
    with pytest.raises(CheckpointError, match=NAME):
        make_propagator(request("sam-med3d"))


def test_fused_begins_with_registration(no_checkpoint):
    assert isinstance(make_propagator(request("fused")).parts[0], RegistrationPropagator)


def test_fused_takes_mind_without_a_checkpoint(no_checkpoint):
    assert isinstance(make_propagator(request("fused")).parts[1].generalist.generalist, MindFeatures)


def test_fused_says_what_it_takes(no_checkpoint):
    observer = Recorder()
    make_propagator(request("fused", observer))
    notes = [fields["text"] for kind, fields in observer.events if kind == "note"]
    assert any("mind" in note for note in notes), f"expected a note that names mind, got {notes}"


def test_fused_takes_sam_med3d_with_a_checkpoint(no_checkpoint):
    made = make_propagator(request("fused", checkpoint="random"))
    assert isinstance(made.parts[1].generalist.generalist, SamMed3DFeatures)


def test_fused_does_not_replace_a_checkpoint_that_was_named(no_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="absent"):
        make_propagator(request("fused", checkpoint=str(tmp_path / "absent.pth")))


def test_warnings_of_prototypes_reach_the_observer():
    observer = Recorder()
    make_propagator(request("mind", observer)).warn("a small class")
    assert ("warning", {"text": "a small class"}) in observer.events


# ---------------------------------------------------------------------- whole runs


class Grey:
    """A second generalist: two channels from smoothed grey values."""

    key = "grey"

    def __init__(self):
        self.asked = []

    def features(self, volume):
        self.asked.append(volume.geometry)
        scaled = (volume.array - volume.array.mean()) / volume.array.std()
        return cells_of(volume.geometry, [scaled, np.ones_like(scaled)])


def small_run(phantoms, store, **config):
    template = LabelledCase("template", phantoms[0].image, phantoms[0].label)
    cases = [EngineCase(p.name, p.image.geometry, lambda p=p: p.image) for p in phantoms]
    settings = tiny_config(**{"rounds": 0, "registration": {"use_affine": False}, **config})
    return list(run(cases, [template], 1 + len(LABELS), settings, Store(store), Recorder()))


def test_another_generalist_needs_one_line_in_the_registry(phantoms, tmp_path, monkeypatch):
    grey = Grey()
    monkeypatch.setitem(generalists.FEATURES, "grey", lambda plan, settings, device, observer: grey)
    small_run(phantoms, tmp_path, generalist="grey")
    assert [phantoms[0].image.geometry, *(p.image.geometry for p in phantoms)] == grey.asked, (
        "the new generalist describes the template and every case, once"
    )


def test_another_generalist_carries_the_label(phantoms, tmp_path, monkeypatch):
    """The vessel is by far the brightest: grey values alone find it."""
    monkeypatch.setitem(generalists.FEATURES, "grey", lambda plan, settings, device, observer: Grey())
    found = small_run(phantoms, tmp_path, generalist="grey")
    overlap = dice(found[1].prediction.array, phantoms[1].label.array, 3)
    assert overlap > 0.4, f"Dice of the vessel by grey values is {overlap:.3f}"


@pytest.mark.parametrize("generalist", ["mind", "fused"])
def test_runs_without_a_checkpoint(no_checkpoint, phantoms, tmp_path, generalist):
    assert len(small_run(phantoms, tmp_path, generalist=generalist)) == 2


def test_unknown_generalist_ends_a_run(phantoms, tmp_path):
    with pytest.raises(ValueError, match="unknown generalist 'magic'"):
        small_run(phantoms, tmp_path, generalist="magic")


def test_a_run_by_prototypes_is_trained_and_refined(no_checkpoint, phantoms, tmp_path):
    """Without transforms: what comes after the propagation must not need them."""
    found = small_run(phantoms, tmp_path, generalist="mind", rounds=2, iterations=2)
    assert [one.round for one in found] == [0, 0, 1, 1, 2, 2]


def test_mind_features_do_not_depend_on_the_grey_scale(phantoms):
    one = MindFeatures(3.0, CPU)
    image = phantoms[0].image
    changed = Volume(image.array * 0.3 + 500, image.geometry)
    apart = np.abs(one.features(image).channels.astype(float) - one.features(changed).channels).max()
    assert apart < 0.02, f"features of up to 1 changed by {apart} with another grey scale"


def test_mind_features_lie_in_cells_of_two_voxels():
    image = Volume(smooth_noise((10, 12, 14), 0), Geometry((10, 12, 14), (2.0, 2.0, 2.0)))
    assert MindFeatures(2.0, CPU).features(image).geometry.spacing == (4.0, 4.0, 4.0)
