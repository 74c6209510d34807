"""SAM-Med3D's image encoder at 128³, float32: seconds and peak memory, in a process of its own.

    python Testing/benchmarks/encoder.py --threads 2 --rows encoder.jsonl

Random weights of the full configuration, written to a file and loaded as the published ones are. The speed of a matrix
product in the same process says how fast the machine is at that moment.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import keep, machine

from SemiSAMO1Lib.engine.generalists.sam_med3d.generalist import load_encoder, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.weights is not None:
        measure(options.weights, options.threads, options.repetitions, options.rows)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pth"
        torch.save({"model_state_dict": load_model("random", "full").model.state_dict()}, path)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--weights", str(path)], check=True)


def measure(weights: Path, threads: int, repetitions: int, rows: Path | None) -> None:
    """Load, encode, and say what it took."""
    torch.set_num_threads(threads)
    encoder = load_encoder(str(weights), "full").model.eval().requires_grad_(False)
    volume = torch.randn(1, 1, 128, 128, 128)
    seconds = []
    with torch.inference_mode():
        for _ in range(repetitions):
            began = time.monotonic()
            encoder(volume)
            seconds.append(time.monotonic() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    row = {"benchmark": "encoder", "threads": threads, "seconds": [round(s, 2) for s in seconds]}
    keep({**row, "peak_GiB": round(peak / 2**30, 2), "gemm_GFLOPs": round(gemm(), 1), **machine()}, rows)


def gemm() -> float:
    """GFLOP/s of a float32 matrix product of the encoder's size."""
    a, b = torch.randn(512, 768), torch.randn(768, 3072)
    a @ b
    began, count = time.monotonic(), 50
    for _ in range(count):
        a @ b
    return 2 * 512 * 768 * 3072 * count / (time.monotonic() - began) / 1e9


if __name__ == "__main__":
    main()
