"""Class probabilities of a whole scan, window by window, never all classes of a large scan at once in float32."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..planning import Plan

#: Largest float32 probability map that is held at once, bytes.
LARGEST_MAP = 512 << 20

#: Test-time passes after the first see the image with this much noise and gain, in deviations of the scan.
PASS_NOISE = 0.1


@torch.inference_mode()
def predict_probabilities(
    model: nn.Module,
    image: NDArray[Any],
    plan: Plan,
    fabric: Fabric,
    passes: int,
    seed: int,
    padding: Literal["replicate", "constant"] = "replicate",
) -> NDArray[np.float16]:
    """Mean class probabilities of several passes of one scan.

    Windows of the plan's patch overlap by half and are blended with Gaussian weights. The first pass sees the scan as
    it is; each further pass sees it with noise and another brightness and contrast.

    Args:
        model: (B, 1, z, y, x) -> (B, C, z, y, x) logits.
        image: (z, y, x) scaled intensities on the training grid.
        plan: patch and classes.
        fabric: device and precision.
        passes: number of passes, at least 1.
        seed: of the passes' changes.
        padding: how scans smaller than a window go on: as in training here, or with zeros as in the published training.

    Returns:
        (C, z, y, x) float16; a block of slices at a time is computed in float32.
    """
    model.eval()
    result = np.empty((plan.classes, *image.shape), np.float16)
    depth = block_depth(image.shape, plan.classes, plan.patch[0])
    halo = plan.patch[0] // 2
    for start in range(0, image.shape[0], depth):
        low, high = max(0, start - halo), min(image.shape[0], start + depth + halo)
        block = torch.from_numpy(np.ascontiguousarray(image[low:high], np.float32))[None, None].to(fabric.device)
        mean = _mean_of_passes(model, block, plan, fabric, passes, seed, padding)
        stop = min(start + depth, image.shape[0])
        result[:, start:stop] = mean[:, start - low : stop - low].cpu().numpy()
    return result


def block_depth(shape: tuple[int, ...], classes: int, window: int) -> int:
    """Slices that are computed at once, so that their probabilities fit the limit; at least half a window."""
    per_slice = classes * shape[1] * shape[2] * 4
    return max(window // 2, 1, min(shape[0], LARGEST_MAP // per_slice - window))


def _mean_of_passes(
    model: nn.Module, block: Tensor, plan: Plan, fabric: Fabric, passes: int, seed: int, padding: str
) -> Tensor:
    def probabilities(windows: Tensor) -> Tensor:
        with fabric.autocast():
            logits = model(windows)
        return F.softmax(logits.float(), 1)

    total: Tensor | None = None
    for number in range(passes):
        seen = block if number == 0 else _changed(block, torch.Generator().manual_seed(1_000 * seed + number))
        one: Any = sliding_window_inference(
            seen, plan.patch, 2, probabilities, overlap=0.5, mode="gaussian", padding_mode=padding
        )
        total = one if total is None else total + one
    assert total is not None, "at least one pass"
    return total[0] / passes


def _changed(image: Tensor, generator: torch.Generator) -> Tensor:
    gain, shift = (PASS_NOISE * torch.randn(2, generator=generator)).tolist()  # first: the same in blocks of any size
    noise = torch.randn(image.shape, generator=generator).to(image.device) * PASS_NOISE
    return image * (1 + gain) + shift + noise
