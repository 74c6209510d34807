"""What was decided about each case, as reviews.jsonl tells it; decisions that were taken back are left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from .began import Began
from .cases import Case, Review, Role
from .store import Project

#: Stands for all labels together in decisions that an older program wrote.
ALL_TOGETHER = 0


@dataclass(frozen=True, eq=False)
class Decision:
    """One line of reviews.jsonl; what it teaches is remembered by it (`results.py`).

    Attributes:
        case, reviewer, time: which, who, when.
        training: whose prediction was seen; None for a decision without one.
        prediction: sha256 of its file; empty where an older program did not write it down.
        before, after: review states.
        role_before, label_before: what undo restores.
        label: label version in force afterwards.
        dice: label value -> Dice between the prediction that was seen and the label that was saved; empty without one.
        signals: label value -> the signals of quality that the prediction had.
        added: label values that it brought into the label table.
    """

    case: str
    reviewer: str
    time: str
    training: str | None
    before: Review
    after: Review
    role_before: Role
    label_before: int | None
    label: int | None
    dice: Mapping[int, float]
    signals: Mapping[int, Mapping[str, float | None]]
    added: tuple[int, ...] = ()
    prediction: str = ""

    @property
    def began(self) -> Began:
        """The prediction that was seen."""
        return Began(self.training or "", self.prediction)

    @property
    def mean_dice(self) -> float | None:
        """Mean over the labels; None where no label was saved."""
        return sum(self.dice.values()) / len(self.dice) if self.dice else None


@dataclass(frozen=True)
class _History:
    """What a reviews.jsonl of this size and time says, and how many of its lines say nothing.

    `left_out`: who left a case out, and when. `read`: all of the file, if its last line is whole.
    """

    stamp: tuple[int, int]
    decisions: dict[str, list[Decision]] = field(default_factory=dict)
    unreadable: int = 0
    left_out: dict[str, tuple[str, str]] = field(default_factory=dict)
    read: bytes = b""


#: Project -> its history as it was last read.
_KNOWN: WeakKeyDictionary[Project, _History] = WeakKeyDictionary()


def decisions(project: Project) -> Mapping[str, Sequence[Decision]]:
    """Case id -> its decisions in force, oldest first; an unchanged file is not read twice."""
    return _history(project).decisions


def decided_by(project: Project, case: Case) -> str:
    """` by NAME, TIME` of what a case's state says, for a sentence; empty where nobody decided, or it is not known."""
    made = decisions(project).get(case.id, ())
    known = bool(made) and made[-1].after == case.review
    return _by(made[-1].reviewer, made[-1].time) if known else ""


def left_out_by(project: Project, case: Case) -> str:
    """The same of a case that was left out."""
    found = _history(project).left_out.get(case.id)
    return _by(*found) if found is not None else ""


def _by(who: str, when: str) -> str:
    return f" by {who}, {when[:16].replace('T', ' ')}"


def seen_to_saved(project: Project, case: Case) -> Mapping[int, float]:
    """Label value -> Dice between the prediction that a person saw and the case's label in force; empty without."""
    saved = [one for one in decisions(project).get(case.id, ()) if one.label == case.label_version and one.dice]
    return {value: one for value, one in saved[-1].dice.items() if value != ALL_TOGETHER} if saved else {}


def unreadable_lines(project: Project) -> int:
    """Lines of reviews.jsonl that cannot be read: torn by a crash, or of another program. The others hold."""
    return _history(project).unreadable


def _history(project: Project) -> _History:
    try:
        found = project.reviews.stat()
    except OSError:
        return _History((0, 0))
    stamp = found.st_size, found.st_mtime_ns
    known = _KNOWN.get(project)
    if known is None or known.stamp != stamp:
        known = _KNOWN[project] = _read(project.reviews, stamp, known or _History(stamp))
    return known


def _read(path: Path, stamp: tuple[int, int], known: _History) -> _History:
    """Read the file; of one that only grew, the new lines."""
    data = path.read_bytes()
    if not known.read or not data.startswith(known.read):
        known = _History(stamp)
    found = {case: list(made) for case, made in known.decisions.items()}
    left_out, unreadable = dict(known.left_out), known.unreadable
    for text in data[len(known.read) :].decode("utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            if "left_out" in line:  # no decision about a prediction
                left_out.pop(line["case"], None)
                if line["left_out"]:
                    left_out[line["case"]] = (line["reviewer"], line["time"])
                continue
            mine = found.setdefault(line["case"], [])
            if not line.get("undo"):
                mine.append(_decision(line))
            elif mine:
                mine.pop()
        except (KeyError, TypeError, ValueError, AttributeError):
            unreadable += 1
    if not data.endswith(b"\n"):  # the next line mends this one: all is read once more then
        return _History(stamp, found, unreadable, left_out)
    return _History(stamp, found, unreadable, left_out, data)


def _decision(line: dict[str, Any]) -> Decision:
    dice = {int(value): float(one) for value, one in line.get("dice", {}).items()}
    if not dice and line.get("dice_seen_to_saved") is not None:  # an older program noted all labels together
        dice = {ALL_TOGETHER: float(line["dice_seen_to_saved"])}
    if not dice and line["after"] == Review.ACCEPTED:
        dice = {ALL_TOGETHER: 1.0}
    return Decision(
        case=line["case"],
        reviewer=line["reviewer"],
        time=line["time"],
        training=line.get("training"),
        before=Review(line["before"]),
        after=Review(line["after"]),
        role_before=Role(line["role_before"]),
        label_before=line["label_before"],
        label=line["label"],
        dice=dice,
        signals={int(value): signals for value, signals in line.get("signals", {}).items()},
        added=tuple(line.get("added", ())),
        prediction=line.get("prediction") or "",
    )
