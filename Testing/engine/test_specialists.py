"""The networks: shapes, no batch norm, clear errors."""

import numpy as np
import pytest
import torch
from engine_helpers import tiny_plan
from torch import nn

from SemiSAMO1Lib.engine.planning import BUILT_IN_STRIDES, network_shape
from SemiSAMO1Lib.engine.specialists import SPECIALISTS, WITH_DISTANCE, make_specialist

PATCH = (16, 16, 32)


@pytest.mark.parametrize("name", sorted(SPECIALISTS))
def test_no_batch_norm(name):
    network = make_specialist(name, tiny_plan(patch=PATCH))
    found = [n for n, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not found, f"{name} has batch norm in {found}; a batch holds patches of two distributions"


@pytest.mark.parametrize("name", sorted(SPECIALISTS))
def test_a_patch_does_not_depend_on_its_neighbour_in_the_batch(name):
    torch.manual_seed(0)
    network = make_specialist(name, tiny_plan(patch=PATCH)).eval()
    one, other = torch.randn(1, 1, *PATCH), 10 * torch.randn(1, 1, *PATCH)
    with torch.no_grad():
        apart = (network(torch.cat([one, other]))[:1] - network(one)).abs().max()
    assert float(apart) < 1e-3, f"{name}: the other patch of the batch changed the answer by {float(apart):.4f}"


@pytest.mark.parametrize("name", sorted(SPECIALISTS))
def test_output_has_the_classes_and_the_patch(name):
    with torch.no_grad():
        found = make_specialist(name, tiny_plan(classes=5, patch=PATCH))(torch.zeros(2, 1, *PATCH))
    assert found.shape == (2, 5, *PATCH)


@pytest.mark.parametrize("name", sorted(SPECIALISTS))
def test_every_parameter_learns(name):
    network = make_specialist(name, tiny_plan(patch=PATCH), with_distance=name in WITH_DISTANCE)
    outputs = network(torch.randn(2, 1, *PATCH))
    torch.cat(outputs if isinstance(outputs, tuple) else [outputs]).square().mean().backward()
    without = [n for n, p in network.named_parameters() if p.grad is None]
    assert not without, f"no gradient reaches {without}"


@pytest.mark.parametrize("name", sorted(SPECIALISTS))
def test_networks_have_no_running_statistics(name):
    network = make_specialist(name, tiny_plan(patch=PATCH))
    assert not [n for n, _ in network.named_buffers() if "running" in n]


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((24, 24, 24), (1.0, 1.0, 1.0)),
        ((12, 40, 40), (10.0, 1.0, 1.0)),
        ((8, 8, 8), (1.0, 1.0, 1.0)),
        ((1, 32, 32), (5.0, 1.0, 1.0)),
    ],
)
def test_dynunet_runs_on_the_planned_patch(shape, spacing):
    patch, strides, kernels = network_shape(shape, spacing, 90_000)
    plan = tiny_plan(patch=patch, strides=strides, kernels=kernels, filters=tuple(4 for _ in strides))
    with torch.no_grad():
        found = make_specialist("dynunet", plan)(torch.zeros(1, 1, *patch))
    assert found.shape[2:] == patch, f"patch {patch} came back as {tuple(found.shape[2:])}"


def test_dynunet_obeys_the_plans_filters():
    network = make_specialist("dynunet", tiny_plan())
    widths = {m.out_channels for m in network.modules() if isinstance(m, nn.Conv3d)}
    assert widths == {4, 8, 3}, f"convolutions of {sorted(widths)} channels; the plan has 4, 8, 8 and 3 classes"


def test_vnet_refuses_a_patch_that_it_cannot_halve_four_times():
    """Multiples of 16 are needed; the reason must be said before the training, not by a shape in a traceback."""
    with pytest.raises(ValueError, match="16"):
        make_specialist("vnet", tiny_plan(patch=(20, 24, 20)))


def test_vnet_refuses_a_patch_that_ends_in_one_voxel():
    """Instance norm cannot normalise the one voxel that is left of 16 × 16 × 16."""
    with pytest.raises(ValueError, match="32"):
        make_specialist("vnet", tiny_plan(patch=(16, 16, 16)))


def test_unknown_specialist_names_those_there_are():
    with pytest.raises(ValueError, match=r"'unett'.*dynunet, unet_3d, unet_3d_sdf, vnet"):
        make_specialist("unett", tiny_plan())


def test_plans_of_different_depth_build():
    depths = [len(network_shape((n, n, n), (1.0, 1.0, 1.0), 10**6)[1]) for n in (8, 24, 48, 96)]
    assert depths == sorted(depths) and np.ptp(depths) > 0, f"larger scans get deeper networks, got {depths}"


@pytest.mark.parametrize("shape", [(36, 51, 35), (12, 20, 20), (44, 71, 96)])
def test_a_planned_vnet_can_be_built(shape):
    patch, strides, _ = network_shape(shape, (1.0, 1.0, 1.0), 90_000, BUILT_IN_STRIDES["vnet"])
    network = make_specialist("vnet", tiny_plan(patch=patch, strides=strides))
    with torch.no_grad():
        logits = network(torch.zeros(1, 1, *patch))
    assert logits.shape[2:] == patch, f"logits on the patch {patch} were expected, got {tuple(logits.shape)}"
