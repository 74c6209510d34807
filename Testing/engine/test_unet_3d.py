"""The published specialists: the same parameters, the same output, and what they ask of a patch."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from engine_helpers import tiny_plan
from golden_recipe import FOLDER, noise, rms
from torch import Tensor, nn

from SemiSAMO1Lib.engine.specialists.unet_3d import unet_3d, unet_3d_sdf

#: Published name: what builds it, and its classes.
NETWORKS = {"unet_3D": (unet_3d, 2), "unet_3D_sdf": (unet_3d_sdf, 2), "unet_3D_3class": (unet_3d, 3)}
BUILDERS = pytest.mark.parametrize("build", [unet_3d, unet_3d_sdf])
OUTPUTS = [("unet_3D", 0), ("unet_3D_sdf", 0), ("unet_3D_sdf", 1), ("unet_3D_3class", 0)]
PATCH = (32, 32, 32)


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    shapes = json.loads((FOLDER / "unet3d_state_dicts.json").read_text())[name]
    return {parameter: tuple(shape) for parameter, shape in shapes.items()}


def make(name: str) -> nn.Module:
    build, classes = NETWORKS[name]
    return build(tiny_plan(classes=classes, patch=PATCH))


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """What the published networks were given; one-dimensional weights are biases."""
    scale = 0.05 if len(shape) == 1 else math.sqrt(2 / math.prod(shape[1:]))
    return torch.from_numpy((scale * noise(name, shape)).astype(np.float32))


def image() -> Tensor:
    return torch.from_numpy(noise("unet3d_input", (1, 1, *PATCH)).astype(np.float32))


@pytest.fixture(scope="module")
def outputs() -> dict[str, tuple[Tensor, ...]]:
    """Of every network in float64, with the weights of the recipe."""
    found = {}
    for name in NETWORKS:
        network = make(name)
        network.load_state_dict({key: weight(key, shape) for key, shape in published_shapes(name).items()})
        with torch.inference_mode():
            given = network.eval().double()(image().double())
        found[name] = given if isinstance(given, tuple) else (given,)
    return found


@pytest.mark.parametrize(("name", "index"), OUTPUTS)
def test_output_is_that_of_the_published_network(outputs, name, index):
    with np.load(FOLDER / "unet3d_golden.npz") as stored:
        expected = stored[f"{name}/out{index}"]
    apart = outputs[name][index][0, :, ::2, ::2, ::2].numpy() - expected
    relative = float(np.abs(apart).max()) / rms(expected)
    assert relative < 1e-5, f"{relative:.1e} of the root mean square from the published network, expected < 1e-5"


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_have_the_published_names_in_the_published_order(name):
    assert list(make(name).state_dict()) == list(published_shapes(name)), "published weights would not load"


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_have_the_published_shapes(name):
    shapes = {key: tuple(one.shape) for key, one in make(name).state_dict().items()}
    assert shapes == published_shapes(name), "published weights would not load"


@pytest.mark.parametrize("name", NETWORKS)
def test_written_weights_load_strictly(name, tmp_path):
    written, read = make(name), make(name)
    torch.save(written.state_dict(), tmp_path / "weights.pt")
    read.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    differing = [key for key, one in written.state_dict().items() if not torch.equal(one, read.state_dict()[key])]
    assert not differing, f"read back differently: {differing}"


def two_passes(network: nn.Module) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        first, second = network(image()), network(image())
    return (first[1], second[1]) if isinstance(first, tuple) else (first, second)


@BUILDERS
def test_dropout_is_active_in_training(build):
    first, second = two_passes(build(tiny_plan(patch=PATCH)).train())
    assert not torch.equal(first, second), "two passes in training mode were to differ, dropout is 0.3"


@BUILDERS
def test_dropout_is_inactive_in_evaluation(build):
    first, second = two_passes(build(tiny_plan(patch=PATCH)).eval())
    assert torch.equal(first, second), "two passes in evaluation mode were to be equal"


def test_distances_lie_between_minus_one_and_one(outputs):
    largest = float(outputs["unet_3D_sdf"][0].abs().max())
    assert largest < 1, f"a distance map in (-1, 1) was expected as the first output, got {largest:.3f}"


@BUILDERS
def test_a_patch_that_cannot_be_halved_four_times_is_refused(build):
    with pytest.raises(ValueError, match=r"multiples of 16.*\(32, 40, 32\)"):
        build(tiny_plan(patch=(32, 40, 32)))


@BUILDERS
def test_a_patch_that_ends_in_one_voxel_is_refused(build):
    """Instance norm cannot normalise the one voxel that is left of 16 × 16 × 16."""
    with pytest.raises(ValueError, match=r"at least 32.*\(16, 16, 16\)"):
        build(tiny_plan(patch=(16, 16, 16)))


@BUILDERS
def test_a_patch_with_one_long_side_is_accepted(build):
    network = build(tiny_plan(patch=(16, 16, 32)))
    with torch.inference_mode():
        given = network(torch.zeros(1, 1, 16, 16, 32))
    logits = given[1] if isinstance(given, tuple) else given
    assert logits.shape == (1, 3, 16, 16, 32), f"three classes on the patch were expected, got {tuple(logits.shape)}"


@BUILDERS
def test_there_is_no_batch_norm(build):
    modules = build(tiny_plan(patch=PATCH)).named_modules()
    found = [name for name, module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert not found, f"batch norm in {found}; a batch holds patches of two distributions"
