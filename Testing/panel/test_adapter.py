"""The harness is honest: what it lets pass PythonQt lets pass, and what the panel uses exists on the real widgets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from slicer_harness import module, widgets

ROOT = Path(__file__).parents[2]
UI = ROOT / "SemiSAMO1" / "Resources" / "UI" / "SemiSAMO1.ui"

#: Class -> what PythonQt can reach on it, from the headers of Slicer 5.12.3 and CTK.
REAL = json.loads((ROOT / "Testing" / "slicer_harness" / "real_api.json").read_text(encoding="utf-8"))

import qt

#: Widget name -> class, as the .ui file has them.
NAMED = {one.get("name"): one.get("class") for one in ElementTree.parse(UI).getroot().iter("widget")}

SOURCES = [*(ROOT / "SemiSAMO1Lib" / "panel").glob("*.py"), ROOT / "SemiSAMO1" / "SemiSAMO1.py"]

#: (widget, member) of every use in the code.
USES = sorted(
    {
        (name, member)
        for path in SOURCES
        for name, member in re.findall(r"(?:\b|_)ui\.(\w+)\.(\w+)", path.read_text(encoding="utf-8"))
    }
)

#: (widget, signal with its arguments) of every connection in the code.
SIGNALS = sorted(
    {
        (name, signal)
        for path in SOURCES
        for name, signal in re.findall(r'(?:\b|_)ui\.(\w+)\.connect\("([^"]+)"', path.read_text(encoding="utf-8"))
    }
)


def members(class_name: str) -> set[str]:
    """What a widget class has in Slicer: the list from the headers, or Qt's own."""
    if class_name in REAL:
        return set(REAL[class_name]) | set(dir(qt.QWidget))
    return set(dir(getattr(qt, class_name)))


@pytest.mark.parametrize(("name", "member"), USES, ids=[f"{n}.{m}" for n, m in USES])
def test_what_the_code_uses_exists_in_slicer(name: str, member: str) -> None:
    assert name in NAMED, f"{name} is not in the .ui file"
    assert member in members(NAMED[name]), f"{NAMED[name]} has no {member}"


@pytest.mark.parametrize(("name", "signal"), SIGNALS, ids=[f"{n} {s}" for n, s in SIGNALS])
def test_signals_that_the_code_connects_exist_in_slicer(name: str, signal: str) -> None:
    assert signal.partition("(")[0] in members(NAMED[name]), f"{NAMED[name]} has no signal {signal}"


@pytest.mark.parametrize("name", sorted(NAMED))
def test_properties_of_the_ui_file_exist_in_slicer(name: str) -> None:
    widget = next(one for one in ElementTree.parse(UI).getroot().iter("widget") if one.get("name") == name)
    geometry = {"minimumSize", "maximumSize"}
    wrong = {one.get("name") for one in widget.findall("property")} - members(NAMED[name]) - geometry
    assert not wrong, f"{NAMED[name]} has no {wrong}"


@pytest.mark.parametrize("name", sorted({*widgets.CTK, *widgets.QMRML}))
def test_a_stand_in_has_nothing_that_the_real_widget_lacks(name: str) -> None:
    stand_in = {**widgets.CTK, **widgets.QMRML}[name]
    own = {member for member in vars(stand_in) if not member.startswith("_") and member != "staticMetaObject"}
    assert own <= members(name), f"surplus: {own - members(name)}"


def test_every_selector_of_nodes_gets_the_scene() -> None:
    root = ElementTree.parse(UI).getroot()
    connected = {one.findtext("receiver") for one in root.iter("connection")}
    selectors = {name for name, kind in NAMED.items() if kind == "qMRMLNodeComboBox"}
    assert selectors == connected


class TestPythonQt:
    """The rules of PythonQt that the adapter keeps."""

    @pytest.fixture
    def button(self) -> Any:
        assert module.QAPPLICATION is not None
        return qt.QPushButton("press")

    def test_a_property_is_an_attribute(self, button: Any) -> None:
        button.text = "other"
        assert button.text == "other"

    def test_a_getter_is_no_method(self, button: Any) -> None:
        with pytest.raises(TypeError, match="not callable"):
            button.text()

    def test_a_set_method_stays(self, button: Any) -> None:
        button.setText("third")
        assert button.text == "third"

    def test_an_attribute_of_our_own_is_refused(self, button: Any) -> None:
        with pytest.raises(AttributeError, match="no new attributes"):
            button.remembered = 1

    def test_a_misspelt_attribute_is_refused(self, button: Any) -> None:
        with pytest.raises(AttributeError, match="enabeld"):
            button.enabeld  # noqa: B018

    def test_a_signal_with_other_arguments_is_refused(self, button: Any) -> None:
        with pytest.raises(ValueError, match=r"no signal 'clicked\(QString\)'"):
            button.connect("clicked(QString)", print)

    def test_a_function_gets_as_many_arguments_as_it_takes(self, button: Any) -> None:
        got: list[tuple[Any, ...]] = []
        button.connect("clicked(bool)", lambda: got.append(()))
        button.connect("clicked(bool)", lambda checked: got.append((checked,)))
        button.click()
        assert got == [(), (False,)]

    def test_a_link_can_be_cut(self, button: Any) -> None:
        got: list[int] = []

        def press() -> None:
            got.append(1)

        button.connect("clicked(bool)", press)
        assert button.disconnect("clicked(bool)", press)
        button.click()
        assert got == []
