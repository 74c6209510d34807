"""Sizes of the model: the published one, and a small one with which its mechanisms are tested."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Sizes of SAM-Med3D; the defaults are the published `vit_b_ori`.

    Attributes:
        size: voxels along each axis of the input.
        patch: voxels along each axis of a patch.
        embed_dim, depth, heads: of the image encoder.
        global_blocks: blocks that attend to the whole volume; the others attend within windows.
        window: tokens along each axis of a window.
        out_channels: channels of the features, the prompts and the decoder.
    """

    size: int = 128
    patch: int = 16
    embed_dim: int = 768
    depth: int = 12
    heads: int = 12
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    window: int = 14
    out_channels: int = 384

    @property
    def grid(self) -> int:
        """Tokens along each axis."""
        return self.size // self.patch


#: The published model, 100.5 million parameters.
FULL = Architecture()

#: A model of the same kind, small enough for tests; no weights are published for it.
SMALL = Architecture(size=64, embed_dim=96, depth=2, heads=4, global_blocks=(1,), out_channels=96)

ARCHITECTURES = {"full": FULL, "small": SMALL}
