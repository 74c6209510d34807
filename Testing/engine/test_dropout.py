"""Dropout by sample: the share that is dropped, and masks that depend on a sample's generator alone."""

import numpy as np
import pytest
import torch
from torch import nn

from SemiSAMO1Lib.engine.specialists.dropout import SampleDropout, dropped_by, with_sample_dropout

SHAPE = (8, 16, 16, 16)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def dropped(p, *seeds, channels=False, kind=torch.float32):
    """What becomes of ones."""
    layer = SampleDropout(p, channels).train()
    with dropped_by(generators(*seeds)):
        return layer(torch.ones(len(seeds), *SHAPE, dtype=kind))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_the_share_is_the_asked_one(p):
    share = float((dropped(p, *range(4)) == 0).float().mean())
    count = 4 * np.prod(SHAPE)
    assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / count), f"{share:.4f} of the elements were dropped"


def test_the_mean_stays():
    assert float(dropped(0.3, *range(8)).mean()) == pytest.approx(1, abs=0.01), "what is kept must be scaled up"


def test_elements_are_dropped_independently_of_their_neighbours():
    """Four elements share one 64-bit draw: that must not be seen."""
    mask = (dropped(0.5, *range(8)).flatten(1) > 0).float()
    for step in range(1, 9):
        agree = float((mask[:, step:] == mask[:, :-step]).float().mean())
        assert abs(agree - 0.5) < 0.01, f"elements {step} apart agree in {agree:.3f} of the cases, not in half"


def test_a_sample_is_dropped_alike_in_any_batch():
    alone, second = dropped(0.3, 7)[0], dropped(0.3, 3, 7)[1]
    assert torch.equal(alone, second)


def test_two_samples_are_dropped_differently():
    first, second = dropped(0.3, 3, 7)
    assert not torch.equal(first, second)


def test_two_layers_draw_different_masks():
    layer, found = SampleDropout(0.3, False).train(), []
    with dropped_by(generators(1)):
        found = [layer(torch.ones(1, *SHAPE)) for _ in range(2)]
    assert not torch.equal(*found)


def test_the_mask_is_the_same_in_every_precision():
    full, half = (dropped(0.5, 1, kind=kind) > 0 for kind in (torch.float32, torch.bfloat16))
    assert torch.equal(full, half)


def test_whole_channels():
    found = dropped(0.5, *range(16), channels=True)
    assert torch.equal(found.amin((2, 3, 4)), found.amax((2, 3, 4))), "a channel was dropped in part"
    assert 0.3 < float((found == 0).float().mean()) < 0.7


def test_numbers_of_elements_that_four_does_not_divide():
    layer = SampleDropout(0.5, False).train()
    with dropped_by(generators(1)):
        assert layer(torch.ones(1, 3, 5, 5, 5)).shape == (1, 3, 5, 5, 5)


def test_nothing_is_dropped_in_evaluation():
    assert torch.equal(SampleDropout(0.5, False).eval()(torch.ones(2, 3)), torch.ones(2, 3))


def test_every_layer_of_a_network_is_replaced():
    network = with_sample_dropout(nn.Sequential(nn.Dropout(0.2), nn.Sequential(nn.Dropout3d(0.4))))
    found = [(one.p, one.channels) for one in network.modules() if isinstance(one, SampleDropout)]
    assert found == [(0.2, False), (0.4, True)]
