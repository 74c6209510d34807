"""What reference implementations were given and what they answered, so that ours can be compared without them.

Weights and inputs are not stored: they follow from names and shapes, with the same bits on every platform. Of every
output, the folder `golden` holds samples and the moments along each axis.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FOLDER = Path(__file__).parent / "golden"
CONFIGS = ("window3", "small", "full")

#: Accepted error of the samples, relative to the root mean square of the reference; a single value may be 10 times off.
TOLERANCE = 5e-5

Array = NDArray[np.float32]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


def noise(tag: str, shape: Shape) -> NDArray[np.float64]:
    """Uniform noise with mean 0 and variance 1; the tag is its seed."""
    bits = np.random.PCG64(zlib.crc32(tag.encode())).random_raw(math.prod(shape))
    uniform = (bits >> np.uint64(11)) * 2.0**-53
    return ((2 * uniform - 1) * math.sqrt(3)).reshape(shape)


# ---------------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class Rule:
    """Weights whose names match are noise times `scale`; where that is a gain, it is divided by √(fan in)."""

    pattern: str
    scale: float
    gain: bool = False

    def draw(self, name: str, shape: Shape) -> Array:
        # a transposed convolution, here always with its kernel as stride, has its input channels in front
        fan_in = shape[0] if "output_upscaling" in name else math.prod(shape[1:])
        scale = self.scale / math.sqrt(fan_in) if self.gain else self.scale
        return (scale * noise(name, shape)).astype(np.float32)


#: The first rule whose pattern matches holds. Some scales are small so that a wrong epsilon of a norm shows.
RULES = (
    Rule("*positional_encoding_gaussian_matrix", 1.0),
    Rule("*.attn.rel_pos_?", 0.15),
    Rule("image_encoder.pos_embed", 0.05),
    Rule("image_encoder.patch_embed.proj.weight", 0.05, gain=True),
    Rule("image_encoder.patch_embed.proj.bias", 0.02),
    Rule("image_encoder.*.attn.qkv.weight", 1.4, gain=True),
    Rule("image_encoder.*.attn.qkv.bias", 0.3),
    Rule("image_encoder.neck.0.weight", 0.02, gain=True),
    Rule("*_embed.weight", 0.7),
    Rule("*.point_embeddings.?.weight", 0.7),
    Rule("*.iou_token.weight", 0.7),
    Rule("*.mask_tokens.weight", 0.7),
    Rule("*.layers.0.self_attn.out_proj.weight", 0.05, gain=True),
    Rule("*.layers.0.self_attn.out_proj.bias", 0.02),
    Rule("mask_decoder.*.[qk]_proj.weight", 1.5, gain=True),
    Rule("mask_decoder.output_upscaling.0.weight", 0.05, gain=True),
    Rule("mask_decoder.output_upscaling.0.bias", 0.02),
    Rule("*.bias", 0.1),
    Rule("*", 1.0, gain=True),
)


def synthetic_weight(name: str, shape: Shape) -> Array:
    """The weight with this name; one-dimensional ones called `weight` scale a norm and lie around 1."""
    if len(shape) == 1 and name.endswith(".weight"):
        return (1 + 0.1 * noise(name, shape)).astype(np.float32)
    return next(rule for rule in RULES if fnmatchcase(name, rule.pattern)).draw(name, shape)


def synthetic_weights(shapes: Shapes) -> dict[str, Array]:
    return {name: synthetic_weight(name, shape) for name, shape in shapes.items()}


def digest(weights: Mapping[str, Array]) -> str:
    """SHA-256 over all tensors in their order, little-endian float32."""
    found = hashlib.sha256()
    for weight in weights.values():
        found.update(np.ascontiguousarray(weight, "<f4"))
    return found.hexdigest()


# ----------------------------------------------------------------------------------------------------------- inputs


def _axes(size: int) -> list[NDArray[np.float64]]:
    """Centres of voxels in [0, 1] along the three axes, ready to broadcast."""
    return list(np.meshgrid(*[(np.arange(size) + 0.5) / size] * 3, indexing="ij", sparse=True))


def synthetic_volume(size: int) -> Array:
    """Two waves, a blob and noise: (1, 1, s, s, s)."""
    x, y, z = _axes(size)
    waves = 0.9 * np.sin(2 * np.pi * (1.5 * x + 0.7 * y)) + 0.7 * np.cos(2 * np.pi * (2.3 * y - 1.1 * z))
    blob = 2.5 * np.exp(-((x - 0.35) ** 2 / 0.02 + (y - 0.55) ** 2 / 0.05 + (z - 0.65) ** 2 / 0.01))
    return (waves + blob + 0.5 * noise(f"volume/{size}", (size,) * 3)).astype(np.float32)[None, None]


def synthetic_mask(size: int) -> Array:
    """Mask logits for a volume of this size: (1, 1, s/4, s/4, s/4)."""
    x, y, z = _axes(size // 4)
    logits = 6 * np.sin(2 * np.pi * (1.3 * x + 0.15)) * np.cos(2 * np.pi * 0.9 * y) + 3 * z - 2
    return (logits + 0.5 * noise(f"mask/{size}", (size // 4,) * 3)).astype(np.float32)[None, None]


def synthetic_inputs(size: int) -> dict[str, NDArray[Any]]:
    """Volume, mask logits, and two sets of two prompts each: points (2, 2, 3) in voxels, labels (2, 2)."""
    points = np.array([[[37, 91, 64], [101, 22, 77]], [[5, 120, 60], [80, 79, 3]]])
    return {
        "volume": synthetic_volume(size),
        "mask": synthetic_mask(size),
        "points": (points * size // 128).astype(np.float32),
        "labels": np.array([[1, 0], [1, 1]]),
    }


# ---------------------------------------------------------------------------------------------------------- outputs


@dataclass(frozen=True)
class Deviation:
    """How far an output is from the reference, in units of the root mean square of the reference.

    Attributes:
        rms: root mean square over the samples; infinite for a wrong shape or values that are not finite.
        largest: of all samples and moments.
        reason: why it is infinite.
    """

    rms: float
    largest: float
    reason: str = ""

    def accepted(self, tolerance: float = TOLERANCE) -> bool:
        return self.rms <= tolerance and self.largest <= 10 * tolerance

    def __str__(self) -> str:
        return self.reason or f"rms {self.rms:.1e}, largest {self.largest:.1e}, relative to the reference"


@dataclass(frozen=True)
class Golden:
    """What is stored of one output.

    Attributes:
        shape: of the output.
        wanted: about how many values are stored; `sampled` says which.
        sample: these values.
        moments: by axis: mean and root mean square at every index, each (n,).
    """

    shape: Shape
    wanted: int
    sample: Array
    moments: Mapping[int, tuple[Array, Array]]

    def deviation(self, found: ArrayLike) -> Deviation:
        """The difference of an output from this one, in units of this one's root mean square."""
        array = np.asarray(found, np.float64)
        if array.shape != self.shape:
            return Deviation(math.inf, math.inf, f"the shape is {array.shape}, expected {self.shape}")
        if not np.isfinite(array).all():
            return Deviation(math.inf, math.inf, f"{(~np.isfinite(array)).sum()} values are not finite")
        off = array.ravel()[sampled(array.size, self.wanted)] - self.sample
        largest = np.abs(off).max()
        for axis, (mean, root) in self.moments.items():
            found_mean, found_root = axis_moments(array, axis)
            largest = max(largest, np.abs(found_mean - mean).max(), np.abs(found_root - root).max())
        scale = rms(self.sample)
        return Deviation(rms(off) / scale, float(largest) / scale)


def rms(values: ArrayLike) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def axis_moments(array: NDArray[np.float64], axis: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and root mean square over all other axes."""
    others = tuple(n for n in range(array.ndim) if n != axis)
    return array.mean(others), np.sqrt(np.square(array).mean(others))


def sampled(size: int, wanted: int) -> slice:
    """The places, in C order, of which values are stored: all, or every step-th, at most `wanted`.

    No step is divisible by 2, 3, 5 or 7, so that the places run through all channels and positions.
    """
    if size <= wanted:
        return slice(None)
    step = size // wanted + 1
    while math.gcd(step, 2 * 3 * 5 * 7) > 1:
        step += 1
    return slice(step // 2, None, step)


@dataclass(frozen=True)
class Config:
    """A configuration of SAM-Med3D of which outputs are stored.

    Attributes:
        name: in CONFIGS.
        sizes: hyper-parameters under their published names.
        shapes: of all weights, in the order of the published state dict.
        weights_sha256: `digest` of the synthetic weights.
        outputs: names of the stored outputs.
    """

    name: str
    sizes: Mapping[str, Any]
    shapes: Shapes
    weights_sha256: str
    outputs: tuple[str, ...]

    def golden(self) -> dict[str, Golden]:
        """What is stored, by the output's name."""
        with np.load(FOLDER / "sam_med3d_golden.npz") as stored:
            return {name: _golden(stored, f"{self.name}/{name}") for name in self.outputs}


def _golden(stored: Mapping[str, NDArray[Any]], output: str) -> Golden:
    shape = tuple(int(n) for n in stored[f"{output}/shape"])
    axes = [axis for axis, length in enumerate(shape) if length > 1]
    return Golden(
        shape=shape,
        wanted=8192 if output.endswith("/image_embedding") else 2048,
        sample=stored[f"{output}/sample"],
        moments={axis: (stored[f"{output}/mean{axis}"], stored[f"{output}/rms{axis}"]) for axis in axes},
    )


@cache
def load_config(name: str) -> Config:
    manifest = json.loads((FOLDER / "sam_med3d_state_dict.json").read_text())
    config = manifest["configs"][name]
    shapes = config.pop("state_dict", manifest["state_dict"])
    return Config(
        name=name,
        sizes=config,
        shapes={name: tuple(shape) for name, shape in shapes.items()},
        weights_sha256=config["weights_sha256"],
        outputs=tuple(config["outputs"]),
    )
