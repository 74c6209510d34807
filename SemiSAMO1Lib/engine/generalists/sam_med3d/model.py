"""The whole model: image encoder, prompt encoder, mask decoder."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .architecture import FULL, Architecture
from .image_encoder import ImageEncoder
from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder


class SamMed3D(nn.Module):
    """SAM-Med3D (Wang et al., arXiv 2310.15161). Parameter names are those of the published checkpoint.

    The input is a cube of `shape.size` voxels, z-normalised, axes (x, y, z).
    """

    def __init__(self, shape: Architecture = FULL) -> None:
        super().__init__()
        self.shape = shape
        self.image_encoder = ImageEncoder(shape)
        self.prompt_encoder = PromptEncoder(shape)
        self.mask_decoder = MaskDecoder(shape)

    def masks(
        self, features: Tensor, points: Tensor, labels: Tensor, mask: Tensor | None = None, several: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution mask logits and predicted IoU for prompts.

        Args:
            features: (1 or B, C, g, g, g) of the image encoder.
            points: (B, N, 3) voxel indices of the input cube.
            labels: (B, N): 1 inside, 0 outside.
            mask: (B, 1, 4g, 4g, 4g) logits; None: no mask was given.
            several: three masks for an ambiguous prompt instead of one.
        """
        sparse = self.prompt_encoder.sparse(points, labels)
        dense = self.prompt_encoder.dense(mask, len(points))
        found: tuple[Tensor, Tensor] = self.mask_decoder(
            features, self.prompt_encoder.dense_position(), sparse, dense, several
        )
        return found

    def upscaled(self, masks: Tensor) -> Tensor:
        """Mask logits on the input's voxels: (B, n, 4g, 4g, 4g) -> (B, n, s, s, s)."""
        return F.interpolate(masks, size=[self.shape.size] * 3, mode="trilinear", align_corners=False)
