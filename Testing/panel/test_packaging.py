"""What the Extensions Index and CMake ask for, held against the files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
TOP = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
MODULE = (ROOT / "SemiSAMO1" / "CMakeLists.txt").read_text(encoding="utf-8")
RESOURCES = ROOT / "SemiSAMO1" / "Resources"


def listed(text: str, name: str) -> list[str]:
    found = re.search(rf"set\({name}\n(.*?)\n\s*\)", text, re.DOTALL)
    assert found is not None, f"no list {name}"
    return found[1].split()


def tracked(folder: str) -> set[str]:
    """Files that are in the repository, or would be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {line for line in done.stdout.splitlines() if (ROOT / line).is_file()}


def test_cmake_lists_every_file_of_the_library() -> None:
    in_cmake = {*listed(TOP, "SemiSAMO1Lib_SCRIPTS"), *listed(TOP, "SemiSAMO1Lib_RESOURCES")}
    assert in_cmake == tracked("SemiSAMO1Lib"), "a file that is not listed is not in the package"


def test_cmake_lists_every_resource_of_the_module() -> None:
    in_cmake = {f"SemiSAMO1/{path}" for path in listed(MODULE, "MODULE_PYTHON_RESOURCES")}
    assert in_cmake == {path for path in tracked("SemiSAMO1") if "/Resources/" in path}


def test_the_module_folder_has_one_python_file() -> None:
    assert [p.name for p in (ROOT / "SemiSAMO1").glob("*.py")] == ["SemiSAMO1.py"], "each would be taken for a module"


def test_the_module_file_is_thin() -> None:
    lines = (ROOT / "SemiSAMO1" / "SemiSAMO1.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 300


@pytest.mark.parametrize(
    "name",
    ["HOMEPAGE", "CATEGORY", "CONTRIBUTORS", "DESCRIPTION", "ICONURL", "SCREENSHOTURLS", "DEPENDS"],
)
def test_the_extension_describes_itself(name: str) -> None:
    assert re.search(rf'^set\(EXTENSION_{name} "[^"\n]+"\)$', TOP, re.MULTILINE), f"EXTENSION_{name}"


@pytest.mark.parametrize("name", ["ICONURL", "SCREENSHOTURLS"])
def test_pictures_of_the_extension_are_in_the_repository(name: str) -> None:
    url = re.search(rf'set\(EXTENSION_{name} "([^"]+)"\)', TOP)
    assert url is not None
    path = url[1].partition("/main/")[2]
    assert url[1].startswith("https://raw.githubusercontent.com/") and (ROOT / path).is_file(), path


def test_cpack_is_the_last_line() -> None:
    assert TOP.rstrip().endswith("include(${Slicer_EXTENSION_CPACK})")


def test_the_catalog_entry_agrees_with_cmake() -> None:
    entry = json.loads((ROOT / "docs" / "SemiSAMO1.json").read_text(encoding="utf-8"))
    category = re.search(r'set\(EXTENSION_CATEGORY "([^"]+)"\)', TOP)
    depends = re.search(r'set\(EXTENSION_DEPENDS "([^"]+)"\)', TOP)
    assert category is not None and depends is not None
    wanted = [] if depends[1] == "NA" else depends[1].split()
    assert (entry["category"], entry["build_dependencies"]) == (category[1], wanted)


def test_the_icon_is_128_by_128() -> None:
    from PIL import Image

    assert Image.open(RESOURCES / "Icons" / "SemiSAMO1.png").size == (128, 128)


def test_the_workers_requirements_are_the_core_without_torch() -> None:
    core = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    lines = (RESOURCES / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [one for one in lines if not one.startswith("#")] == [one for one in core if not one.startswith("torch")]


def test_an_environment_of_its_own_can_export_dicom_and_slicers_python_is_left_alone() -> None:
    from SemiSAMO1Lib.job.environment import DICOM, installing

    export = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert export["export"] == [DICOM]
    assert DICOM in installing("python", RESOURCES / "requirements.txt", RESOURCES / "constraints.txt")[-1].arguments
    assert "dicom" not in (RESOURCES / "requirements.txt").read_text(encoding="utf-8")


def test_every_package_that_exporting_dicom_needs_has_a_tested_version() -> None:
    """Set-up pins what it installs; a package without a line would come in whatever version is newest."""
    pinned = {
        line.partition("==")[0].lower() for line in (RESOURCES / "constraints.txt").read_text(encoding="utf-8").split()
    }
    assert set(_needed_by("highdicom")) <= {one.replace("_", "-") for one in pinned}


def _needed_by(package: str) -> list[str]:
    """A package and all that it needs here, by their names in lower case."""
    found, left = [], [package]
    while left:
        name = left.pop()
        found.append(name)
        needs = [Requirement(one) for one in metadata.requires(name) or ()]
        names = [one.name.lower() for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
        left += [one for one in names if one not in found and one not in left]
    return found


def test_the_workers_constraints_are_the_tested_versions() -> None:
    tested = set((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    assert set((RESOURCES / "constraints.txt").read_text(encoding="utf-8").split()) <= tested


def test_torch_is_among_the_workers_constraints() -> None:
    from SemiSAMO1Lib.job.environment import TORCH

    assert TORCH in (RESOURCES / "constraints.txt").read_text(encoding="utf-8").split()


def test_the_sample_is_small() -> None:
    assert (RESOURCES / "Sample" / "phantoms.zip").stat().st_size <= 5 << 20


def test_the_sample_knows_nothing_of_the_computer_that_made_it() -> None:
    with zipfile.ZipFile(RESOURCES / "Sample" / "phantoms.zip") as archive:
        texts = {
            n: archive.read(n).decode("utf-8") for n in archive.namelist() if n.endswith((".json", ".jsonl", ".html"))
        }
    wrong = [name for name, text in texts.items() if re.search(r"(/tmp/|/root/|/home/|/work/|/usr/)", text)]
    assert wrong == []


def test_every_text_of_the_panel_can_be_translated() -> None:
    """Literal texts given to widgets go through _()."""
    found = []
    for path in (ROOT / "SemiSAMO1Lib" / "panel").glob("*_step.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if re.search(r'(\.text = |banner\.show\(|explain\([^)]*\[)"[A-Z]', line):
                found.append(f"{path.name}:{number}")
    assert found == []


def test_the_module_file_compiles_for_the_oldest_slicer_supported() -> None:
    """Slicer 5.10 has Python 3.12; the worker's Python is 3.11 at least."""
    assert sys.version_info >= (3, 11)
    compile((ROOT / "SemiSAMO1" / "SemiSAMO1.py").read_text(encoding="utf-8"), "SemiSAMO1.py", "exec")
