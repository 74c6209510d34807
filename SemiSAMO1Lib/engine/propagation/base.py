"""What a propagator is: it carries the labels of labelled cases to a scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...volume import Geometry, Volume
from ..cases import LabelledCase, Propagation
from .detours import Helper


class Propagator(Protocol):
    """One way of carrying labels; `prepare` once, `propagate` for every scan."""

    def prepare(self, labelled: Sequence[LabelledCase]) -> Any:
        """Everything that depends on the labelled cases alone."""

    def template_signature(self, prepared: Any) -> NDArray[np.float16]:
        """What the template looks like, to be compared with `Propagation.signature`."""

    def propagate(self, prepared: Any, volume: Volume, grid: Geometry, through: Sequence[Helper] = ()) -> Propagation:
        """Carry the labels to a scan.

        Args:
            prepared: from `prepare`.
            volume: the scan.
            grid: the working grid of the result.
            through: cases to which they were carried well; who registers goes to the scan through these as well.
        """
