"""What a generalist is: a frozen model that describes scans, or answers prompts. It is never trained here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...volume import Geometry, Volume


@dataclass(frozen=True)
class FeatureMap:
    """What a generalist sees in every cell of a scan.

    Attributes:
        geometry: the cells' grid in patient space.
        channels: (c, z, y, x) float16.
        weight: (z, y, x) float32 in [0, 1]: the share of a cell that holds data; 0 = nothing was seen there.
    """

    geometry: Geometry
    channels: NDArray[np.float16]
    weight: NDArray[np.float32]

    def global_feature(self) -> NDArray[np.float32]:
        """f_g of SemiSAM-O1: the mean over the cells, L2-normalised; (c,)."""
        mean = np.einsum("czyx,zyx->c", self.channels.astype(np.float32), self.weight)
        return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), np.float32)


class Generalist(Protocol):
    """A model whose features describe a scan."""

    @property
    def key(self) -> str:
        """Everything but the scan that its features depend on: model, weights, preprocessing."""

    def features(self, volume: Volume) -> FeatureMap:
        """Describe a scan of any size. Raises ValueError for one in which there is nothing to see."""


@runtime_checkable
class Promptable(Protocol):
    """A model that answers prompts on patches; frozen, without gradients."""

    def segment(self, image: Tensor, questions: Sequence[Prompts]) -> Tensor:
        """Probabilities of the asked structures.

        Args:
            image: (1, 1, z, y, x), scaled intensities (about mean 0, deviation 1).
            questions: n of them, about the same image.

        Returns:
            (n, 1, z, y, x) in [0, 1].
        """


@dataclass(frozen=True)
class Prompts:
    """A question about one structure on a patch.

    Attributes:
        points: (n, 3) voxel indices (z, y, x); n may be 0.
        inside: (n,) True where the point lies inside the structure.
        mask: (1, 1, z, y, x) logits of an earlier guess, or None.
    """

    points: Tensor
    inside: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Card:
    """What a person should know of a generalist before using it.

    Attributes:
        licence: of its weights; "own code" where there are none.
        size_bytes: of what has to be downloaded.
        sha256: first and last digits of the published file's hash, as far as it is published; "" without a file.
        url: where the file comes from.
    """

    licence: str
    size_bytes: int = 0
    sha256: tuple[str, str] = ("", "")
    url: str = ""
