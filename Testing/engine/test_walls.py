"""The walls of the house, each in a fresh interpreter: who may import what."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Imports every module of a package, then prints the top names and the library's own modules that were imported.
_IMPORT_ALL = """
import importlib, json, pkgutil, sys
package = importlib.import_module({package!r})
for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(found.name)
print(json.dumps(sorted(sys.modules)))
"""

#: What may be there besides the standard library: the interpreter's own start-up hooks of an environment.
_HARMLESS = {"SemiSAMO1Lib", "__editable___semisamo1_0_1_0_finder", "_distutils_hack", "_virtualenv"}


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False, **options
    )


@pytest.fixture(scope="module")
def imported():
    """Package -> names in sys.modules after importing all of it."""
    known = {}

    def of(package):
        if package not in known:
            done = python("-c", _IMPORT_ALL.format(package=package))
            assert done.returncode == 0, done.stderr
            known[package] = json.loads(done.stdout.splitlines()[-1])
        return known[package]

    return of


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("SemiSAMO1Lib.project", "torch"),
        ("SemiSAMO1Lib.project", "monai"),
        ("SemiSAMO1Lib.project", "slicer"),
        ("SemiSAMO1Lib.project", "qt"),
        ("SemiSAMO1Lib.project", "SemiSAMO1Lib.engine"),
        ("SemiSAMO1Lib.job", "torch"),
        ("SemiSAMO1Lib.job", "slicer"),
        ("SemiSAMO1Lib.job", "qt"),
        ("SemiSAMO1Lib.job", "numpy"),
        ("SemiSAMO1Lib.job", "SimpleITK"),
        ("SemiSAMO1Lib.job", "SemiSAMO1Lib.engine"),
        ("SemiSAMO1Lib.engine", "slicer"),
        ("SemiSAMO1Lib.engine", "qt"),
        ("SemiSAMO1Lib.engine", "vtk"),
        ("SemiSAMO1Lib.engine", "SemiSAMO1Lib.job"),
        ("SemiSAMO1Lib.engine", "SemiSAMO1Lib.project"),
    ],
)
def test_wall(imported, package, forbidden):
    through = [name for name in imported(package) if name == forbidden or name.startswith(forbidden + ".")]
    assert not through, f"{package} imports {forbidden}"


#: Imports every module of the Slicer side on the slicer-core wheel, with Qt as in Slicer where it is asked for.
_IN_SLICER = """
import sys
sys.path.insert(0, {testing!r})
from slicer_harness import {harness}
{harness}.boot()
"""


@pytest.mark.parametrize(
    ("package", "harness", "forbidden"),
    [
        ("SemiSAMO1Lib.scene", "application", "qt"),
        ("SemiSAMO1Lib.scene", "application", "torch"),
        ("SemiSAMO1Lib.scene", "application", "SemiSAMO1Lib.engine"),
        ("SemiSAMO1Lib.panel", "module", "torch"),
        ("SemiSAMO1Lib.panel", "module", "scipy"),
        ("SemiSAMO1Lib.panel", "module", "SemiSAMO1Lib.engine"),
        ("SemiSAMO1Lib.panel", "module", "SemiSAMO1Lib.tasks"),
    ],
)
def test_wall_on_slicers_side(package, harness, forbidden):
    prelude = _IN_SLICER.format(testing=str(ROOT / "Testing"), harness=harness)
    done = python("-c", prelude + _IMPORT_ALL.format(package=package))
    assert done.returncode == 0, done.stderr
    through = [n for n in json.loads(done.stdout.splitlines()[-1]) if n == forbidden or n.startswith(forbidden + ".")]
    assert not through, f"{package} imports {forbidden}"


def test_job_needs_the_standard_library_only(imported):
    tops = {name.partition(".")[0] for name in imported("SemiSAMO1Lib.job")}
    foreign = {n for n in tops - set(sys.stdlib_module_names) - _HARMLESS if not n.startswith("__")}
    started = json.loads(python("-c", "import json, sys; print(json.dumps(sorted(sys.modules)))").stdout)
    before = {name.partition(".")[0] for name in started}
    assert not foreign - before, f"SemiSAMO1Lib.job imports {sorted(foreign - before)}"


def test_project_and_job_import_without_site_packages_where_they_promise():
    """`job` on an interpreter that has nothing installed."""
    done = python("-S", "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import SemiSAMO1Lib.job")
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- the doctor

WORKER = str(ROOT / "SemiSAMO1Lib" / "worker.py")

#: Every import of a package that is not in the standard library fails, in the way that is asked for.
_BLOCKED = """
import runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top != "SemiSAMO1Lib" and top not in sys.stdlib_module_names:
            raise {error}
sys.meta_path.insert(0, Finder())
sys.argv = ["worker.py", "--doctor"]
runpy.run_path({worker!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def bare():
    """The doctor on an interpreter without any installed package."""
    return python("-S", "-I", WORKER, "--doctor")


def test_doctor_needs_nothing_but_the_standard_library(bare):
    assert bare.returncode == 0, bare.stderr


def test_doctor_prints_json_without_packages(bare):
    assert json.loads(bare.stdout)["ready"] is False, "without torch the worker is not ready"


def test_doctor_names_what_is_missing(bare):
    missing = {row["package"] for row in json.loads(bare.stdout)["missing"]}
    assert {"torch", "numpy", "SimpleITK", "monai"} <= missing, f"named as missing: {sorted(missing)}"


def test_doctor_says_how_to_get_it(bare):
    assert all("pip install" in row["get"] for row in json.loads(bare.stdout)["missing"]), "no way to get a package"


@pytest.mark.parametrize(
    "error",
    ["ImportError('no')", "OSError('DLL load failed')", "RuntimeError('another numpy')", "AttributeError('x')"],
)
def test_doctor_survives_broken_packages(error):
    done = python("-c", _BLOCKED.format(error=error, worker=WORKER))
    assert done.returncode == 0 and json.loads(done.stdout)["ready"] is False, done.stderr


def test_doctor_tells_the_reason_of_a_broken_package():
    done = python("-c", _BLOCKED.format(error="OSError('DLL load failed')", worker=WORKER))
    assert "DLL load failed" in json.loads(done.stdout)["packages"]["torch"]["error"], done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps a current folder from being deleted")
def test_doctor_prints_json_where_the_current_folder_is_gone(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        f"import os, runpy, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); "
        f"sys.argv = ['w', '--doctor']; runpy.run_path({WORKER!r}, run_name='__main__')"
    )
    done = python("-S", "-I", "-c", code)
    assert done.returncode == 0 and "packages" in json.loads(done.stdout or "{}"), done.stderr[-300:]


def test_worker_without_arguments_says_how_it_is_used():
    done = python("-S", "-I", WORKER)
    assert done.returncode == 2 and "JOBFOLDER" in done.stderr, done.stderr


# ---------------------------------------------------------------------- one door to image files


@pytest.mark.parametrize("name", ["ReadImage(", "WriteImage(", "ImageSeriesReader("])
def test_image_files_go_through_one_door(name):
    """Readers and writers of SimpleITK appear in image_io.py alone."""
    found = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "SemiSAMO1Lib").rglob("*.py")
        if path.name != "image_io.py" and name in path.read_text(encoding="utf-8")
    ]
    assert not found, f"{name} outside image_io.py: {found}"
