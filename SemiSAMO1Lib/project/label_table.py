"""The label table: values are given once and never used again; names and colours are for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

#: Colours given to labels in turn (RGB 0-255), told apart also with the common colour blindnesses.
COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)

#: Values are stored as uint16 at most; 0 is background.
LARGEST_VALUE = 65535


@dataclass(frozen=True)
class Label:
    """One structure: a value that never changes, a name, a colour (RGB 0-255), and what else a newer program wrote.

    `terminology`: category, type, modifier, region and region_modifier, each {scheme, value, meaning}; context and
    region_context, the names of the lists that they were chosen from. What was not chosen is not there.
    """

    value: int
    name: str
    color: tuple[int, int, int] = (128, 174, 128)
    terminology: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.value <= LARGEST_VALUE:
            raise ValueError(f"label value {self.value} ({self.name}): values from 1 to {LARGEST_VALUE} are possible")


@dataclass(frozen=True)
class LabelTable:
    """All labels of a project, by ascending value; `retired` values were given once and taken out again."""

    labels: tuple[Label, ...] = ()
    retired: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        values = self.values
        if len(set(values)) != len(values):
            raise ValueError(f"label values {values} repeat; each is given once")

    def __iter__(self) -> Iterator[Label]:
        return iter(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def values(self) -> list[int]:
        return [label.value for label in self.labels]

    def name_of(self, value: int) -> str:
        return next((label.name for label in self.labels if label.value == value), f"label {value}")

    def with_labels(self, found: Iterable[tuple[int, str]]) -> LabelTable:
        """The table with further values; those it has keep their names and colours."""
        labels = list(self.labels)
        for value, name in sorted(found):
            if value not in self.values:
                labels.append(Label(value, name or f"label {value}", COLOURS[len(labels) % len(COLOURS)]))
        return self._with(labels)

    def without(self, values: Iterable[int]) -> LabelTable:
        """The table without some labels; their values are not given again."""
        gone = set(values) & set(self.values)
        left = tuple(label for label in self.labels if label.value not in gone)
        return LabelTable(left, tuple(sorted({*self.retired, *gone})))

    @property
    def next_value(self) -> int:
        """A value that was never given in this table."""
        return max((*self.values, *self.retired), default=0) + 1

    def updated(self, changed: Iterable[Label]) -> LabelTable:
        """The table with new names, colours and terminology for values that it has, and with further labels.

        Raises:
            ValueError: two labels of one name, or an empty name.
        """
        merged = {label.value: label for label in self.labels} | {label.value: label for label in changed}
        names = [label.name.strip().casefold() for label in merged.values()]
        if "" in names:
            raise ValueError("a label needs a name")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two labels are called {twice[0]!r}; give each a name of its own")
        return self._with(merged.values())

    def _with(self, labels: Iterable[Label]) -> LabelTable:
        """These labels in order; a value that somebody gave again by hand is not retired."""
        ordered = tuple(sorted(labels, key=lambda label: label.value))
        values = {label.value for label in ordered}
        return LabelTable(ordered, tuple(value for value in self.retired if value not in values))

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "value": one.value,
                "name": one.name,
                "color": list(one.color),
                "terminology": one.terminology,
                **one.extra,
            }
            for one in self.labels
        ]

    @classmethod
    def from_json(cls, rows: Iterable[dict[str, Any]]) -> LabelTable:
        known = {"value", "name", "color", "terminology"}
        return cls(
            tuple(
                Label(
                    int(row["value"]),
                    str(row["name"]),
                    tuple(row["color"]),
                    row.get("terminology"),
                    {key: one for key, one in row.items() if key not in known},
                )
                for row in rows
            )
        )
