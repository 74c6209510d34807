"""Set-up: three ways, by real processes; what fails is said with its last line, and nothing is fetched unasked."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import slicer
from panel_helpers import Answers, wait

from SemiSAMO1Lib.job import environment
from SemiSAMO1Lib.job.environment import Command, NoPython

FILES = Path("requirements.txt"), Path("constraints.txt")


def found(*names: str):
    """A computer that has these programs."""
    return lambda name: f"/bin/{name}" if name in names else None


class TestCommands:
    def test_torch_comes_before_everything_else(self, tmp_path: Path) -> None:
        steps = environment.building(tmp_path / "env", *FILES, which=found("python3.12"))
        assert [("torch==2.13.0" in one.arguments) for one in steps] == [False, True, False]

    def test_every_package_is_held_to_the_tested_versions(self, tmp_path: Path) -> None:
        steps = environment.building(tmp_path / "env", *FILES, which=found("python3.12"))
        assert all("--constraint" in one.arguments for one in steps[1:])

    def test_without_a_python_uv_makes_one(self, tmp_path: Path) -> None:
        steps = environment.building(tmp_path / "env", *FILES, which=found("uv"))
        assert steps[0].arguments[:2] == ("/bin/uv", "venv") and "--seed" in steps[0].arguments

    def test_every_python_that_is_found_is_tried_and_then_uv(self, tmp_path: Path) -> None:
        make = environment.building(tmp_path / "env", *FILES, which=found("python3.12", "python3.11", "uv"))[0]
        tried = [make.arguments[0], *(one[0] for one in make.otherwise)]
        assert tried == ["/bin/python3.12", "/bin/python3.11", "/bin/uv"]

    def test_without_python_and_uv_it_says_what_to_install(self, tmp_path: Path) -> None:
        with pytest.raises(NoPython, match=r"python\.org"):
            environment.building(tmp_path / "env", *FILES, which=found())

    def test_an_old_python_is_not_taken(self, tmp_path: Path) -> None:
        with pytest.raises(NoPython):
            environment.building(tmp_path / "env", *FILES, which=found("python3.9", "python3.10"))

    def test_offline_nothing_is_asked_of_the_network(self, tmp_path: Path) -> None:
        steps = environment.installing("python", *FILES, wheels=tmp_path)
        assert all({"--no-index", "--find-links", str(tmp_path)} <= set(one.arguments) for one in steps)

    def test_the_application_is_not_taken_for_a_python(self, tmp_path: Path) -> None:
        """Slicer may call itself sys.executable: started as a worker it would be a second Slicer."""
        application = tmp_path / "bin" / "SlicerApp-real"
        assert environment.this_python(str(application), found("PythonSlicer")) == Path("/bin/PythonSlicer")

    def test_pythonslicer_beside_the_application_is_found(self, tmp_path: Path) -> None:
        (tmp_path / "Contents" / "bin").mkdir(parents=True)
        launcher = script(tmp_path / "Contents" / "bin" / "PythonSlicer", "")
        application = str(tmp_path / "Contents" / "MacOS" / "Slicer")
        assert environment.this_python(application) == launcher

    def test_without_it_no_second_slicer_is_started(self, tmp_path: Path) -> None:
        with pytest.raises(NoPython, match="PythonSlicer"):
            environment.this_python(str(tmp_path / "bin" / "SlicerApp-real"), found())

    def test_a_python_is_its_own(self) -> None:
        assert environment.this_python() == Path(sys.executable)

    def test_another_python_sees_nothing_of_slicers(self) -> None:
        leaking = {"PYTHONHOME": "/slicer", "LD_LIBRARY_PATH": "/slicer/lib", "PATH": "/bin"}
        kept = environment.clean(leaking, "/other/python", "/slicer/bin/PythonSlicer")
        assert "PYTHONHOME" not in kept and "LD_LIBRARY_PATH" not in kept and kept["PATH"] == "/bin"

    def test_slicers_own_python_keeps_what_it_needs(self) -> None:
        kept = environment.clean({"LD_LIBRARY_PATH": "/slicer/lib"}, "/slicer/python", "/slicer/python")
        assert kept["LD_LIBRARY_PATH"] == "/slicer/lib"


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def setup_section(widget: Any) -> Any:
    """The section's module, as the panel imported it."""
    return sys.modules["SemiSAMO1Lib.panel.setup_section"]


@pytest.fixture
def setup(widget: Any) -> Any:
    """The section of a panel that was never set up, its questions answered with the first answer."""
    panel = widget.panel
    panel.dialogs = panel.setup._dialogs = Answers()
    return panel.setup


def test_on_windows_with_an_nvidia_gpu_torch_comes_with_cuda() -> None:
    steps = environment.installing("python", *FILES, which=found("nvidia-smi"), platform="win32")
    assert environment.CUDA_WHEELS in steps[0].arguments and environment.CUDA_WHEELS not in steps[1].arguments


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_sizes_are_said_for_every_system(platform: str) -> None:
    assert "GB to download" in environment.sizes(platform)


class TestSection:
    def test_it_is_open_before_set_up(self, setup: Any, ui: Any) -> None:
        assert not ui.setupSection.collapsed and "Review works without" in ui.setupStatusLabel.text

    def test_another_python_must_be_named(self, setup: Any, ui: Any) -> None:
        ui.setupWayBox.setCurrentIndex(ui.setupWayBox.findData("other"))
        assert not ui.setupButton.enabled and "Name the Python" in ui.setupButton.toolTip

    def test_a_python_that_works_is_taken(self, setup: Any, ui: Any, widget: Any) -> None:
        """The real probe, in this very Python: numpy, torch, a 3D convolution."""
        ui.setupWayBox.setCurrentIndex(ui.setupWayBox.findData("other"))
        ui.setupPythonEdit.currentPath = sys.executable
        ui.setupButton.click()
        wait(widget.panel, lambda: not setup.running, "the probe")
        assert setup.ready and ui.setupStatusLabel.text.startswith("Ready: PyTorch 2."), ui.setupLog.toPlainText()

    def test_when_it_is_ready_it_folds_itself_away(self, setup: Any, ui: Any, widget: Any) -> None:
        self.test_a_python_that_works_is_taken(setup, ui, widget)
        assert ui.setupSection.collapsed

    def test_a_python_without_torch_says_so(self, setup: Any, ui: Any, widget: Any, tmp_path: Path) -> None:
        bare = script(tmp_path / "bare", f'exec "{sys.executable}" -S -I "$@"')
        ui.setupWayBox.setCurrentIndex(ui.setupWayBox.findData("other"))
        ui.setupPythonEdit.currentPath = str(bare)
        ui.setupButton.click()
        wait(widget.panel, lambda: not setup.running, "the probe")
        assert not setup.ready and "torch" in ui.setupStatusLabel.text

    def test_a_program_that_is_no_python_says_so(self, setup: Any, ui: Any, widget: Any, tmp_path: Path) -> None:
        setup.run([environment.probing(str(script(tmp_path / "no", "echo hello")))])
        wait(widget.panel, lambda: not setup.running, "the probe")
        assert "gave no answer" in ui.setupStatusLabel.text

    def test_a_program_that_cannot_start_says_so(self, setup: Any, ui: Any, widget: Any) -> None:
        setup.run([Command("trying", ("/does/not/exist", "--probe"))])
        wait(widget.panel, lambda: not setup.running, "the end")
        assert "could not be started" in ui.setupStatusLabel.text

    def test_a_step_that_fails_ends_with_its_last_line(self, setup: Any, ui: Any, widget: Any, tmp_path: Path) -> None:
        bad = script(tmp_path / "pip", "echo looking; echo 'SSL: certificate verify failed'; exit 1")
        setup.run([Command("installing PyTorch", (str(bad),)), environment.probing(sys.executable)])
        wait(widget.panel, lambda: not setup.running, "the end")
        assert ui.setupStatusLabel.text == "installing PyTorch failed: SSL: certificate verify failed"

    def test_a_python_that_does_not_work_is_passed_over(self, setup: Any, ui: Any, widget: Any, tmp_path: Path) -> None:
        """A manager of versions leaves names for Pythons that are not switched on."""
        shim = script(tmp_path / "python3.12", "echo 'python3.12: command not found'; exit 127")
        good = script(tmp_path / "python3.11", "exit 0")
        tried = Command("making an environment", ("/does/not/exist",), ((str(shim),), (str(good),)))
        setup.run([tried, environment.probing(sys.executable, "cpu")])
        wait(widget.panel, lambda: not setup.running, "the probe")
        assert setup.ready, ui.setupLog.toPlainText()

    def test_output_is_shown_while_it_runs(self, setup: Any, ui: Any, widget: Any, tmp_path: Path) -> None:
        slow = script(tmp_path / "slow", "echo collecting torch; sleep 30")
        setup.run([Command("installing PyTorch", (str(slow),)), environment.probing(sys.executable)])
        wait(widget.panel, lambda: "collecting torch" in ui.setupLog.toPlainText(), "the output")
        assert setup.running
        setup.cancel()

    def test_cancel_stops_it_for_now(self, setup: Any, ui: Any, widget: Any, tmp_path: Path) -> None:
        slow = script(tmp_path / "slow", "sleep 30")
        setup.run([Command("installing PyTorch", (str(slow),)), environment.probing(sys.executable)])
        ui.setupCancelButton.click()
        wait(widget.panel, lambda: not setup.running, "the end")
        assert "cancelled" in ui.setupStatusLabel.text and ui.setupButton.enabled

    def test_nothing_is_installed_without_a_yes(self, setup: Any, ui: Any, widget: Any) -> None:
        setup._dialogs.answer = 1
        ui.setupButton.click()
        assert not setup.running and "GB" in setup._dialogs.asked[0]

    def test_a_python_that_was_removed_is_not_ready_any_more(self, setup: Any, widget: Any, tmp_path: Path) -> None:
        setup._settings.put("probe", {"ok": True, "executable": str(tmp_path / "gone")})
        assert not setup.ready

    def test_on_a_mac_slicers_python_is_not_offered(self, loaded: Any, app: Any) -> None:
        from slicer_harness import module

        app.os = "macosx"
        one = module.open_widget(loaded)
        ways = [one.ui.setupWayBox.itemData(n) for n in range(one.ui.setupWayBox.count)]
        one.exit()
        one.cleanup()
        assert ways == ["own", "other"]


class TestSlicersPython:
    """The way into Slicer's own Python, with stand-ins for what only the application has."""

    @pytest.fixture
    def calls(self, setup_section: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """What was asked of the PyTorch extension, slicer.packaging and pip_install."""
        made: list[Any] = []

        class PyTorchUtilsLogic:
            def torchInstalled(self) -> bool:
                return False

            def installTorch(self, askConfirmation: bool) -> str:
                made.append(("torch", askConfirmation))
                return "torch"

        extension = types.SimpleNamespace(PyTorchUtilsLogic=PyTorchUtilsLogic)
        monkeypatch.setitem(sys.modules, "PyTorchUtils", extension)
        monkeypatch.setattr(slicer.util, "pip_install", lambda arguments: made.append(("pip", arguments)))
        monkeypatch.delattr(slicer, "packaging", raising=False)
        return made

    def choose(self, ui: Any) -> None:
        ui.setupWayBox.setCurrentIndex(ui.setupWayBox.findData("slicer"))
        ui.setupButton.click()

    def test_torch_comes_from_its_extension(self, calls: Any, setup: Any, ui: Any, widget: Any) -> None:
        self.choose(ui)
        wait(widget.panel, lambda: not setup.running, "the probe")
        assert [kind for kind, _ in calls] == ["torch", "pip"] and setup.ready, ui.setupLog.toPlainText()

    def test_where_slicer_has_packaging_it_is_used(
        self, calls: Any, setup: Any, ui: Any, widget: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        packaging = types.SimpleNamespace(
            load_requirements=lambda path: Path(path).read_text(encoding="utf-8"),
            pip_ensure=lambda text, requester: calls.append((requester, text)),
        )
        monkeypatch.setattr(slicer, "packaging", packaging, raising=False)
        self.choose(ui)
        wait(widget.panel, lambda: not setup.running, "the probe")
        requester, text = calls[1]
        assert requester == "SemiSAMO1" and "monai>=" in text and "torch>=" not in text

    def test_an_older_slicer_is_asked_for_nothing_before_a_person_agreed(self, calls: Any, setup: Any, ui: Any) -> None:
        setup._dialogs.answer = 1
        self.choose(ui)
        assert [kind for kind, _ in calls] == ["torch"] and "were not installed" in ui.setupStatusLabel.text
        assert "monai>=" in setup._dialogs.asked[-1]

    def test_a_pip_that_fails_is_told_of(
        self, calls: Any, setup: Any, ui: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(_: Any) -> None:
            raise subprocess.CalledProcessError(1, "pip")

        monkeypatch.setattr(slicer.util, "pip_install", fails)
        self.choose(ui)
        assert "non-zero exit status" in ui.setupStatusLabel.text and not setup.running

    def test_the_launcher_is_the_workers_python_not_what_it_calls_itself(
        self, setup: Any, widget: Any, tmp_path: Path
    ) -> None:
        """PythonSlicer starts python-real, which cannot start by itself."""
        launcher = script(tmp_path / "PythonSlicer", f'exec "{sys.executable}" "$@"')
        setup.run([environment.probing(str(launcher), "cpu")])
        wait(widget.panel, lambda: not setup.running, "the probe")
        assert (setup.python, setup.probe["ok"]) == (launcher, True)

    def test_without_the_extension_it_says_how_to_get_it(self, setup: Any, ui: Any) -> None:
        self.choose(ui)
        assert "Extensions Manager" in ui.setupStatusLabel.text and not setup.running


def test_the_probe_reports_a_device_that_is_not_there() -> None:
    from SemiSAMO1Lib.probe import probe

    result = probe("cuda:9")
    assert not result["ok"] and result["error"]


def test_the_probe_prints_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    from SemiSAMO1Lib.probe import print_probe

    assert print_probe("cpu") == 0
    assert json.loads(capsys.readouterr().out)["step_s"] > 0
