"""SAM-Med3D as a generalist: features of scans of any size, and answers to prompts on patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ....volume import Volume
from ...data.grids import pooled
from ..base import FeatureMap, Prompts
from . import checkpoint
from .architecture import ARCHITECTURES, Architecture
from .image_encoder import ImageEncoder
from .model import SamMed3D
from .preprocessing import Coverage, Preprocessing, normalised, prepare, windows

Array = NDArray[np.float32]
Part = TypeVar("Part", bound=nn.Module)


@dataclass(frozen=True)
class Loaded(Generic[Part]):
    """A model with its weights, their hash, and what a person should be told about them."""

    model: Part
    shape: Architecture
    identity: str
    notes: tuple[str, ...] = ()


#: In place of a checkpoint's path: random weights, to test the mechanism without the file.
RANDOM = "random"


class SamMed3DFeatures:
    """Features of the frozen image encoder; overlapping windows, blended on the scan's own cells."""

    def __init__(
        self, loaded: Loaded[ImageEncoder], device: torch.device, how: Preprocessing, coverage: Coverage
    ) -> None:
        """
        Args:
            loaded: the encoder with its weights.
            device: where it runs; bfloat16 on CUDA.
            how: preprocessing.
            coverage: 'full', or 'centre' for the paper's single window.
        """
        self.encoder = loaded.model.eval().requires_grad_(False).to(device)
        self.shape = loaded.shape
        self.how = how
        self.coverage = coverage
        self.key = f"sam-med3d 1 weights {loaded.identity} {how} {coverage} {device.type}"

    @torch.inference_mode()
    def features(self, volume: Volume) -> FeatureMap:
        size, patch, grid = self.shape.size, self.shape.patch, self.shape.grid
        prepared = prepare(volume, self.how, self.coverage, size, patch)
        array = prepared.volume.array
        cells = tuple(n // patch for n in array.shape)
        total = np.zeros((self.shape.out_channels, *cells), np.float32)
        weight = np.zeros(cells, np.float32)
        tent = np.minimum(np.arange(grid) + 1, np.arange(grid, 0, -1)).astype(np.float32)
        blend = tent[:, None, None] * tent[:, None] * tent  # cells in the middle of a window saw more around them
        for window in windows(array.shape, size, patch):
            seen = normalised(array[window]) if prepared.per_window else array[window]
            if seen is None:
                continue
            place = tuple(slice(s.start // patch, s.stop // patch) for s in window)
            total[:, *place] += blend * self._encoded(seen)
            weight[place] += blend
        if not weight.any():
            raise ValueError(
                "SAM-Med3D sees nothing in this scan: no voxel is above 0, or all that are have one value. Look at the "
                "scan; where its values are shifted below 0, use --preprocessing released"
            )
        total /= np.maximum(weight, 1e-6)
        share = self._share_of_data(prepared.seen, cells) * (weight > 0)
        return FeatureMap(pooled(prepared.volume.geometry, patch), total.astype(np.float16), share.astype(np.float32))

    def _encoded(self, window: Array) -> Array:
        """(z, y, x) -> (C, z, y, x) cells; the model's axes are (x, y, z)."""
        device = self.encoder.pos_embed.device
        turned = torch.from_numpy(np.ascontiguousarray(window.T))[None, None].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = self.encoder(turned)
        return found[0].float().cpu().numpy().transpose(0, 3, 2, 1)

    def _share_of_data(self, seen: NDArray[np.bool_], cells: tuple[int, ...]) -> Array:
        if self.coverage == "centre":
            return np.ones(cells, np.float32)  # the paper counts padded cells as background
        return F.avg_pool3d(torch.from_numpy(seen).float()[None], self.shape.patch)[0].numpy()


class SamMed3DPrompts:
    """Answers to points and masks on training patches; the weights are those that were loaded once."""

    def __init__(self, model: SamMed3D) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def segment(self, image: Tensor, questions: Sequence[Prompts]) -> Tensor:
        """Probabilities (n, 1, z, y, x) of the asked structures; see `Promptable`."""
        frame = _Frame(image.shape[2:], self.model.shape.size)
        with torch.autocast(image.device.type, torch.bfloat16, enabled=image.device.type == "cuda"):
            features = self.model.image_encoder(frame.to_cube(image).transpose(2, 4)).float()  # its axes are (x, y, z)
        return torch.cat([self._answer(features, frame, one) for one in questions])

    def _answer(self, features: Tensor, frame: _Frame, question: Prompts) -> Tensor:
        low = [self.model.shape.grid * 4] * 3
        if question.mask is None:
            mask = features.new_zeros(1, 1, *low)  # what the model officially gets with a first click
        else:
            mask = F.interpolate(frame.to_cube(question.mask, fill=-10.0).transpose(2, 4), size=low, mode="trilinear")
        points = frame.points(question.points.to(features.device)).flip(-1)[None]
        logits, _ = self.model.masks(features, points, question.inside.to(features.device)[None].long(), mask)
        return frame.from_cube(torch.sigmoid(self.model.upscaled(logits)).transpose(2, 4))


class _Frame:
    """A patch inside the model's cube: shrunk until it fits, then in the middle of zeros."""

    def __init__(self, shape: tuple[int, ...], size: int) -> None:
        self.shape, self.size = tuple(shape), size
        scale = min(1.0, size / max(shape))
        self.inner = [max(1, min(size, round(n * scale))) for n in shape]
        self.before = [(size - n) // 2 for n in self.inner]

    def to_cube(self, patch: Tensor, fill: float = 0.0) -> Tensor:
        shrunk = patch.float()
        if tuple(self.inner) != self.shape:
            shrunk = F.interpolate(shrunk, size=self.inner, mode="trilinear")
        ends = [(b, self.size - n - b) for b, n in zip(self.before, self.inner, strict=True)]
        return F.pad(shrunk, [side for pair in reversed(ends) for side in pair], value=fill)

    def from_cube(self, cube: Tensor) -> Tensor:
        a, b, c = (slice(start, start + n) for start, n in zip(self.before, self.inner, strict=True))
        inner = cube[:, :, a, b, c]
        if tuple(self.inner) != self.shape:
            inner = F.interpolate(inner, size=list(self.shape), mode="trilinear")
        return inner

    def points(self, points: Tensor) -> Tensor:
        """Voxel indices (n, 3) of the patch -> of the cube."""
        scale = points.new_tensor([n / m for n, m in zip(self.inner, self.shape, strict=True)], dtype=torch.float32)
        before = points.new_tensor(self.before, dtype=torch.float32)
        return (points.float() + 0.5) * scale - 0.5 + before


def load_encoder(given: str | None, architecture: str, seed: int = 0) -> Loaded[ImageEncoder]:
    """The image encoder alone with its weights; arguments and errors as of `load_model`."""
    return _load(ImageEncoder, "image_encoder.", given, architecture, seed)


def load_model(given: str | None, architecture: str, seed: int = 0) -> Loaded[SamMed3D]:
    """The whole model with its weights.

    Args:
        given: the checkpoint's file; None: it is looked for; 'random': random weights.
        architecture: 'full' or 'small'.
        seed: of random weights.

    Raises:
        CheckpointError: no file, or one that cannot be used.
    """
    return _load(SamMed3D, "", given, architecture, seed)


def _load(
    make: Callable[[Architecture], Part], part: str, given: str | None, architecture: str, seed: int
) -> Loaded[Part]:
    shape = ARCHITECTURES[architecture]
    if given == RANDOM:
        return Loaded(
            _random(make, shape, seed), shape, f"random {architecture} {seed}", ("random weights: no accuracy",)
        )
    path = checkpoint.find(given)
    digest = checkpoint.sha256(path)
    weights, notes = checkpoint.read_weights(path)
    if not checkpoint.is_published(digest):
        first, last = checkpoint.CARD.sha256
        notes.append(f"{path}: sha256 {digest} is not that of the published file, {first}…{last}")
    with torch.device("meta"):
        model, whole = make(shape), SamMed3D(shape)
    checkpoint.require(whole, weights, path)  # a file with another decoder is not the one it says it is
    checkpoint.load(model, weights, path, part)
    return Loaded(model, shape, digest, tuple(notes))


def _random(make: Callable[[Architecture], Part], shape: Architecture, seed: int) -> Part:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(shape)
        for name, parameter in model.named_parameters():
            if name.split(".")[-1].startswith(("rel_pos", "pos_embed")):
                nn.init.normal_(parameter, std=0.02)
    return model
