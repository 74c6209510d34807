"""MIND-SSC: what the descriptors promise."""

import itertools

import pytest
import torch
from engine_helpers import smooth_noise

from SemiSAMO1Lib.engine.generalists.mind import CHANNELS, PAIRS, box_mean, box_mean_3, mind_ssc


@pytest.fixture(scope="module")
def scan():
    return torch.from_numpy(smooth_noise((18, 20, 22), 0))


def test_twelve_channels(scan):
    assert mind_ssc(scan).shape == (CHANNELS, 18, 20, 22) == (12, 18, 20, 22)


def test_values_are_above_zero(scan):
    assert float(mind_ssc(scan).min()) > 0, "descriptors lie in (0, 1]"


def test_values_are_at_most_one(scan):
    assert float(mind_ssc(scan).max()) <= 1, "descriptors lie in (0, 1]"


def test_the_most_alike_pair_is_one(scan):
    assert torch.allclose(mind_ssc(scan).amax(0), torch.ones(scan.shape)), "every voxel has a pair with descriptor 1"


def test_pairs_are_the_twelve_at_distance_square_root_two():
    faces = [p for p in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, p)) == 1]
    expected = {
        frozenset((a, b))
        for a, b in itertools.combinations(faces, 2)
        if sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) == 2
    }
    assert len(expected) == 12 and {frozenset(pair) for pair in PAIRS} == expected


def test_no_pair_comes_twice():
    assert len(PAIRS) == len({frozenset(pair) for pair in PAIRS}) == 12


@pytest.mark.parametrize(("gain", "shift"), [(1000.0, 0.0), (0.01, 5.0), (-3.0, 100.0)])
def test_linear_changes_of_intensity_do_not_matter(scan, gain, shift):
    apart = float((mind_ssc(scan.double() * gain + shift) - mind_ssc(scan.double())).abs().max())
    assert apart < 1e-6, f"intensities times {gain} plus {shift} changed descriptors by {apart}"


def test_far_voxels_do_not_matter(scan):
    """Radius 1 and dilation 2 reach 3 voxels; the noise level is taken from a mask that did not change."""
    mask = torch.zeros(scan.shape, dtype=torch.bool)
    mask[:10] = True
    changed = scan.clone()
    changed[14:] = 100 * torch.randn(changed[14:].shape)
    apart = float((mind_ssc(scan, mask=mask)[:, :10] - mind_ssc(changed, mask=mask)[:, :10]).abs().max())
    assert apart == 0, f"voxels four and more slices away changed a descriptor by {apart}"


def test_near_voxels_do_matter(scan):
    changed = scan.clone()
    changed[9, 10, 13] += 5
    assert not torch.equal(mind_ssc(scan)[:, 9, 10, 11], mind_ssc(changed)[:, 9, 10, 11])


def test_shifted_scan_has_shifted_descriptors(scan):
    mask = torch.ones(scan.shape, dtype=torch.bool)
    one = mind_ssc(scan, mask=mask)
    other = mind_ssc(torch.roll(scan, 3, 0), mask=mask)
    assert torch.allclose(one[:, 5:10, 5:-5, 5:-5], other[:, 8:13, 5:-5, 5:-5], atol=1e-3)


def test_constant_scan_has_no_nan():
    assert torch.equal(mind_ssc(torch.full((8, 8, 8), 3.0)), torch.ones(12, 8, 8, 8)), "all patches are alike: 1"


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 2, 2), (1, 1, 1), (8, 1, 5)])
def test_tiny_scans(shape):
    assert torch.isfinite(mind_ssc(torch.randn(shape))).all()


@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 6, 7), (2, 3, 1)])
def test_fast_mean_is_the_mean(shape):
    channels = torch.randn(2, *shape, dtype=torch.float64)
    padded = torch.nn.functional.pad(channels[None], [1] * 6, mode="replicate")
    expected = torch.nn.functional.avg_pool3d(padded, 3, stride=1)[0]
    assert torch.allclose(box_mean_3(channels), expected, atol=1e-12)


def test_mean_of_a_larger_box():
    channels = torch.zeros(1, 7, 7, 7)
    channels[0, 3, 3, 3] = 125
    assert float(box_mean(channels, 2)[0, 1, 5, 3]) == pytest.approx(1.0)


def test_mean_leaves_its_input_alone(scan):
    before = scan.clone()
    mind_ssc(scan)
    assert torch.equal(before, scan), "describing a scan changed it"
