"""What was decided about each case, as reviews.jsonl tells it; decisions that were taken back are left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .cases import Role
from .store import Project

#: Stands for all labels together in decisions that an older program wrote.
ALL_TOGETHER = 0


@dataclass(frozen=True)
class Decision:
    """One line of reviews.jsonl.

    Attributes:
        case, reviewer, time: which, who, when.
        training: whose prediction was seen; None for a decision without one.
        before, after: review states.
        role_before, label_before: what undo restores.
        label: label version in force afterwards.
        dice: label value -> Dice between the prediction that was seen and the label that was saved; empty without one.
        signs: label value -> the signs of quality that the prediction had.
    """

    case: str
    reviewer: str
    time: str
    training: str | None
    before: str
    after: str
    role_before: Role
    label_before: int | None
    label: int | None
    dice: Mapping[int, float]
    signs: Mapping[int, Mapping[str, float | None]]

    @property
    def mean_dice(self) -> float | None:
        """Mean over the labels; None where no label was saved."""
        return sum(self.dice.values()) / len(self.dice) if self.dice else None


def decisions(project: Project) -> dict[str, list[Decision]]:
    """Case id -> its decisions in force, oldest first."""
    found: dict[str, list[Decision]] = {}
    for line in _lines(project):
        try:
            mine = found.setdefault(line["case"], [])
            if not line.get("undo"):
                mine.append(_decision(line))
            elif mine:
                mine.pop()
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # a line of another program, or a damaged one: the other decisions still hold
    return found


def _lines(project: Project) -> Iterator[dict[str, Any]]:
    """The lines of reviews.jsonl that can be read; one that was torn by a crash does not hide the others."""
    try:
        text = project.reviews.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _decision(line: dict[str, Any]) -> Decision:
    dice = {int(value): float(one) for value, one in line.get("dice", {}).items()}
    if not dice and line.get("dice_seen_to_saved") is not None:  # an older program noted all labels together
        dice = {ALL_TOGETHER: float(line["dice_seen_to_saved"])}
    if not dice and line["after"] == "accepted":
        dice = {ALL_TOGETHER: 1.0}
    return Decision(
        case=line["case"],
        reviewer=line["reviewer"],
        time=line["time"],
        training=line.get("training"),
        before=line["before"],
        after=line["after"],
        role_before=Role(line["role_before"]),
        label_before=line["label_before"],
        label=line["label"],
        dice=dice,
        signs={int(value): signs for value, signs in line.get("signs", {}).items()},
    )
