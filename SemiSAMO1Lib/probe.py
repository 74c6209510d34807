"""Can this Python do the work? numpy, torch and a 3D convolution, forward and backward, on a device.

    python SemiSAMO1Lib/worker.py --probe [auto|cpu|cuda:0]

Prints one JSON object and never raises: what is there, what fails, how fast a training step of a known size is.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from typing import Any

#: Patch of the timed convolution, voxels a side, and its channels.
SIDE, CHANNELS = 48, 16


def probe(device: str = "auto") -> dict[str, Any]:
    """Try everything that a training needs.

    Returns:
        'ok'; 'python', 'torch', 'device' (with name and memory); 'step_s': seconds of a convolution step, the
        measure of the machine's speed; 'error' when something fails.
    """
    found: dict[str, Any] = {"ok": False, "python": platform.python_version(), "executable": sys.executable}
    try:
        import torch

        found["torch"] = torch.__version__
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        found["device"] = device
        found["cuda_build"] = torch.version.cuda
        if device.startswith("cuda"):
            found["device_name"] = torch.cuda.get_device_name(device)
            found["free_bytes"], found["total_bytes"] = torch.cuda.mem_get_info(device)
        found["devices"] = _devices(torch)
        _numpy_round_trip(torch)
        found["step_s"] = _convolution_step(torch, device)
        import monai
        import SimpleITK

        found["monai"] = monai.__version__
        found["SimpleITK"] = SimpleITK.Version().VersionString()
        found["ok"] = True
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def print_probe(device: str) -> int:
    """Print the result as one JSON line; 0 when all is well."""
    found = probe(device)
    print(json.dumps(found))
    return 0 if found["ok"] else 1


def _devices(torch: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": "cpu"}]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        title = torch.cuda.get_device_name(number)
        found.append({"name": f"cuda:{number}", "title": title, "free_bytes": free, "total_bytes": total})
    return found


def _numpy_round_trip(torch: Any) -> None:
    import numpy as np

    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    if not np.array_equal(torch.from_numpy(array).numpy(), array):
        raise RuntimeError("numpy and torch do not fit together: an array came back changed")


def _convolution_step(torch: Any, device: str) -> float:
    """Seconds of one forward and backward pass, the best of three."""
    layer = torch.nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1).to(device)
    image = torch.randn(1, CHANNELS, SIDE, SIDE, SIDE, device=device, requires_grad=True)
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        layer(image).square().mean().backward()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    if not bool(torch.isfinite(layer.weight.grad).all()):
        raise RuntimeError(f"a 3D convolution gave numbers that are not finite on {device}")
    return round(min(seconds), 5)
