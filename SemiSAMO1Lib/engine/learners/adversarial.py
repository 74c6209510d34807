"""DAN (Zhang et al. 2017): a discriminator cannot tell predictions of unlabelled scans from labelled ones.

L_cons is the discriminator's cross-entropy on unlabelled predictions with the target "labelled" (SemiSAM-O1).
"""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from ..specialists.dropout import dropped_by, with_sample_dropout
from .averaged import AveragedLearner, Outputs, Term
from .base import Batch
from .generators import Generators
from .schedules import consistency_ramp

#: What the discriminator says.
UNLABELLED, LABELLED = 0, 1


class Adversarial(AveragedLearner):
    """The student learns from labels and pseudo-labels and tries to deceive a discriminator."""

    def setup(self, fabric: Fabric) -> None:
        super().setup(fabric)
        network = with_sample_dropout(Discriminator(self.plan.classes))
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.9, 0.99))
        self.discriminator, self.discriminator_optimizer = fabric.setup(network, optimizer)

    def terms(self, batch: Batch, outputs: Outputs, progress: float, generators: Generators) -> dict[str, Term]:
        del generators
        # now it judges, and learns after the student's step: by itself, so that no process waits for its gradients
        judge = self.discriminator.module.eval().requires_grad_(False)
        with self.fabric.autocast():
            verdict = judge(F.softmax(outputs.pseudo, 1), batch.pseudo.image).float()
        deceived = F.cross_entropy(verdict, torch.full((len(verdict),), LABELLED, device=verdict.device))
        factor = self.config.consistency * consistency_ramp(progress)
        return {**self.learned(batch, outputs, progress), "consistency": Term(factor, batch.pseudo_share * deceived)}

    def after_step(self, batch: Batch, outputs: Outputs, generators: Generators) -> dict[str, Tensor]:
        """One step of the discriminator on both kinds of predictions."""
        self.discriminator.train().requires_grad_(True)
        said = F.softmax(torch.cat([outputs.labelled, outputs.pseudo]).detach(), 1)
        with dropped_by(generators.dropout):
            verdict = self.discriminator(said, torch.cat([batch.labelled.image, batch.pseudo.image])).float()
        labelled, pseudo = (
            F.cross_entropy(part, torch.full((len(part),), kind, device=part.device))
            for part, kind in zip(
                verdict.split((len(outputs.labelled), len(outputs.pseudo))), (LABELLED, UNLABELLED), strict=True
            )
        )
        loss = self.of_all(batch, labelled, pseudo)
        self.discriminator_optimizer.zero_grad()
        self.fabric.backward(loss)
        self.discriminator_optimizer.step()
        return {"discriminator": loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        own = {"discriminator": self.discriminator, "discriminator_optimizer": self.discriminator_optimizer}
        return {**super().state_dict(), **{name: one.state_dict() for name, one in own.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.discriminator.load_state_dict(state["discriminator"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])


class Discriminator(nn.Module):
    """Probabilities (B, C, z, y, x) and image (B, 1, z, y, x) -> (B, 2) logits: unlabelled, labelled."""

    def __init__(self, classes: int, channels: int = 64) -> None:
        super().__init__()
        self.map_stem = nn.Conv3d(classes, channels, 4, 2, 1)
        self.image_stem = nn.Conv3d(1, channels, 4, 2, 1)
        self.convolutions = nn.ModuleList(nn.Conv3d(channels * n, channels * 2 * n, 4, 2, 1) for n in (1, 2, 4))
        self.dropout = nn.Dropout3d(0.5)
        self.head = nn.Linear(8 * channels, 2)

    def forward(self, probabilities: Tensor, image: Tensor) -> Tensor:
        missing = [max(0, 16 - n) for n in image.shape[2:]]  # four strides of 2 need 16 voxels
        padding = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]
        probabilities, image = F.pad(probabilities, padding), F.pad(image, padding)
        x = self.dropout(F.leaky_relu(self.map_stem(probabilities) + self.image_stem(image), 0.2))
        for convolution in self.convolutions:
            x = self.dropout(F.leaky_relu(convolution(x), 0.2))
        verdict: Tensor = self.head(x.mean((2, 3, 4)))
        return verdict
