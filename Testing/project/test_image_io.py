"""The one door to image files: formats, detached data, names that Windows readers cannot open, files cut short."""

from __future__ import annotations

import ast
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scans import OBLIQUE, left_handed, scan, write_scan

from SemiSAMO1Lib import image_io
from SemiSAMO1Lib.image_io import (
    UnreadableImage,
    data_files,
    read_volume,
    stem_of,
    suffix_of,
    to_sitk,
    write_image,
    write_volume,
)
from SemiSAMO1Lib.volume import Geometry, Volume

ROOT = Path(__file__).resolve().parents[2]
FORMATS = [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".nhdr"]
WRITE = sitk.WriteImage
ONE_FILE = [".nii", ".nii.gz", ".nrrd", ".mha"]


@pytest.fixture
def ascii_only(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every name is as on Windows; what SimpleITK is asked to open or write is noted."""
    opened: list[str] = []
    monkeypatch.setattr(image_io, "_needs_detour", lambda path: not str(path).isascii())
    read, write = sitk.ReadImage, sitk.WriteImage

    def reading(name: str) -> sitk.Image:
        opened.append(name)
        return read(name)

    def writing(image: sitk.Image, name: str, **options: bool) -> None:
        opened.append(name)
        write(image, name, **options)

    monkeypatch.setattr(sitk, "ReadImage", reading)
    monkeypatch.setattr(sitk, "WriteImage", writing)
    return opened


def save(path: Path, volume: Volume, compressed: bool = False) -> Path:
    """Any format, detached ones too, by SimpleITK itself."""
    WRITE(to_sitk(volume), str(path), compressed)
    return path


@pytest.mark.parametrize("suffix", ONE_FILE)
@pytest.mark.parametrize("geometry", [OBLIQUE, left_handed(OBLIQUE)], ids=["right", "left"])
def test_round_trip_keeps_voxels(tmp_path: Path, suffix: str, geometry: Geometry) -> None:
    volume = scan(geometry)
    write_volume(tmp_path / f"scan{suffix}", volume)
    assert np.array_equal(read_volume(tmp_path / f"scan{suffix}").array, volume.array), f"{suffix} changed voxels"


@pytest.mark.parametrize("suffix", ONE_FILE)
@pytest.mark.parametrize("geometry", [OBLIQUE, left_handed(OBLIQUE)], ids=["right", "left"])
def test_round_trip_keeps_the_place(tmp_path: Path, suffix: str, geometry: Geometry) -> None:
    write_volume(tmp_path / f"scan{suffix}", scan(geometry))
    read = read_volume(tmp_path / f"scan{suffix}").geometry
    assert read.same_grid(geometry), f"{suffix}: expected {geometry}, got {read}"


def test_bool_is_stored_as_uint8(tmp_path: Path) -> None:
    mask = scan(OBLIQUE).array > 300
    write_volume(tmp_path / "mask.nrrd", Volume(mask, OBLIQUE))
    read = read_volume(tmp_path / "mask.nrrd").array
    assert (read.dtype, np.array_equal(read, mask)) == (np.uint8, True), "a mask should come back as 0 and 1, uint8"


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_formats_of_two_files_are_not_written(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ValueError, match="two files"):
        write_image(tmp_path / f"scan{suffix}", to_sitk(scan(OBLIQUE)))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "scan.nii")
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        write_image(path, sitk.Image([4, 4, 4], sitk.sitkLabelUInt8))  # run-length labels: no format takes them
    assert path.read_bytes() == before, "the old file should be untouched by a write that failed"


@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "compressed"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_non_ascii_names_take_a_detour_when_reading(
    tmp_path: Path, ascii_only: list[str], suffix: str, compressed: bool
) -> None:
    folder = tmp_path / "Größe 東京"
    folder.mkdir()
    volume = scan(OBLIQUE)
    path = save(folder / f"Müller 1.5{suffix}", volume, compressed)
    read = read_volume(path)
    assert np.array_equal(read.array, volume.array), f"{suffix} changed over the detour"


def test_the_detour_opens_ascii_names_only(tmp_path: Path, ascii_only: list[str]) -> None:
    write_volume(tmp_path / "Müller.größe.nrrd", scan(OBLIQUE))
    read_volume(tmp_path / "Müller.größe.nrrd")
    assert len(ascii_only) == 2, f"one write and one read were expected: {ascii_only}"
    assert all(name.isascii() for name in ascii_only), f"the image library saw {ascii_only}"


@pytest.mark.parametrize("suffix", ONE_FILE)
def test_non_ascii_names_take_a_detour_when_writing(tmp_path: Path, ascii_only: list[str], suffix: str) -> None:
    volume = scan(OBLIQUE)
    write_volume(tmp_path / "Größe" / f"Müller{suffix}", volume)
    read = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "Größe" / f"Müller{suffix}")))
    assert np.array_equal(read, volume.array), f"{suffix}: the file written over the detour differs"


def test_a_nrrd_header_with_a_list_of_data_files_takes_the_detour(tmp_path: Path, ascii_only: list[str]) -> None:
    volume = scan(OBLIQUE)
    save(tmp_path / "é.nhdr", volume)
    header = (tmp_path / "é.nhdr").read_text()
    kept = [line for line in header.splitlines() if line and not line.startswith("data file:")]
    names = []
    for number, piece in enumerate(volume.array):
        names.append(f"schicht-ä-{number}.raw")
        (tmp_path / names[-1]).write_bytes(piece.tobytes())
    (tmp_path / "é.nhdr").write_text("\n".join([*kept, "data file: LIST 2", *names]) + "\n", encoding="utf-8")
    assert np.array_equal(read_volume(tmp_path / "é.nhdr").array, volume.array), "a slice per file was not put together"


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_a_missing_data_file_is_named(tmp_path: Path, ascii_only: list[str], suffix: str) -> None:
    path = save(tmp_path / f"é{suffix}", scan(OBLIQUE))
    data = data_files(path)[0]
    data.unlink()
    with pytest.raises(UnreadableImage, match=data.name):
        read_volume(path)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "compressed"])
def test_a_file_cut_short_is_unreadable(tmp_path: Path, suffix: str, compressed: bool) -> None:
    path = save(tmp_path / f"scan{suffix}", scan(OBLIQUE), compressed)
    cut = data_files(path)[0] if data_files(path) else path
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    with pytest.raises(UnreadableImage, match="cut short"):
        read_volume(path)


def test_a_big_endian_nifti_that_lacks_its_last_byte_is_unreadable(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii", Volume(scan(OBLIQUE).array.astype(np.int16), OBLIQUE))
    content = path.read_bytes()
    header = bytearray(content[:352])
    for start, width, count in ((0, 4, 1), (40, 2, 8), (70, 2, 2), (76, 4, 8), (108, 4, 3), (252, 2, 2), (256, 4, 18)):
        for at in range(start, start + width * count, width):
            header[at : at + width] = header[at : at + width][::-1]
    path.write_bytes(bytes(header) + np.frombuffer(content[352:], "<i2").astype(">i2").tobytes())
    read_volume(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnreadableImage, match="cut short"):
        read_volume(path)


def test_a_gzip_of_several_parts_is_whole(tmp_path: Path) -> None:
    volume = scan(OBLIQUE)
    content = save(tmp_path / "scan.nii", volume).read_bytes()
    half = len(content) // 2
    (tmp_path / "parts.nii.gz").write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    assert np.array_equal(read_volume(tmp_path / "parts.nii.gz").array, volume.array), "two gzip parts are one file"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: sitk.Image([8, 8], sitk.sitkFloat32), "2D"),
        (lambda: sitk.Image([8, 8, 8, 2], sitk.sitkFloat32), "4D"),
        (lambda: sitk.Image([8, 8, 8], sitk.sitkVectorUInt8, 3), "3 components"),
        (lambda: sitk.Image([8, 8, 8], sitk.sitkComplexFloat32), "complex"),
    ],
    ids=["2D", "4D", "RGB", "complex"],
)
def test_what_is_not_one_scalar_volume_is_refused(tmp_path: Path, make: Callable[[], sitk.Image], reason: str) -> None:
    sitk.WriteImage(make(), str(tmp_path / "image.nrrd"))
    with pytest.raises(UnreadableImage, match=reason):
        read_volume(tmp_path / "image.nrrd")


def test_data_files_of_a_moved_pair_are_beside_the_header(tmp_path: Path) -> None:
    save(tmp_path / "scan.mhd", scan(OBLIQUE))
    shutil.move(tmp_path, tmp_path.with_name("moved"))
    found = data_files(tmp_path.with_name("moved") / "scan.mhd")
    assert found == [tmp_path.with_name("moved") / "scan.raw"], f"expected the .raw beside the header, got {found}"


@pytest.mark.parametrize(
    ("name", "stem", "suffix"),
    [
        ("a.nii.gz", "a", ".nii.gz"),
        ("A.B.NII.GZ", "A.B", ".nii.gz"),
        ("a.seg.nrrd", "a", ".seg.nrrd"),
        ("a.nrrd", "a", ".nrrd"),
        ("1.2.840.3", "1.2.840", ".3"),
        ("scan", "scan", ""),
    ],
)
def test_stem_and_suffix(name: str, stem: str, suffix: str) -> None:
    assert (stem_of(Path(name)), suffix_of(Path(name))) == (stem, suffix), f"{name} was split wrongly"


def test_image_files_are_opened_in_image_io_only() -> None:
    forbidden = {"ReadImage", "WriteImage", "ImageSeriesReader", "ImageFileReader", "ImageFileWriter"}
    sources = [
        p for top in ("SemiSAMO1Lib", "SemiSAMO1") for p in (ROOT / top).rglob("*.py") if p.name != "image_io.py"
    ]
    assert len(sources) > 20, f"the library was not found below {ROOT}"
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {name}"
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (name := getattr(node, "attr", getattr(node, "id", getattr(node, "name", "")))) in forbidden
    ]
    assert not found, f"use image_io instead: {found}"
