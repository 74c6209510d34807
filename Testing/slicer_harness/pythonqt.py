"""PySide6 made to behave as PythonQt does in Slicer: modules `qt` and `ctk`, for tests.

What is emulated, each after PythonQt's sources (PythonQtInstanceWrapper.cpp getattro/setattro, PythonQtSignal.cpp,
PythonQtSignalTarget::call):

- a Qt property is an attribute: `button.text`, `button.enabled = False`; set methods (`setText`) stay callable;
- a virtual method that Qt itself calls back stays a method (`sizeHint`);
- `object.connect("signal(args)", function)`, the signature checked; a function gets as many arguments as it takes;
- assigning an attribute that the C++ class does not have is an error; so is reading one;
- `exec_()`, `.name`, `className()`.

What is refused because PythonQt has none of it: attributes of our own on Qt objects, signals with a wrong signature.
PySide6 6.12 crashes on Python 3.11 ("deallocating None"), so it is pinned below.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import types
from collections.abc import Callable
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

import shiboken6
from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets

#: Called back by Qt itself: they must stay methods.
_VIRTUAL = {"sizeHint", "minimumSizeHint"}

#: Classes of stand-ins are strict too.
STAND_INS = "slicer_harness.widgets"

_connections: dict[tuple[int, str], list[tuple[Any, Any]]] = {}


def install() -> QtWidgets.QApplication:
    """Make the application, patch PySide6 once, publish `qt`. Returns the application."""
    application = QtWidgets.QApplication.instance() or QtWidgets.QApplication(["Slicer"])
    if "qt" not in sys.modules:
        _patch()
        qt = types.ModuleType("qt")
        for module in (QtCore, QtGui, QtWidgets):
            names = [name for name in dir(module) if not name.startswith("__")]
            qt.__dict__.update({name: getattr(module, name) for name in names})
        qt.QUiLoader = QtUiTools.QUiLoader
        sys.modules["qt"] = qt
        QtCore.QSettings.setDefaultFormat(QtCore.QSettings.Format.IniFormat)
        application.setOrganizationName("NA-MIC")
        application.setApplicationName("Slicer")
    return application


def _patch() -> None:
    classes: set[type] = set()
    for module in (QtCore, QtGui, QtWidgets):
        members = [getattr(module, name) for name in dir(module)]
        classes |= {one for one in members if isinstance(one, type) and issubclass(one, QtCore.QObject)}
    for one in sorted(classes, key=lambda c: len(c.__mro__)):
        _properties_as_attributes(one)
    for one in classes:  # PySide serves connect from __getattribute__ of a few classes
        if "__getattribute__" in one.__dict__:
            one.__getattribute__ = _with_connect(one.__getattribute__)
        if "__setattr__" in one.__dict__:
            one.__setattr__ = _strict_set
    root = QtCore.QObject
    root.__getattr__ = _missing
    root.name = property(lambda self: self.property("objectName"), lambda self, v: self.setProperty("objectName", v))
    root.className = lambda self: self.metaObject().className()
    for one in (QtWidgets.QDialog, QtWidgets.QMenu, QtCore.QEventLoop):
        if not hasattr(one, "exec_"):
            one.exec_ = one.exec


def _properties_as_attributes(one: type) -> None:
    meta = one.staticMetaObject
    for number in range(meta.propertyOffset(), meta.propertyCount()):
        described = meta.property(number)
        name = described.name()
        original = next((base.__dict__[name] for base in one.__mro__ if name in base.__dict__), None)
        if name in _VIRTUAL or isinstance(original, (property, staticmethod, types.BuiltinFunctionType)):
            continue  # for example QTimer.singleShot, which is static
        reads = original if callable(original) and not isinstance(original, QtCore.Signal) else None
        setattr(one, name, _attribute(name, reads, described.isWritable(), described.typeName() == "bool"))


def _attribute(name: str, reads: Callable[[Any], Any] | None, writable: bool, is_bool: bool) -> property:
    def get(self: Any) -> Any:
        return reads(self) if reads is not None else self.property(name)

    def put(self: Any, value: Any) -> None:
        if not self.setProperty(name, bool(value) if is_bool else value):
            raise TypeError(f"cannot set {type(self).__name__}.{name} = {value!r}")

    return property(get, put if writable else None)


def _with_connect(original: Callable[..., Any]) -> Callable[[Any, str], Any]:
    def get(self: Any, name: str) -> Any:
        if name == "connect":
            return functools.partial(_connect, self)
        if name == "disconnect":
            return functools.partial(_disconnect, self)
        return original(self, name)

    return get


def _signal_of(source: Any, signature: str) -> tuple[Any, int]:
    """The signal with exactly this signature, and how many arguments it has."""
    name, _, rest = signature.partition("(")
    signal = getattr(source, name, None)
    if signal is None or not hasattr(signal, "connect"):
        raise ValueError(f"{type(source).__name__} has no signal {signature!r}")
    asked = [
        word.replace("const ", "").replace("&", "").strip() for word in rest.rstrip(")").split(",") if word.strip()
    ]
    meta = source.metaObject()
    there = [bytes(meta.method(n).methodSignature()).decode() for n in range(meta.methodCount())]
    mine = [text[len(name) + 1 : -1] for text in there if text.startswith(f"{name}(")]
    wildcard = [text for text in mine if "PyObject" in text and text.count(",") + 1 == len(asked)]
    if ",".join(asked) not in mine and not wildcard:
        raise ValueError(f"{type(source).__name__} has no signal {signature!r}; it has {name}({'), ('.join(mine)})")
    if len(mine) > 1 and asked:
        signal = signal[",".join(asked)]
    return signal, len(asked)


def _takes(function: Any) -> int | None:
    """How many arguments a function takes; None for any number."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(one.kind == one.VAR_POSITIONAL for one in parameters):
        return None
    return sum(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters)


def _connect(self: Any, signature: str, function: Any, method: str | None = None) -> bool:
    signal, count = _signal_of(self, signature)
    if method is not None:
        function = getattr(function, method.partition("(")[0])
    taken = _takes(function)
    used = count if taken is None else min(count, taken)

    def slot(*values: Any) -> None:
        function(*values[:used])

    _connections.setdefault((id(self), signature), []).append((function, slot))
    signal.connect(slot)
    return True


def _disconnect(self: Any, signature: str, function: Any) -> bool:
    signal, _ = _signal_of(self, signature)
    links = _connections.get((id(self), signature), [])
    for link in links:
        if link[0] == function:
            signal.disconnect(link[1])
            links.remove(link)
            return True
    return False


def _missing(self: Any, name: str) -> Any:
    """An enum value, a dynamic property, then a child of that name, as in PythonQtInstanceWrapper_getattro."""
    if not name.startswith("_") and shiboken6.isValid(self):
        value = getattr(type(self), name, None) if name[:1].isupper() else None
        value = self.property(name) if value is None else value
        if value is None:
            value = self.findChild(QtCore.QObject, name, QtCore.Qt.FindChildOption.FindDirectChildrenOnly)
        if value is not None:
            return value
    raise AttributeError(f"{type(self).__name__} has no attribute named '{name}'")


def _strict_set(self: Any, name: str, value: Any) -> None:
    kind = type(self)
    strict = kind.__module__.startswith(("PySide6.", STAND_INS)) and not name.startswith("_")
    if strict and not hasattr(kind, name) and name not in getattr(self, "__dict__", ()):
        if self.property(name) is None:
            raise AttributeError(f"'{name}' does not exist on {kind.__name__}; C++ objects take no new attributes")
        self.setProperty(name, value)
        return
    described = inspect.getattr_static(kind, name, None)
    if isinstance(described, QtCore.Property):  # not a data descriptor for the base's __setattr__
        described.fset(self, value)
    else:
        shiboken6.Shiboken.Object.__setattr__(self, name, value)
