"""Prompts on patches: where a patch lies in the model's cube, what is asked there, and what comes back."""

import numpy as np
import pytest
import torch
from engine_helpers import Recorder, smooth_noise

from SemiSAMO1Lib.engine.config import GeneralistConfig
from SemiSAMO1Lib.engine.generalists import registry
from SemiSAMO1Lib.engine.generalists.base import Promptable, Prompts
from SemiSAMO1Lib.engine.generalists.registry import promptable_named
from SemiSAMO1Lib.engine.generalists.sam_med3d.generalist import SamMed3DPrompts, _Frame, load_model

CPU = torch.device("cpu")
SIZE = 64
SMALLER = [(64, 64, 64), (40, 52, 33), (1, 64, 7), (63, 1, 1)]
LARGER = [(128, 128, 128), (96, 80, 70), (200, 65, 30), (20, 30, 100), (100, 1, 1)]


def patch_of(shape, seed=0):
    return torch.from_numpy(smooth_noise(shape, seed))[None, None]


def ids(shape):
    return "x".join(map(str, shape))


# ---------------------------------------------------------------------- a patch in the cube


@pytest.mark.parametrize("shape", SMALLER + LARGER, ids=ids)
def test_cube_has_the_models_size(shape):
    assert _Frame(shape, SIZE).to_cube(patch_of(shape)).shape == (1, 1, SIZE, SIZE, SIZE)


@pytest.mark.parametrize("shape", SMALLER + LARGER, ids=ids)
def test_there_and_back_has_the_patchs_shape(shape):
    frame = _Frame(shape, SIZE)
    assert frame.from_cube(frame.to_cube(patch_of(shape))).shape == (1, 1, *shape)


@pytest.mark.parametrize("shape", SMALLER, ids=ids)
def test_smaller_patch_comes_back_exactly(shape):
    frame, patch = _Frame(shape, SIZE), patch_of(shape)
    assert torch.equal(frame.from_cube(frame.to_cube(patch)), patch)


@pytest.mark.parametrize("shape", [(128, 128, 128), (96, 80, 70), (100, 30, 60)], ids=ids)
def test_larger_patch_comes_back_nearly(shape):
    """Shrunk and enlarged: smooth values survive, in their place."""
    frame = _Frame(shape, SIZE)
    patch = torch.from_numpy(smooth_noise(shape, 0, 6.0))[None, None]
    apart = float((frame.from_cube(frame.to_cube(patch)) - patch).abs().mean())
    assert apart < 0.1, f"values of deviation 1 come back {apart:.3f} off on average"


@pytest.mark.parametrize("shape", [(128, 64, 32), (100, 50, 25), (96, 96, 24)], ids=ids)
def test_sides_keep_their_proportion(shape):
    inner = _Frame(shape, SIZE).inner
    expected = [n * SIZE / max(shape) for n in shape]
    assert np.allclose(inner, expected, atol=0.5), f"a patch of {shape} became {inner}, expected about {expected}"


@pytest.mark.parametrize("shape", SMALLER, ids=ids)
def test_smaller_patch_is_not_enlarged(shape):
    assert tuple(_Frame(shape, SIZE).inner) == shape


@pytest.mark.parametrize("shape", [(40, 52, 33), (200, 65, 30)], ids=ids)
@pytest.mark.parametrize("fill", [0.0, -10.0])
def test_round_the_patch_is_what_was_asked_for(shape, fill):
    frame = _Frame(shape, SIZE)
    cube = frame.to_cube(torch.ones(1, 1, *shape), fill)
    count = int((cube == fill).sum())
    assert count == SIZE**3 - np.prod(frame.inner), f"{count} voxels hold {fill}"


@pytest.mark.parametrize("shape", SMALLER + LARGER, ids=ids)
def test_patch_lies_in_the_middle(shape):
    cube = _Frame(shape, SIZE).to_cube(torch.ones(1, 1, *shape))[0, 0]
    for axis in range(3):
        there = torch.nonzero(cube.amax([n for n in range(3) if n != axis]))
        before, after = int(there.min()), SIZE - 1 - int(there.max())
        assert 0 <= after - before <= 1, f"axis {axis}: {before} voxels before the patch, {after} behind"


@pytest.mark.parametrize("shape", SMALLER, ids=ids)
def test_points_go_where_the_voxels_go(shape):
    """Smaller patches: the very voxel."""
    frame = _Frame(shape, SIZE)
    for number in range(10):
        point = torch.tensor([(7 * number + 3 * axis) % n for axis, n in enumerate(shape)])
        patch = torch.zeros(1, 1, *shape)
        patch[0, 0, point[0], point[1], point[2]] = 1
        marked = torch.nonzero(frame.to_cube(patch)[0, 0])[0]
        assert torch.equal(frame.points(point[None])[0], marked.float()), f"voxel {point} lies at {marked}"


@pytest.mark.parametrize("shape", [(128, 128, 128), (96, 80, 70), (200, 65, 60), (50, 60, 100)], ids=ids)
def test_points_go_where_a_shrunk_blob_goes(shape):
    frame = _Frame(shape, SIZE)
    for share in [(0.3, 0.4, 0.5), (0.6, 0.7, 0.35), (0.5, 0.25, 0.7)]:
        point = torch.tensor([int(s * n) for s, n in zip(share, shape, strict=True)])
        index = torch.from_numpy(np.indices(shape)).float()
        distance = (index - point.reshape(3, 1, 1, 1)).square().sum(0)
        cube = frame.to_cube(torch.exp(-distance / (2 * 4.0**2))[None, None])[0, 0]
        middle = (torch.from_numpy(np.indices(cube.shape)).float() * cube).sum((1, 2, 3)) / cube.sum()
        apart = float((frame.points(point[None])[0] - middle).abs().max())
        assert apart < 0.1, f"the middle of a blob at {point.tolist()} is {apart:.2f} voxels off the mapped point"


@pytest.mark.parametrize("shape", SMALLER + LARGER, ids=ids)
def test_corners_stay_in_the_patch(shape):
    """Half a voxel beyond the first and last voxel is the patch's edge, in the cube as well."""
    frame = _Frame(shape, SIZE)
    ends = torch.tensor([[0, 0, 0], [n - 1 for n in shape]])
    found = frame.points(ends)
    low, high = torch.tensor(frame.before) - 0.5, torch.tensor(frame.before) + torch.tensor(frame.inner) - 0.5
    assert bool(((found > low) & (found < high)).all()), f"corners lie at {found.tolist()}"


def test_no_points_stay_no_points():
    assert _Frame((40, 52, 33), SIZE).points(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3)


# ---------------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def model():
    return load_model("random", "small").model


@pytest.fixture(scope="module")
def prompts(model):
    return SamMed3DPrompts(model)


@pytest.fixture
def seen(model, monkeypatch):
    """Everything that the model is given from now on: the cube, points, labels, low-resolution mask."""
    given = {"cube": [], "points": [], "labels": [], "mask": []}
    real = model.masks

    def masks(features, points, labels, mask=None, several=False):
        for name, value in (("points", points), ("labels", labels), ("mask", mask)):
            given[name].append(value)
        return real(features, points, labels, mask, several)

    monkeypatch.setattr(model, "masks", masks)
    hook = model.image_encoder.register_forward_pre_hook(
        lambda _, volume: given["cube"].append(volume[0][0, 0].clone())
    )
    yield given
    hook.remove()


def question(*points, inside=True, mask=None):
    return Prompts(torch.tensor(points).reshape(-1, 3), torch.tensor([inside] * len(points), dtype=torch.bool), mask)


QUESTIONS = {
    "one point": lambda shape: question((0, 0, 0)),
    "several points": lambda shape: question((0, 0, 0), [n // 2 for n in shape], [n - 1 for n in shape]),
    "a mask": lambda shape: question(mask=patch_of(shape, 1)),
    "points and a mask": lambda shape: question((0, 0, 0), mask=patch_of(shape, 1)),
    "nothing": lambda shape: question(),
}


@pytest.mark.parametrize("shape", [(64, 64, 64), (40, 52, 33), (96, 30, 70)], ids=ids)
@pytest.mark.parametrize("what", QUESTIONS)
def test_answer_lies_on_the_patch(prompts, shape, what):
    assert prompts.segment(patch_of(shape), [QUESTIONS[what](shape)]).shape == (1, 1, *shape)


@pytest.mark.parametrize("shape", [(64, 64, 64), (40, 52, 33), (96, 30, 70)], ids=ids)
@pytest.mark.parametrize("what", QUESTIONS)
def test_answer_is_a_probability(prompts, shape, what):
    found = prompts.segment(patch_of(shape), [QUESTIONS[what](shape)])
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_answer_has_no_gradient(prompts):
    image = patch_of((64, 64, 64)).requires_grad_()
    mask = patch_of((64, 64, 64), 1).requires_grad_()
    assert not prompts.segment(image, [question((3, 4, 5), mask=mask)]).requires_grad


def test_model_is_frozen(prompts):
    assert not any(one.requires_grad for one in prompts.model.parameters())


def test_patch_is_left_alone(prompts):
    image = patch_of((40, 52, 33))
    before = image.clone()
    prompts.segment(image, [question((3, 4, 5))])
    assert torch.equal(image, before)


def test_several_questions_are_answered_each_for_itself(prompts):
    image, shape = patch_of((40, 52, 33)), (40, 52, 33)
    asked = [make(shape) for make in QUESTIONS.values()]
    expected = torch.cat([prompts.segment(image, [one]) for one in asked])
    assert torch.allclose(prompts.segment(image, asked), expected, atol=1e-6)


def test_image_is_encoded_once_for_several_questions(prompts, seen):
    prompts.segment(patch_of((64, 64, 64)), [question((1, 2, 3)), question((4, 5, 6))])
    assert len(seen["cube"]) == 1


def test_answer_depends_on_the_point(prompts):
    found = prompts.segment(patch_of((64, 64, 64)), [question((5, 5, 5)), question((50, 40, 30))])
    assert not torch.allclose(found[0], found[1]), "two places gave one answer"


def test_answer_depends_on_inside_or_outside(prompts):
    found = prompts.segment(patch_of((64, 64, 64)), [question((5, 5, 5)), question((5, 5, 5), inside=False)])
    assert not torch.allclose(found[0], found[1]), "inside and outside gave one answer"


def test_answer_depends_on_the_mask(prompts):
    mask = patch_of((64, 64, 64), 1)
    found = prompts.segment(patch_of((64, 64, 64)), [question(mask=mask), question(mask=-mask)])
    assert not torch.allclose(found[0], found[1]), "a mask and its opposite gave one answer"


def test_registrys_model_answers_prompts(prompts):
    assert isinstance(prompts, Promptable)


# ---------------------------------------------------------------------- what the model gets


@pytest.mark.parametrize("shape", [(64, 64, 64), (40, 52, 33)], ids=ids)
def test_point_is_at_the_marked_voxel_of_what_the_model_sees(prompts, seen, shape):
    """The model's axes are (x, y, z), for the cube and for the points alike."""
    image = torch.zeros(1, 1, *shape)
    image[0, 0, 11, 22, 30] = 1
    prompts.segment(image, [question((11, 22, 30))])
    marked = torch.nonzero(seen["cube"][0])[0].float()
    assert torch.equal(seen["points"][0][0, 0], marked), f"point {seen['points'][0]}, marked voxel {marked}"


def test_model_sees_x_y_z(prompts, seen):
    image = patch_of((64, 64, 64))
    prompts.segment(image, [question((1, 2, 3))])
    assert torch.equal(seen["cube"][0], image[0, 0].permute(2, 1, 0))


def test_answer_comes_back_as_z_y_x(prompts, monkeypatch):
    monkeypatch.setattr(
        prompts.model, "upscaled", lambda logits: torch.arange(64.0).reshape(64, 1, 1).expand(1, 1, 64, 64, 64)
    )
    found = prompts.segment(patch_of((64, 64, 64)), [question((1, 2, 3))])[0, 0]
    assert torch.equal(found[0, 0], torch.sigmoid(torch.arange(64.0))), "the model's first axis is x, the last one here"


def test_labels_are_one_inside_and_zero_outside(prompts, seen):
    asked = Prompts(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([True, False]))
    prompts.segment(patch_of((64, 64, 64)), [asked])
    assert seen["labels"][0].tolist() == [[1, 0]]


def test_mask_lies_where_the_points_lie(prompts, seen):
    """A mask round a voxel: its low-resolution form is highest at that voxel's place."""
    shape, point = (40, 52, 33), (11, 22, 28)
    distance = sum((axis - n) ** 2 for axis, n in zip(np.indices(shape), point, strict=True))
    mask = torch.from_numpy(10 * np.exp(-distance / 50) - 5).float()[None, None]
    prompts.segment(patch_of(shape), [question(point, mask=mask)])
    low = seen["mask"][0][0, 0]
    highest = np.unravel_index(int(low.argmax()), low.shape)
    expected = (seen["points"][0][0, 0] + 0.5) * low.shape[0] / SIZE - 0.5
    assert np.abs(np.array(highest) - expected.numpy()).max() <= 0.75, f"highest at {highest}, expected {expected}"


def test_round_the_patch_the_mask_says_surely_not(prompts, seen):
    prompts.segment(patch_of((40, 52, 33)), [question(mask=torch.full((1, 1, 40, 52, 33), 3.0))])
    assert float(seen["mask"][0].max()) == 3 and float(seen["mask"][0].min()) == -10


def test_first_question_comes_with_a_mask_of_zeros(prompts, seen):
    """As officially with a first click."""
    prompts.segment(patch_of((64, 64, 64)), [question((1, 2, 3))])
    assert seen["mask"][0].shape == (1, 1, 16, 16, 16) and not seen["mask"][0].any()


# ---------------------------------------------------------------------- by name


SETTINGS = GeneralistConfig(checkpoint="random", architecture="small")


@pytest.fixture
def loaded(monkeypatch):
    """How often weights were loaded."""
    count, real = [], registry.load_model

    def counting(*arguments):
        count.append(arguments)
        return real(*arguments)

    registry._loaded_once.cache_clear()
    monkeypatch.setattr(registry, "load_model", counting)
    yield count
    registry._loaded_once.cache_clear()


def test_weights_are_loaded_once(loaded):
    for _ in range(2):
        promptable_named("sam-med3d", SETTINGS, CPU, Recorder())
    assert len(loaded) == 1, f"weights were loaded {len(loaded)} times"


def test_both_use_the_same_weights(loaded):
    one, other = (promptable_named("sam-med3d", SETTINGS, CPU, Recorder()) for _ in range(2))
    assert one.model is other.model


def test_other_weights_are_loaded_too(loaded):
    promptable_named("sam-med3d", SETTINGS, CPU, Recorder())
    promptable_named("sam-med3d", SETTINGS.model_copy(update={"random_seed": 1}), CPU, Recorder())
    assert len(loaded) == 2, f"weights of two seeds were loaded {len(loaded)} times"


def test_random_weights_are_a_warning(loaded):
    observer = Recorder()
    promptable_named("sam-med3d", SETTINGS, CPU, observer)
    assert [fields["text"] for kind, fields in observer.events if kind == "warning"] == ["random weights: no accuracy"]


def test_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match=r"unknown promptable generalist 'magic'.*sam-med3d"):
        promptable_named("magic", SETTINGS, CPU, Recorder())


class Brighter:
    """A second promptable generalist: whatever is as bright as the points."""

    def segment(self, image, questions):
        found = []
        for one in questions:
            z, y, x = one.points.T
            found.append((image[0] >= image[0, 0, z, y, x].min()).float())
        return torch.stack(found)


def test_another_one_needs_one_line_in_the_registry(monkeypatch):
    monkeypatch.setitem(registry.PROMPTABLE, "brighter", lambda settings, device, observer: Brighter())
    image = patch_of((5, 6, 7))
    found = promptable_named("brighter", SETTINGS, CPU, Recorder()).segment(image, [question((1, 2, 3))])
    assert torch.equal(found[0, 0] > 0, image[0, 0] >= image[0, 0, 1, 2, 3])
