"""Class probabilities of a whole scan, window by window, never all classes of a large scan at once in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

#: Largest float32 probability map that is held at once, bytes, as long as half a window of slices fits.
LARGEST_MAP = 512 << 20

#: Test-time passes after the first see the image with this much noise and gain, in deviations of the scan.
PASS_NOISE = 0.1


class Windows(Protocol):
    """What a plan says of the windows: their size (z, y, x) and the number of classes."""

    @property
    def patch(self) -> tuple[int, int, int]: ...

    @property
    def classes(self) -> int: ...


class Runner(Protocol):
    """Where a network runs, and in which precision: a Fabric."""

    @property
    def device(self) -> torch.device: ...

    def autocast(self) -> AbstractContextManager[Any]: ...


class Agreement:
    """Dice of each foreground class between the first pass and the mean of the others, gathered block by block."""

    def __init__(self, classes: int) -> None:
        self._both, self._sizes = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
        self._passes = 1

    def add(self, first: Tensor, others: Tensor | None) -> None:
        """Take the class probabilities (C, z, y, x) of a block; `others` is None where there was one pass."""
        if others is None:
            return
        self._passes = 2
        a, b = first.argmax(0), others.argmax(0)
        for value in range(1, len(self._both)):
            self._both[value] += int(((a == value) & (b == value)).sum())
            self._sizes[value] += int((a == value).sum()) + int((b == value).sum())

    @property
    def dice(self) -> list[float | None]:
        """Of the classes 1 .. C - 1; 1 where neither found any, None where there was one pass."""
        if self._passes == 1:
            return [None] * (len(self._both) - 1)
        pairs = zip(self._both[1:].tolist(), self._sizes[1:].tolist(), strict=True)
        return [2 * both / size if size else 1.0 for both, size in pairs]


@torch.inference_mode()
def predict_probabilities(
    model: nn.Module,
    image: NDArray[Any],
    plan: Windows,
    fabric: Runner,
    passes: int,
    seed: int,
    padding: Literal["replicate", "constant"] = "replicate",
    agreement: Agreement | None = None,
    overlap: float = 0.5,
) -> NDArray[np.float16]:
    """Mean class probabilities of several passes of one scan.

    Windows of the plan's patch overlap and are blended with Gaussian weights. The first pass sees the scan as
    it is; each further pass sees it with noise and another brightness and contrast.

    Args:
        model: (B, 1, z, y, x) -> (B, C, z, y, x) logits.
        image: (z, y, x) scaled intensities on the training grid.
        plan: patch and classes.
        fabric: device and precision.
        passes: number of passes, at least 1.
        seed: of the passes' changes.
        padding: how scans smaller than a window go on: as in training here, or with zeros as in the published training.
        agreement: learns how far the passes agree.
        overlap: of neighbouring windows, as a share of their sides.

    Returns:
        (C, z, y, x) float16; a block of slices at a time is computed in float32.
    """
    model.eval()
    result = np.empty((plan.classes, *image.shape), np.float16)
    depth = block_depth(image.shape, plan.classes, plan.patch[0])
    halo = plan.patch[0] // 2
    for start in range(0, image.shape[0], depth):
        high = min(image.shape[0], start + depth + halo)
        low = max(0, min(start - halo, high - plan.patch[0]))  # at the end too windows see the scan, not its border
        block = torch.from_numpy(np.array(image[low:high], np.float32, order="C"))[None, None].to(fabric.device)
        stop = min(start + depth, image.shape[0])
        inner = slice(start - low, stop - low)
        first, others = _passes(model, block, plan, fabric, passes, seed, padding, overlap)
        first, others = first[:, inner], None if others is None else others[:, inner]
        if agreement is not None:
            agreement.add(first, others)
        mean = first if others is None else (first + (passes - 1) * others) / passes
        result[:, start:stop] = mean.cpu().numpy()
    return result


def block_depth(shape: tuple[int, ...], classes: int, window: int) -> int:
    """Slices that are computed at once, so that their probabilities fit the limit; at least half a window, also where
    that is more (many classes, wide slices)."""
    per_slice = classes * shape[1] * shape[2] * 4
    return max(window // 2, 1, min(shape[0], LARGEST_MAP // per_slice - window))


def _passes(
    model: nn.Module,
    block: Tensor,
    plan: Windows,
    fabric: Runner,
    passes: int,
    seed: int,
    padding: str,
    overlap: float,
) -> tuple[Tensor, Tensor | None]:
    """Probabilities (C, z, y, x) of the block as it is, and the mean of those of its changed versions, if any."""

    def probabilities(windows: Tensor) -> Tensor:
        with fabric.autocast():
            logits = model(windows)
        return F.softmax(logits.float(), 1)

    def one_pass(seen: Tensor) -> Tensor:
        found: Any = sliding_window_inference(
            seen, plan.patch, 2, probabilities, overlap=overlap, mode="gaussian", padding_mode=padding
        )
        return found[0]

    first, total = one_pass(block), None
    for number in range(1, passes):
        found = one_pass(_changed(block, torch.Generator().manual_seed(1_000 * seed + number)))
        total = found if total is None else total + found
    return first, None if total is None else total / (passes - 1)


def _changed(image: Tensor, generator: torch.Generator) -> Tensor:
    gain, shift = (PASS_NOISE * torch.randn(2, generator=generator)).tolist()  # first: the same in blocks of any size
    noise = torch.randn(image.shape, generator=generator).to(image.device) * PASS_NOISE
    return image * (1 + gain) + shift + noise
