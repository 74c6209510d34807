"""Case ids that are safe as folder names everywhere, and fingerprints that tell scans apart."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scans import OBLIQUE, scan, two_labels, write_scan

from SemiSAMO1Lib.image_io import data_files, to_sitk
from SemiSAMO1Lib.project import Case, Role
from SemiSAMO1Lib.project.cases import LONGEST_ID, fingerprint, looks_like_labels, make_id
from SemiSAMO1Lib.volume import Volume

RESERVED = ["con", "PRN", "Aux", "nul", "com1", "COM9", "lpt1", "LPT9"]
NAMES = [
    "scan",
    "Patient 007",
    "Müller, Größe",
    "東京",
    "",
    "...",
    " ",
    "a" * 60,
    "con." + "a" * 30 + "." * 20,
    "../../etc/passwd",
    "c:\\x",
    "-rf",
    "a\nb",
    *RESERVED,
    *(f"{one}.v2" for one in RESERVED),
]


def random_names(count: int) -> list[str]:
    alphabet = 'aA.-_ /\\:*?"<>|äß東\t\0' + "con"
    return ["".join(random.Random(n).choices(alphabet, k=random.Random(n).randrange(70))) for n in range(count)]


def is_safe(name: str) -> bool:
    plain = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    fits = 0 < len(name) <= LONGEST_ID and set(name) <= plain
    return (
        fits
        and name[0] not in ".-"
        and name[-1] != "."
        and name.lower().partition(".")[0] not in map(str.lower, RESERVED)
    )


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_safe_folder_names(name: str) -> None:
    assert is_safe(make_id(name, [])), f"{name!r} became {make_id(name, [])!r}"


def test_any_name_gives_a_safe_id() -> None:
    bad = {name: made for name in random_names(3000) if not is_safe(made := make_id(name, []))}
    assert not bad, f"unsafe folder names: {dict(list(bad.items())[:5])}"


def test_any_names_give_safe_ids_unique_ignoring_case() -> None:
    taken: list[str] = []
    for name in [*random_names(400), *("A" * 60, "a" * 60, "con", "CON") * 6]:
        taken.append(make_id(name, taken))
    bad = [one for one in taken if not is_safe(one)]
    assert (len({one.lower() for one in taken}), bad) == (len(taken), []), (
        "two cases would share a folder, or are unsafe"
    )


@pytest.mark.parametrize("name", ["scan", "Patient_007", "a.b-c"])
def test_plain_names_are_kept(name: str) -> None:
    assert make_id(name, []) == name, f"{name} needs no change"


def test_the_second_of_one_name_gets_a_number() -> None:
    assert make_id("Scan", ["scan"]) == "Scan-2", "the first free number should be appended"


def test_a_case_survives_json() -> None:
    case = Case(
        "a", "../a.nrrd", "/x/a.nrrd", "f00", OBLIQUE, Role.LABELLED, "accepted", 3, {"kind": "dicom"}, {"x": 1}
    )
    assert Case.from_json(case.to_json()) == case, "a case read back should be the same"


def test_a_copied_file_has_the_same_fingerprint(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "a.nrrd")
    shutil.copyfile(path, tmp_path / "b.nrrd")
    assert fingerprint(path) == fingerprint(tmp_path / "b.nrrd"), "name and time should not count"


@pytest.mark.parametrize("at", [0, 1 << 19, (3 << 20) + 17, (4 << 20) - 1])
def test_one_changed_byte_changes_the_fingerprint(tmp_path: Path, at: int) -> None:
    content = bytearray(4 << 20)
    (tmp_path / "a.nii").write_bytes(content)
    before = fingerprint(tmp_path / "a.nii")
    content[at] = 1
    (tmp_path / "a.nii").write_bytes(content)
    assert fingerprint(tmp_path / "a.nii") != before, f"byte {at} does not count"


def test_scans_with_equal_borders_have_different_fingerprints(tmp_path: Path) -> None:
    array = np.zeros((60, 220, 220), np.float32)  # 11 MiB, uncompressed, air all round as after skull stripping
    for name, seed in (("a", 1), ("b", 2)):
        array[20:40, 60:160, 60:160] = np.random.default_rng(seed).normal(300, 40, (20, 100, 100))
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / f"{name}.nii"), useCompression=False)
    assert fingerprint(tmp_path / "a.nii") != fingerprint(tmp_path / "b.nii"), "two patients are taken for one"


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_the_data_file_of_a_header_counts(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(to_sitk(scan(OBLIQUE, 1)), str(path), useCompression=False)
    before = fingerprint(path)
    data_files(path)[0].write_bytes(scan(OBLIQUE, 2).array.tobytes())
    assert fingerprint(path) != before, "the voxels were changed, the header was not"


def eight_bit(share_of_air: float) -> Volume:
    array = np.random.default_rng(0).integers(1, 256, OBLIQUE.shape).astype(np.uint8)
    array.reshape(-1)[: int(share_of_air * array.size)] = 0
    return Volume(array, OBLIQUE)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32])
def test_label_maps_look_like_labels(kind: type) -> None:
    assert looks_like_labels(two_labels(OBLIQUE, 1, 2, kind)), f"a label map of {kind.__name__} was taken for a scan"


@pytest.mark.parametrize("volume", [scan(OBLIQUE), eight_bit(0.9), eight_bit(0.1)], ids=["float", "air", "no air"])
def test_scans_do_not_look_like_labels(volume: Volume) -> None:
    assert not looks_like_labels(volume), "a scan was taken for a label map"
