"""Which prediction a person's painting began from: what is saved is measured against that one and no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Began:
    """A prediction, or none.

    Attributes:
        training: whose; empty where painting began from no prediction, or nobody knows from which.
        prediction: sha256 of its file: a training that is resumed makes another one. Empty where it was not written
            down; then it is the training's last.
    """

    training: str = ""
    prediction: str = ""

    @classmethod
    def of_row(cls, row: Mapping[str, Any] | None) -> Began:
        """The prediction of a row of a training's results; None: none."""
        return cls() if row is None else cls(row["training"], row.get("sha256") or "")

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Began:
        """Of a record of a label, a draft or a decision."""
        return cls(str(record.get("training") or ""), str(record.get("prediction") or ""))

    def to_json(self) -> dict[str, str]:
        return {"training": self.training, "prediction": self.prediction}

    def is_that_of(self, row: Mapping[str, Any] | None) -> bool:
        """Whether a row of a training's results is this very prediction."""
        if row is None or not self.training or row["training"] != self.training:
            return False
        return not self.prediction or row.get("sha256") in (None, self.prediction)
