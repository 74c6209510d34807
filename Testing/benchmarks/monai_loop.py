"""A plain MONAI training loop as tutorials write it: cached scans, dictionary transforms, Dice + cross entropy.

What `monai.engines.SupervisedTrainer` does in an iteration is written out: ignite is not needed. Network, patch,
number of patches and kinds of augmentation are those of our plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceCELoss
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByLabelClassesd,
    RandGaussianNoised,
    RandScaleIntensityd,
    SpatialPadd,
)
from numpy.typing import NDArray
from torch.utils.data import RandomSampler

from SemiSAMO1Lib.engine.planning import Plan
from SemiSAMO1Lib.engine.specialists import make_specialist

KEYS = ("image", "label")


class MonaiLoop:
    """An endless training; a call is one iteration, its batch included.

    Args:
        scans: (z, y, x) scaled intensities on the training grid.
        labels: (z, y, x) class indices.
        plan: network, patch and batch.
        device: where the network is.
        kind: float32, or a type to multiply in where autocast does.
        workers: loader processes.

    Raises:
        ValueError: fewer scans than a batch has patches.
    """

    def __init__(
        self,
        scans: Sequence[NDArray[Any]],
        labels: Sequence[NDArray[Any]],
        plan: Plan,
        device: torch.device,
        kind: torch.dtype,
        workers: int = 0,
    ) -> None:
        rows = [
            {"image": np.asarray(a, np.float32), "label": np.asarray(b)} for a, b in zip(scans, labels, strict=True)
        ]
        dataset = CacheDataset(rows, _transforms(plan), progress=False)
        patches = plan.labelled + plan.batch
        if len(scans) < patches:
            raise ValueError(f"{len(scans)} scans do not fill a batch of {patches} patches")
        kept = workers > 0
        # an epoch that does not end: where it ends after one batch, a loader's process has nothing to work ahead on
        endless: Any = RandomSampler(rows, replacement=True, num_samples=1 << 20)
        self.loader: Any = DataLoader(
            dataset, batch_size=patches, sampler=endless, drop_last=True, num_workers=workers, persistent_workers=kept
        )
        self.batches: Any = None
        self.device, self.kind = device, kind
        self.network = make_specialist("dynunet", plan).to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True)

    def __call__(self) -> float:
        if self.batches is None:
            self.batches = iter(self.loader)
        batch = next(self.batches)
        image, label = batch["image"].to(self.device), batch["label"].to(self.device)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.kind, enabled=self.kind != torch.float32):
            logits = self.network(image)
        loss = self.loss(logits.float(), label)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def close(self) -> None:
        """End the loader's processes."""
        self.batches = self.loader = iter(())


def _transforms(plan: Plan) -> Compose:
    return Compose(
        [
            EnsureChannelFirstd(KEYS, channel_dim="no_channel"),
            SpatialPadd(KEYS, plan.patch),
            RandCropByLabelClassesd(KEYS, "label", plan.patch, num_classes=plan.classes),
            RandAffined(
                KEYS,
                prob=1.0,
                rotate_range=(0.26, 0.26, 0.26),
                scale_range=(0.15, 0.15, 0.15),
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            RandGaussianNoised("image", prob=0.5, std=0.1),
            RandScaleIntensityd("image", factors=0.2, prob=0.5),
            RandAdjustContrastd("image", prob=0.5),
        ]
    )
