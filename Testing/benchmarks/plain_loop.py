"""The loop that ours is measured against: does what the released code does, as method.md describes it (1.3 and 1.5).

Every sample is read from its h5 file and decompressed, augmented in numpy by a loader process; an epoch is one
iteration, so the four loader processes start anew in each. The teacher of UAMT looks at two copies in each of four
passes, and once more for the target; DTC computes true distance maps of every patch in every iteration on the CPU.
float32 throughout. The losses are those of our learners; nothing here is taken from the released code.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from SemiSAMO1Lib.engine.specialists.unet_3d import UNet3D, UNet3DWithDistance

#: Loader processes, as released.
WORKERS = 4

#: Stochastic passes of UAMT's teacher: four of two copies.
PASSES, COPIES = 4, 2


@dataclass(frozen=True)
class Iteration:
    """What an iteration was like: the loss on the template, seconds spent on the batch and on true distance maps."""

    supervised: float
    data_s: float
    distances_s: float


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Random patches (1, x, y, z) with labels (x, y, z), one h5 file a case, the template first."""

    def __init__(self, paths: Sequence[Path], patch: tuple[int, int, int]) -> None:
        self.paths = paths
        self.patch = patch

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with h5py.File(self.paths[index], "r") as file:
            image, label = file["image"][()], file["label"][()]
        image, label = turned_and_flipped(*cropped(image, label, self.patch))
        return torch.from_numpy(image.astype(np.float32))[None], torch.from_numpy(label.astype(np.int64))


class OnePair(Sampler[list[int]]):
    """An epoch of one batch: the template and one other case."""

    def __init__(self, cases: int) -> None:
        self.cases = cases

    def __iter__(self) -> Iterator[list[int]]:
        yield [0, int(np.random.randint(1, self.cases))]

    def __len__(self) -> int:
        return 1


def cropped(
    image: NDArray[np.float32], label: NDArray[np.uint8], patch: tuple[int, int, int]
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A random box of the size of a patch; scans that are smaller are padded with zeros."""
    missing = [max(0, side - have) for side, have in zip(patch, image.shape, strict=True)]
    if any(missing):
        padding = [(one // 2, one - one // 2) for one in missing]
        image, label = np.pad(image, padding), np.pad(label, padding)
    starts = [np.random.randint(0, have - side + 1) for side, have in zip(patch, image.shape, strict=True)]
    box = tuple(slice(start, start + side) for start, side in zip(starts, patch, strict=True))
    return image[box], label[box]


def turned_and_flipped(
    image: NDArray[np.float32], label: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Turned by 90° some times in the first two axes, then one of them flipped."""
    turns, axis = np.random.randint(4), np.random.randint(2)
    return np.flip(np.rot90(image, turns), axis).copy(), np.flip(np.rot90(label, turns), axis).copy()


class PlainLearner:
    """Student, teacher and optimizer of mt, uamt or dtc (which has no teacher)."""

    def __init__(self, name: str, classes: int, iterations: int, device: torch.device) -> None:
        network = UNet3DWithDistance(classes) if name == "dtc" else UNet3D(classes)
        self.name, self.classes, self.iterations = name, classes, iterations
        self.student = network.to(device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        self.done = 0
        self.distances_s = 0.0

    def step(self, image: Tensor, label: Tensor) -> float:
        """One update from a batch of the template's patch and a pseudo-labelled one; returns L_sup."""
        progress = self.done / self.iterations
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 * (1 - progress) ** 0.9
        if self.name == "dtc":
            supervised, pseudo, consistency = self._dual_task(image, label)
        else:
            logits = self.student(image)
            supervised, pseudo = half_cross_entropy_and_dice(logits[:1], label[:1]), _pseudo(logits, label)
            said = F.softmax(logits[1:], 1)
            consistency = (self._mean_teacher if self.name == "mt" else self._uncertainty)(said, image[1:], progress)
        ramp = 0.1 * math.exp(-5 * (1 - 0.5 * progress) ** 2)
        loss = supervised + ramp * consistency + min(1.0, progress / 0.3) * pseudo
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.name != "dtc":
            self._average()
        self.done += 1
        if not math.isfinite(loss.item()):
            raise SystemExit(f"plain loop, iteration {self.done}: the loss is not a number")
        return float(supervised.item())

    def _mean_teacher(self, said: Tensor, image: Tensor, progress: float) -> Tensor:
        del progress
        return F.mse_loss(said, self._taught(image))

    def _uncertainty(self, said: Tensor, image: Tensor, progress: float) -> Tensor:
        wanted = self._taught(image)
        views = image.repeat(COPIES, 1, 1, 1, 1)
        mean = torch.cat([self._taught(views) for _ in range(PASSES)]).mean(0, keepdim=True)
        entropy = -(mean * torch.log(mean + 1e-6)).sum(1, keepdim=True)
        limit = (0.75 + 0.25 * math.exp(-5 * (1 - progress) ** 2)) * math.log(self.classes)
        sure = (entropy < limit).float()
        return (sure * (said - wanted) ** 2).sum() / (self.classes * sure.sum() + 1e-16)

    def _dual_task(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distances, logits = self.student(image)
        began = time.perf_counter()
        true = true_distances(label, self.classes).to(image.device)
        self.distances_s = time.perf_counter() - began
        masks = torch.sigmoid(-1500 * distances[:, 1:])
        known = ~true[:1].isnan()
        squared = (distances[:1, 1:] - true[:1].nan_to_num()) ** 2 * known
        supervised = half_cross_entropy_and_dice(logits[:1], label[:1])
        supervised = supervised + dice(masks[:1], one_hot(label[:1], self.classes)[:, 1:])
        supervised = supervised + 0.3 * squared.sum() / known.sum().clamp(min=1)
        return supervised, _pseudo(logits, label), F.mse_loss(masks, F.softmax(logits, 1)[:, 1:])

    def _taught(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            noise = torch.clamp(torch.randn_like(image) * 0.1, -0.2, 0.2)
            return F.softmax(self.teacher(image + noise), 1)

    def _average(self) -> None:
        decay = min(1 - 1 / (self.done + 1), 0.99)
        for mean, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mean.data.mul_(decay).add_(value.data, alpha=1 - decay)


def true_distances(label: Tensor, classes: int) -> Tensor:
    """Signed distance maps (B, C - 1, x, y, z) of labels (B, x, y, z), patch by patch; NaN for an absent class."""
    array = label.cpu().numpy()
    maps = np.full((len(array), classes - 1, *array.shape[1:]), np.nan, np.float32)
    for patch, value in np.ndindex(len(array), classes - 1):
        mask = array[patch] == value + 1
        if mask.any() and not mask.all():
            outside, within = ndimage.distance_transform_edt(~mask), ndimage.distance_transform_edt(mask)
            signed = outside / outside.max() - within / within.max()
            signed[mask & ~ndimage.binary_erosion(mask, border_value=1)] = 0
            maps[patch, value] = signed
    return torch.from_numpy(maps)


def one_hot(label: Tensor, classes: int) -> Tensor:
    return F.one_hot(label, classes).movedim(-1, 1).float()


def dice(said: Tensor, true: Tensor) -> Tensor:
    axes = (0, 2, 3, 4)
    sizes = (said**2).sum(axes) + (true**2).sum(axes)
    return (1 - (2 * (said * true).sum(axes) + 1e-5) / (sizes + 1e-5)).mean()


def half_cross_entropy_and_dice(logits: Tensor, label: Tensor) -> Tensor:
    hot = one_hot(label, logits.shape[1])
    return 0.5 * (F.cross_entropy(logits, label) + dice(F.softmax(logits, 1), hot))


def _pseudo(logits: Tensor, label: Tensor) -> Tensor:
    return half_cross_entropy_and_dice(logits[1:], label[1:])


def train_plainly(
    name: str, paths: Sequence[Path], classes: int, patch: tuple[int, int, int], iterations: int, device: torch.device
) -> Iterator[Iteration]:
    """Train mt, uamt or dtc from scratch, yielding after every iteration.

    Args:
        name: mt, uamt or dtc.
        paths: one h5 file a case, (x, y, z), class indices as label; the template first.
        classes: number of classes, background included.
        patch: (x, y, z) voxels.
        iterations: how many.
        device: where the networks are.

    Raises:
        SystemExit: the loss is not a number, or the weights did not change.
    """
    learner = PlainLearner(name, classes, iterations, device)
    first = _flat(learner.student)
    loader = DataLoader(
        Samples(paths, patch),
        batch_sampler=OnePair(len(paths)),
        num_workers=WORKERS,
        pin_memory=device.type == "cuda",
        multiprocessing_context="fork",
    )
    for _ in range(iterations):
        began, stepped = time.perf_counter(), 0.0
        for image, label in loader:  # one batch: the loader's processes start here and end below
            started = time.perf_counter()
            supervised = learner.step(image.to(device), label.to(device))
            stepped = time.perf_counter() - started
        yield Iteration(supervised, time.perf_counter() - began - stepped, learner.distances_s)
    if torch.equal(first, _flat(learner.student)):
        raise SystemExit("plain loop: the weights did not change")


def _flat(network: nn.Module) -> Tensor:
    return torch.cat([one.detach().flatten().cpu().clone() for one in network.parameters()])
