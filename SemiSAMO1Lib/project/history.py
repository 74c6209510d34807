"""What was decided about each case, as reviews.jsonl tells it; decisions that were taken back are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import files
from .cases import Role
from .store import Project


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
    lines, _ = files.read_lines(project.reviews)
    found: dict[str, list[Decision]] = {}
    for line in lines:
        mine = found.setdefault(line["case"], [])
        if not line.get("undo"):
            mine.append(_decision(line))
        elif mine:
            mine.pop()
    return found


def _decision(line: dict[str, Any]) -> Decision:
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
        dice={int(value): dice for value, dice in line.get("dice", {}).items()},
        signs={int(value): signs for value, signs in line.get("signs", {}).items()},
    )
