"""`semisamo1 test`: published weights and those of a run, measured as published, by hand worked out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_helpers import (
    DONE,
    WRONG_USE,
    Run,
    Shown,
    phantom,
    reproduce,
    rewrite,
    shell,
    stored,
    write_layout,
    write_names,
    write_published,
    zscored,
)
from numpy.typing import NDArray
from torch import nn

from SemiSAMO1Lib import files
from SemiSAMO1Lib.engine.config import BEFORE
from SemiSAMO1Lib.engine.data.hdf5_layout import write_case
from SemiSAMO1Lib.engine.specialists.unet_3d import UNet3D, UNet3DWithDistance
from SemiSAMO1Lib.image_io import read_volume
from SemiSAMO1Lib.volume import Geometry, Volume

MEASURES = ("dice", "jaccard", "hd95_voxels", "asd_voxels", "hd95_mm", "asd_mm")


def measure(root: Path, weights: Path, *options: object) -> Shown:
    return shell("test", "--root", root, "--weights", weights, "--device", "cpu", *options)


def measured(root: Path, weights: Path, *options: object) -> dict[str, Any]:
    shown = measure(root, weights, "--json", *options)
    assert shown.code == DONE, shown.text
    value: dict[str, Any] = shown.json()
    return value


def saved(path: Path, network: nn.Module) -> Path:
    torch.save(network.state_dict(), path)
    return path


# ---------------------------------------------------------------------- published weights


@pytest.fixture(scope="module", params=["2 classes", "3 classes", "distance map"])
def published_weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A file as the published code saves it, and its classes."""
    torch.manual_seed(0)
    classes = 3 if request.param == "3 classes" else 2
    network = UNet3DWithDistance(classes) if request.param == "distance map" else UNet3D(classes)
    return saved(tmp_path_factory.mktemp("weights") / "iter_6000.pth", network), classes


def test_published_weights_are_measured(published: Path, published_weights: tuple[Path, int]) -> None:
    """A row for every foreground class; the class count comes from the file."""
    weights, classes = published_weights
    found = measured(published, weights, "--patch", 32, 32, 32)
    expected = [("p2", value) for value in range(1, classes)]
    assert [(row["case"], row["label"]) for row in found["rows"]] == expected


def test_published_weights_predict_as_the_network_itself(
    published: Path, tmp_path: Path, published_weights: tuple[Path, int]
) -> None:
    """One window holds the whole scan, so that its middle is the network's own answer to the padded scan."""
    weights, classes = published_weights
    state = torch.load(weights, weights_only=True)
    network = UNet3DWithDistance(classes) if "final2.weight" in state else UNet3D(classes)
    network.load_state_dict(state)
    image = torch.from_numpy(stored(published, "p2", "image").T.copy())[None, None]
    before = [(32 - n) // 2 for n in image.shape[2:]]
    ends = [(b, 32 - n - b) for b, n in zip(before, image.shape[2:], strict=True)]
    padded = nn.functional.pad(image, [side for pair in reversed(ends) for side in pair])
    with torch.inference_mode():
        answer = network.eval()(padded)
    logits = answer[1] if isinstance(answer, tuple) else answer
    box = tuple(slice(b, b + n) for b, n in zip(before, image.shape[2:], strict=True))
    expected = logits[0].argmax(0)[box].numpy()
    measured(published, weights, "--patch", 32, 32, 32, "--save-predictions", tmp_path)
    same = np.mean(read_volume(tmp_path / "p2.nrrd").array == expected)
    assert same > 0.999, f"{same:.4f} of the voxels agree"


def test_a_network_under_another_name_is_no_published_one(published: Path, tmp_path: Path) -> None:
    shown = measure(published, saved(tmp_path / "w.pth", nn.Linear(2, 2)))
    assert shown.code == WRONG_USE and "neither of a run of `semisamo1 reproduce`" in shown.text, shown.text


def test_a_published_file_of_another_depth(published: Path, tmp_path: Path) -> None:
    state = UNet3D(2).state_dict()
    del state["center.conv1.0.weight"]
    torch.save(state, tmp_path / "w.pth")
    shown = measure(published, tmp_path / "w.pth")
    assert shown.code == WRONG_USE and "are not weights of unet_3d" in shown.text and "center" in shown.text


@pytest.mark.parametrize("content", [b"nonsense", b"", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_weights(published: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    shown = measure(published, tmp_path / "w.pth")
    assert shown.code == WRONG_USE and "w.pth cannot be read" in shown.text, shown.text


def test_weights_that_are_not_there(published: Path, tmp_path: Path) -> None:
    shown = measure(published, tmp_path / "w.pth")
    assert shown.code == WRONG_USE and "w.pth does not exist" in shown.text


def test_a_patch_that_the_published_network_cannot_have(published: Path, tmp_path: Path) -> None:
    shown = measure(published, saved(tmp_path / "w.pth", UNet3D(2)), "--patch", 30, 32, 32)
    assert shown.code == WRONG_USE and "multiples of 16" in shown.text


# ---------------------------------------------------------------------- weights of a run


def test_weights_of_a_run_are_measured(run: Run) -> None:
    found = measured(run.root, run.output / "weights" / "round-2.pth")
    assert [(row["case"], row["label"]) for row in found["rows"]] == [("p2", 1), ("p2", 2), ("p2", 3)]


def test_the_direction_and_spacing_in_a_file_do_not_turn_what_a_run_sees(run: Run, tmp_path: Path) -> None:
    """Training reads the voxels as stored, so measuring does."""
    name = "p2"
    image, label = (np.transpose(stored(run.root, name, key)) for key in ("image", "label"))
    turned = Geometry(image.shape, (1.7, 0.8, 0.9), (5.0, -3.0, 9.0), (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
    write_case(tmp_path / "data" / f"{name}.h5", Volume(image, turned), Volume(label, turned))
    write_names(tmp_path, "test", [name])
    weights = run.output / "weights" / "round-1.pth"
    found = []
    for number, root in enumerate((run.root, tmp_path)):
        measured(root, weights, "--save-predictions", tmp_path / str(number))
        found.append(read_volume(tmp_path / str(number) / f"{name}.nrrd").array)
    assert not np.array_equal(found[0], found[0][:, ::-1, ::-1]), (
        "a prediction that looks the same turned proves nothing"
    )
    assert np.array_equal(*found)


def test_weights_of_a_run_predict_as_in_the_run(run: Run, tmp_path: Path) -> None:
    measured(run.root, run.output / "weights" / "round-2.pth", "--save-predictions", tmp_path)
    expected = np.load(run.output / "work" / "probabilities" / "2" / "p2.npy").argmax(0)
    same = np.mean(read_volume(tmp_path / "p2.nrrd").array == expected)
    assert same > 0.995, f"{same:.4f} of the voxels agree; the run keeps images in half precision"


@pytest.mark.parametrize("specialist", ["dynunet", "unet_3d"])
def test_weights_of_the_dual_task_are_measured(published: Path, tmp_path: Path, specialist: str) -> None:
    """Its networks have a second head."""
    options = ("--learner", "dtc", "--iterations", 1, "--patch", 32, 32, 32)
    reproduce(published, tmp_path / "output", *options, specialist=specialist)
    shown = measure(published, tmp_path / "output" / "weights" / "round-1.pth")
    assert shown.code == DONE, shown.text


def test_weights_of_another_network_in_a_run(run: Run, tmp_path: Path) -> None:
    for name in ("plan.json", "config.json"):
        shutil.copy(run.output / name, tmp_path / name)
    (tmp_path / "weights").mkdir()
    shown = measure(run.root, saved(tmp_path / "weights" / "round-1.pth", UNet3D(4)))
    assert shown.code == WRONG_USE and "are not weights of dynunet" in shown.text, shown.text


def test_weights_of_an_unfinished_run_keep_its_label_values(run: Run, tmp_path: Path) -> None:
    """Round 1 can be measured while round 2 is trained."""
    for name in ("plan.json", "config.json", "weights/round-1.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(run.output / name, tmp_path / name)
    found = measured(run.root, tmp_path / "weights" / "round-1.pth")
    assert sorted({row["label"] for row in found["rows"]}) == [1, 2, 3]


def test_weights_of_an_older_programs_run_are_measured(run: Run, tmp_path: Path) -> None:
    """Its settings know nothing of what came later."""
    for name in ("plan.json", "weights/round-1.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(run.output / name, tmp_path / name)
    settings = files.read_json(run.output / "config.json")
    files.write_json(tmp_path / "config.json", {key: one for key, one in settings.items() if key not in BEFORE})
    measured(run.root, tmp_path / "weights" / "round-1.pth")


def test_grey_values_are_scaled_as_the_run_scaled_them(tmp_path: Path) -> None:
    """Where the configuration asks for it: published data come scaled already."""
    root = tmp_path / "raw"
    for number in range(3):
        one = phantom(number)
        write_published(root / "data" / f"p{number}.h5", one.image.array.astype(np.float32), one.label.array)
    write_names(root, "train", ["p0", "p1", "p2"])
    reproduce(root, tmp_path / "output", normalise=True)
    listing = tmp_path / "output" / "weights" / "round-1.pth"
    measured(root, listing, "--list", "train", "--save-predictions", tmp_path / "found")
    expected = np.load(tmp_path / "output" / "work" / "probabilities" / "1" / "p1.npy").argmax(0)
    same = np.mean(read_volume(tmp_path / "found" / "p1.nrrd").array == expected)
    assert same > 0.99, f"{same:.4f} of the voxels agree"


# ---------------------------------------------------------------------- by hand

#: mm along (z, y, x).
SPACING = (3.0, 2.0, 0.5)

#: A cube of 4³ voxels, and the same one voxel further along z: each has 56 surface voxels. Of one surface, 16 lie one
#: voxel (3 mm along z) outside of the other's cube, and 4 in the middle of its inner slice, one voxel from its side
#: (0.5 mm along x); the others lie on both.
CUBE = (slice(4, 8), slice(4, 8), slice(4, 8))
SHIFTED = (slice(5, 9), slice(4, 8), slice(4, 8))
SHIFTED_ROW = {
    "dice": 2 * 48 / 128,
    "jaccard": 48 / 80,
    "hd95_voxels": 1.0,
    "asd_voxels": 20 / 56,
    "hd95_mm": 3.0,
    "asd_mm": (16 * 3.0 + 4 * 0.5) / 56,
}


def cube(where: tuple[slice, ...] | None, value: int = 1) -> NDArray[np.uint8]:
    array = np.zeros((12, 12, 12), np.uint8)
    if where is not None:
        array[where] = value
    return array


@dataclass(frozen=True)
class Hand:
    """A layout whose network says what the test wants it to say."""

    root: Path
    weights: Path
    answers: dict[str, NDArray[Any]]

    def measured(self, *options: object) -> dict[str, Any]:
        return measured(self.root, self.weights, *options)


@pytest.fixture
def hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hand]:
    """Make a layout of cases (label, class indices that are predicted) for published weights with two classes."""

    def make(*pairs: tuple[NDArray[Any], NDArray[Any]], classes: int = 2, oblique: bool = False) -> Hand:
        root, names, answers = tmp_path / "by hand", [], []
        direction = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, -1.0) if oblique else Geometry((1, 1, 1)).direction
        for number, (label, answer) in enumerate(pairs):
            geometry = Geometry(label.shape, SPACING, (10.0, -20.0, 30.0), direction)
            image = np.random.default_rng(number).normal(size=label.shape).astype(np.float32)
            names.append(f"c{number}")
            write_case(root / "data" / f"c{number}.h5", Volume(image, geometry), Volume(label, geometry))
            answers.append(answer)
        write_names(root, "test", names)
        told = iter(answers)

        def predict(_: nn.Module, image: NDArray[Any], *__: object, **___: object) -> NDArray[Any]:
            answer = next(told)
            assert image.shape == answer.shape, f"an image {answer.shape} was expected, got {image.shape}"
            return np.moveaxis(np.eye(classes, dtype=np.float16)[answer], -1, 0)

        monkeypatch.setattr("SemiSAMO1Lib.tasks.measure.predict_probabilities", predict)
        weights = saved(tmp_path / "w.pth", UNet3D(classes))
        return Hand(root, weights, dict(zip(names, answers, strict=True)))

    return make


@pytest.mark.parametrize("name", MEASURES)
def test_a_case_worked_out_by_hand(hand: Callable[..., Hand], name: str) -> None:
    found = hand((cube(SHIFTED), cube(CUBE))).measured()["rows"][0][name]
    assert found == pytest.approx(SHIFTED_ROW[name]), f"{name}: {SHIFTED_ROW[name]} expected"


@pytest.mark.parametrize("name", MEASURES)
def test_mean_and_standard_deviation_over_cases(hand: Callable[..., Hand], name: str) -> None:
    """One perfect case beside the one worked out by hand."""
    found = hand((cube(SHIFTED), cube(CUBE)), (cube(CUBE), cube(CUBE))).measured()[name]
    perfect = 1.0 if name in ("dice", "jaccard") else 0.0
    expected = {"mean": (SHIFTED_ROW[name] + perfect) / 2, "std": abs(SHIFTED_ROW[name] - perfect) / 2}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("label", "prediction", "expected"),
    [
        (None, None, (1, 1, 0, 0)),
        (CUBE, None, (0, 0, 200, 100)),
        (None, CUBE, (0, 0, 200, 100)),
        (CUBE, CUBE, (1, 1, 0, 0)),
    ],
    ids=["both empty", "nothing found", "nothing there", "equal"],
)
@pytest.mark.parametrize("unit", ["voxels", "mm"])
def test_empty_masks_are_measured_as_published(
    hand: Callable[..., Hand], label: Any, prediction: Any, expected: tuple[float, ...], unit: str
) -> None:
    row = hand((cube(label), cube(prediction))).measured()["rows"][0]
    assert tuple(row[name] for name in ("dice", "jaccard", f"hd95_{unit}", f"asd_{unit}")) == expected


def test_every_class_has_its_own_row(hand: Callable[..., Hand]) -> None:
    """Class 1 is found, class 2 is called class 1."""
    low, high = (slice(1, 3),) * 3, (slice(7, 10),) * 3
    label, answer = cube(low) + cube(high, 2), cube(low) + cube(high)
    rows = hand((label, answer), classes=3).measured()["rows"]
    assert [row["dice"] for row in rows] == [pytest.approx(2 * 8 / (8 + 8 + 27)), 0.0]


def test_label_values_without_a_class_are_not_measured(hand: Callable[..., Hand]) -> None:
    label = cube(CUBE) + cube((slice(9, 11),) * 3, 5)
    rows = hand((label, cube(CUBE))).measured()["rows"]
    assert [(row["label"], row["dice"]) for row in rows] == [(1, 1.0)]


def test_predictions_are_saved_with_the_geometry_of_the_case(hand: Callable[..., Hand], tmp_path: Path) -> None:
    hand((cube(CUBE), cube(CUBE)), oblique=True).measured("--save-predictions", tmp_path / "new" / "folder")
    found = read_volume(tmp_path / "new" / "folder" / "c0.nrrd").geometry
    direction = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, -1.0)
    assert found.same_grid(Geometry((12, 12, 12), SPACING, (10.0, -20.0, 30.0), direction)), f"{found}"


def test_predictions_are_saved_voxel_for_voxel(hand: Callable[..., Hand], tmp_path: Path) -> None:
    one = hand((cube(CUBE), cube(SHIFTED)))
    one.measured("--save-predictions", tmp_path)
    assert np.array_equal(read_volume(tmp_path / "c0.nrrd").array, one.answers["c0"])


def test_without_asking_no_prediction_is_saved(hand: Callable[..., Hand], tmp_path: Path) -> None:
    hand((cube(CUBE), cube(CUBE))).measured()
    assert not list(tmp_path.rglob("*.nrrd"))


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose label has the values 2, 7 and 300."""
    folder = tmp_path_factory.mktemp("gaps")
    root = write_layout(folder / "layout")
    for name in ("p0", "p2"):
        rewrite(root, name, label=np.array([0, 7, 300, 2], np.uint16)[stored(root, name)])
    assert reproduce(root, folder / "output", "--iterations", 1).code == DONE
    return folder


@pytest.fixture
def gap_answer(gaps: Path, monkeypatch: pytest.MonkeyPatch) -> NDArray[Any]:
    """The network finds everything: classes are the values in ascending order."""
    label = stored(gaps / "layout", "p2").T
    classes = np.searchsorted([0, 2, 7, 300], label)
    answer = np.moveaxis(np.eye(4, dtype=np.float16)[classes], -1, 0)
    monkeypatch.setattr("SemiSAMO1Lib.tasks.measure.predict_probabilities", lambda *_, **__: answer)
    return label


def test_label_values_with_gaps_are_measured_under_their_values(gaps: Path, gap_answer: NDArray[Any]) -> None:
    rows = measured(gaps / "layout", gaps / "output" / "weights" / "round-1.pth")["rows"]
    assert [(row["label"], row["dice"]) for row in rows] == [(2, 1.0), (7, 1.0), (300, 1.0)]


def test_label_values_with_gaps_are_saved_as_they_were(gaps: Path, gap_answer: NDArray[Any], tmp_path: Path) -> None:
    measured(gaps / "layout", gaps / "output" / "weights" / "round-1.pth", "--save-predictions", tmp_path)
    assert np.array_equal(read_volume(tmp_path / "p2.nrrd").array, gap_answer)


def test_the_patch_is_given_along_the_files_axes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def predict(_: nn.Module, image: NDArray[Any], plan: Any, *__: object, **___: object) -> NDArray[Any]:
        seen.append(plan.patch)
        return np.zeros((4, *image.shape), np.float16)

    monkeypatch.setattr("SemiSAMO1Lib.tasks.measure.predict_probabilities", predict)
    weights = run.output / "weights" / "round-2.pth"
    measured(run.root, weights, "--patch", 32, 24, 16)
    measured(run.root, weights)
    assert seen == [(16, 24, 32), (16, 16, 16)], "(x, y, z) ends as (z, y, x); without it that of the run"


# ---------------------------------------------------------------------- what is shown


def test_for_machines_there_is_one_json_object(run: Run) -> None:
    found = measured(run.root, run.output / "weights" / "round-1.pth")
    assert set(found) == {"weights", "cases", "rows", *MEASURES} and found["cases"] == 1


def test_for_people_there_is_a_table(hand: Callable[..., Hand]) -> None:
    one = hand((cube(SHIFTED), cube(CUBE)), (cube(CUBE), cube(CUBE)))
    shown = measure(one.root, one.weights)
    assert "0.8750 ± 0.1250" in shown.text and "95HD, voxels (as published)" in shown.text, shown.text


@pytest.mark.parametrize("listing", ["val", "val.txt", "elsewhere"])
def test_another_list_is_measured(run: Run, tmp_path: Path, listing: str) -> None:
    write_names(tmp_path, "elsewhere", ["p2.h5"])
    name = tmp_path / "elsewhere.txt" if listing == "elsewhere" else listing
    found = measured(run.root, run.output / "weights" / "round-1.pth", "--list", name)
    assert {row["case"] for row in found["rows"]} == {"p2"}


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        ("prove", "prove.txt does not exist"),
        ("ghosts", "names 1 cases that are not in"),
        ("nobody", "names no case"),
    ],
)
def test_a_bad_list_is_named(run: Run, layout: Path, listing: str, expected: str) -> None:
    write_names(layout, "ghosts", ["p0", "ghost"])
    write_names(layout, "nobody", [])
    shown = measure(layout, run.output / "weights" / "round-1.pth", "--list", listing)
    assert shown.code == WRONG_USE and expected in shown.text, shown.text


def test_a_case_without_label_is_named(run: Run, layout: Path) -> None:
    rewrite(layout, "p2", label=None)
    shown = measure(layout, run.output / "weights" / "round-1.pth")
    assert shown.code == WRONG_USE and "p2.h5 has no dataset 'label'; it has ['image']" in shown.text, shown.text


def test_a_case_that_is_cut_short_is_named(run: Run, layout: Path) -> None:
    path = layout / "data" / "p2.h5"
    path.write_bytes(path.read_bytes()[:2000])
    shown = measure(layout, run.output / "weights" / "round-1.pth")
    assert shown.code == WRONG_USE and "p2.h5 cannot be used" in shown.text, shown.text


def test_a_root_that_is_not_there(run: Run, tmp_path: Path) -> None:
    shown = measure(tmp_path / "nowhere", run.output / "weights" / "round-1.pth")
    assert shown.code == WRONG_USE and "does not exist" in shown.text


def test_an_unknown_device_is_named(run: Run) -> None:
    shown = measure(run.root, run.output / "weights" / "round-1.pth", "--device", "abacus")
    assert shown.code == WRONG_USE and "unknown device 'abacus'" in shown.text


def test_a_small_case_is_measured(run: Run, layout: Path) -> None:
    """Smaller than the window along every axis."""
    image, label = (stored(layout, "p2", key)[4:12, 4:13, 3:10] for key in ("image", "label"))
    rewrite(layout, "p2", image=zscored(image), label=label)
    assert measure(layout, run.output / "weights" / "round-1.pth").code == DONE
