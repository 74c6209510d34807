"""Features are computed once: kept, reused over runs, never taken for those of another scan or model."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
from engine_helpers import Recorder, smooth_noise, tiny_config, turned

from SemiSAMO1Lib.engine.cases import EngineCase, LabelledCase
from SemiSAMO1Lib.engine.data.store import Store
from SemiSAMO1Lib.engine.generalists import feature_cache
from SemiSAMO1Lib.engine.generalists.base import FeatureMap
from SemiSAMO1Lib.engine.generalists.feature_cache import CachedFeatures
from SemiSAMO1Lib.engine.generalists.sam_med3d.generalist import SamMed3DFeatures
from SemiSAMO1Lib.engine.rounds import run
from SemiSAMO1Lib.phantoms import LABELS, PhantomSettings, make_phantom
from SemiSAMO1Lib.volume import Geometry, Volume


class Counting:
    """Features that any change of a scan would change; counts how often it was asked."""

    def __init__(self, key="counting"):
        self.key = key
        self.asked = 0

    def features(self, volume):
        self.asked += 1
        channels = np.stack([volume.array, volume.array**2]).astype(np.float16)
        return FeatureMap(volume.geometry, channels, np.linspace(0, 1, volume.array.size).reshape(volume.array.shape))


@pytest.fixture
def scan():
    shape = (5, 6, 7)
    return Volume(smooth_noise(shape, 0), Geometry(shape, (3.0, 1.1, 0.9), (1.0, -2.0, 300.5), turned()))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "features"


@pytest.fixture
def kept(scan, folder):
    """The scan's features are in the folder; the file."""
    CachedFeatures(Counting(), folder).features(scan)
    return next(folder.iterdir())


def asked_for(volume, folder, key="counting"):
    """How often the generalist is asked for features of a scan."""
    generalist = Counting(key)
    CachedFeatures(generalist, folder).features(volume)
    return generalist.asked


def test_same_scan_is_described_once(scan, folder):
    generalist = Counting()
    cached = CachedFeatures(generalist, folder)
    cached.features(scan), cached.features(scan)
    assert generalist.asked == 1


def test_another_instance_reads_what_is_kept(kept, scan, folder):
    assert asked_for(scan, folder) == 0, "the features lie in the folder; they were computed again"


def test_computed_features_are_counted(scan, folder):
    cached = CachedFeatures(Counting(), folder)
    cached.features(scan), cached.features(scan)
    assert cached.computed == 1


def test_a_copy_of_the_scan_is_the_same_scan(kept, scan, folder):
    assert asked_for(Volume(np.asfortranarray(scan.array), scan.geometry), folder) == 0


@pytest.mark.parametrize("part", ["channels", "weight"])
def test_kept_features_are_those_that_were_computed(kept, scan, folder, part):
    found, expected = CachedFeatures(Counting(), folder).features(scan), Counting().features(scan)
    assert np.array_equal(getattr(found, part), getattr(expected, part))


def test_kept_features_have_half_precision(kept, scan, folder):
    assert CachedFeatures(Counting(), folder).features(scan).channels.dtype == np.float16


def test_kept_features_keep_their_place(kept, scan, folder):
    assert CachedFeatures(Counting(), folder).features(scan).geometry == scan.geometry


def test_key_is_the_generalists(folder):
    assert CachedFeatures(Counting("abc"), folder).key == "abc"


def test_another_model_computes_anew(kept, scan, folder):
    assert asked_for(scan, folder, key="other weights") == 1


def test_a_changed_voxel_computes_anew(kept, scan, folder):
    scan.array[2, 3, 4] += 1e-3
    assert asked_for(scan, folder) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"spacing": (3.0, 1.1, 0.91)},
        {"origin": (1.0, -2.0, 300.0)},
        {"direction": turned((20.0, -15.0, 11.0))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_place_computes_anew(kept, scan, folder, change):
    assert asked_for(Volume(scan.array, replace(scan.geometry, **change)), folder) == 1


def test_the_same_bytes_in_another_shape_compute_anew(kept, scan, folder):
    turned_scan = Volume(scan.array.reshape(7, 6, 5), replace(scan.geometry, shape=(7, 6, 5)))
    assert asked_for(turned_scan, folder) == 1


def test_the_same_bytes_as_other_numbers_compute_anew(folder):
    zeros = Volume(np.zeros((2, 2, 2), np.float32), Geometry((2, 2, 2)))
    asked_for(zeros, folder)
    assert asked_for(Volume(zeros.array.view(np.int32), zeros.geometry), folder) == 1


def damage(path, kind):
    content = path.read_bytes()
    if kind == "without the weights":
        with h5py.File(path, "r+") as file:
            del file["weight"]
    elif kind == "without the place":
        with h5py.File(path, "r+") as file:
            del file.attrs["geometry"]
    elif kind == "place is no JSON":
        with h5py.File(path, "r+") as file:
            file.attrs["geometry"] = "{"
    elif kind == "place is no text":
        with h5py.File(path, "r+") as file:
            file.attrs["geometry"] = [1.0, 2.0]
    elif kind == "a folder in place of the weights":
        with h5py.File(path, "r+") as file:
            del file["weight"]
            file.create_group("weight")
    else:
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "text": b"hello"}[kind])


DAMAGES = [
    "empty",
    "half",
    "text",
    "without the weights",
    "without the place",
    "place is no JSON",
    "place is no text",
    "a folder in place of the weights",
]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_file_is_computed_anew(kept, scan, folder, kind):
    damage(kept, kind)
    assert asked_for(scan, folder) == 1


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_file_is_replaced(kept, scan, folder, kind):
    damage(kept, kind)
    asked_for(scan, folder)
    assert asked_for(scan, folder) == 0, "the damaged file was not replaced by a whole one"


def test_file_of_a_failed_write_does_not_stay(scan, folder, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache.json, "dumps", full_disk)
    with pytest.raises(OSError, match="No space"):
        feature_cache._write(folder / "a.h5", Counting().features(scan))
    assert not list(folder.iterdir()), "a half-written file stays in the folder"


def test_finished_file_is_the_only_one(kept, folder):
    assert [path.suffix for path in folder.iterdir()] == [".h5"] and not kept.name.startswith(".")


def test_without_a_folder_nothing_is_written(scan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CachedFeatures(Counting(), None).features(scan)
    assert not list(tmp_path.rglob("*"))


def test_without_a_folder_features_are_computed_each_time(scan):
    cached = CachedFeatures(Counting(), None)
    cached.features(scan), cached.features(scan)
    assert cached.generalist.asked == 2


def test_generalist_that_sees_nothing_leaves_no_file(scan, folder):
    class Blind(Counting):
        def features(self, volume):
            raise ValueError("nothing to see")

    with pytest.raises(ValueError, match="nothing to see"):
        CachedFeatures(Blind(), folder).features(scan)
    assert not folder.exists() or not list(folder.iterdir())


# ---------------------------------------------------------------------- whole runs


SETTINGS = {"checkpoint": "random", "architecture": "small"}
CONFIG = tiny_config(rounds=0, generalist="sam-med3d", generalists=SETTINGS)


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(n, 1, PhantomSettings(spacing_mm=(3.5, 3.5, 3.5))) for n in range(3)]


def whole_run(phantoms, store, config, features):
    template = LabelledCase("template", phantoms[0].image, phantoms[0].label)
    cases = [EngineCase(p.name, p.image.geometry, lambda p=p: p.image) for p in phantoms[1:]]
    return list(run(cases, [template], 1 + len(LABELS), config, Store(store), Recorder(), features=features))


@pytest.fixture
def described(monkeypatch):
    """How many scans the encoder was asked to describe."""
    counted, real = [], SamMed3DFeatures.features

    def counting(self, volume):
        counted.append(volume.geometry)
        return real(self, volume)

    monkeypatch.setattr(SamMed3DFeatures, "features", counting)
    return counted


def test_a_run_describes_every_scan_once(phantoms, tmp_path, described):
    whole_run(phantoms, tmp_path / "run", CONFIG, tmp_path / "features")
    assert len(described) == len(phantoms), f"{len(described)} descriptions of {len(phantoms)} scans"


def test_a_run_without_a_folder_describes_every_scan_once(phantoms, tmp_path, described):
    whole_run(phantoms, tmp_path / "run", CONFIG, None)
    assert len(described) == len(phantoms), f"{len(described)} descriptions of {len(phantoms)} scans"


def test_a_second_run_describes_none(phantoms, tmp_path, described):
    whole_run(phantoms, tmp_path / "first", CONFIG, tmp_path / "features")
    described.clear()
    whole_run(phantoms, tmp_path / "second", CONFIG, tmp_path / "features")
    assert not described, f"{len(described)} scans were described again by a run that had the features"


def test_a_second_run_gives_the_same(phantoms, tmp_path):
    first, second = (whole_run(phantoms, tmp_path / name, CONFIG, tmp_path / "features") for name in ("1", "2"))
    assert all(np.array_equal(a.prediction.array, b.prediction.array) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("change", [{"random_seed": 1}, {"coverage": "centre"}, {"preprocessing": "released"}])
def test_a_run_with_other_features_computes_them(phantoms, tmp_path, described, change):
    whole_run(phantoms[:2], tmp_path / "first", CONFIG, tmp_path / "features")
    described.clear()
    other = tiny_config(rounds=0, generalist="sam-med3d", generalists={**SETTINGS, **change})
    whole_run(phantoms[:2], tmp_path / "second", other, tmp_path / "features")
    assert len(described) == 2, f"{change}: features of other settings were taken"
