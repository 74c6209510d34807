"""The prompt encoder: points become tokens, a mask becomes a dense embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .architecture import Architecture
from .layers import LayerNorm3d


class PromptEncoder(nn.Module):
    """Points and a mask -> what the decoder is asked.

    Points are voxel indices of the input volume, in its axis order. Labels: 1 inside, 0 outside, -1 no point.
    """

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.shape = shape
        channels = shape.out_channels
        self.pe_layer = PositionEncoding(channels)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, channels) for _ in range(2))
        self.not_a_point_embed = nn.Embedding(1, channels)
        self.mask_downscaling = nn.Sequential(
            nn.Conv3d(1, 4, 2, 2),
            LayerNorm3d(4),
            nn.GELU(),
            nn.Conv3d(4, 16, 2, 2),
            LayerNorm3d(16),
            nn.GELU(),
            nn.Conv3d(16, channels, 1),
        )
        self.no_mask_embed = nn.Embedding(1, channels)

    def sparse(self, points: Tensor, labels: Tensor) -> Tensor:
        """Points (B, N, 3) and labels (B, N) -> (B, N + 1, C): one padding token that says "no box" is appended.

        N = 0 gives (B, 0, C): without points there is no padding token either.
        """
        if points.shape[1] == 0:
            return points.new_zeros(len(points), 0, self.shape.out_channels)
        points = torch.cat([points.float(), points.new_zeros(len(points), 1, 3)], 1)
        labels = torch.cat([labels, labels.new_full((len(labels), 1), -1)], 1)[..., None]
        tokens = self.pe_layer((points + 0.5) / self.shape.size)
        tokens = torch.where(labels == -1, self.not_a_point_embed.weight, tokens)
        for value in range(len(self.point_embeddings)):
            weight = self.point_embeddings.get_submodule(str(value)).get_parameter("weight")
            tokens = torch.where(labels == value, tokens + weight, tokens)
        return tokens

    def dense(self, mask: Tensor | None, batch: int = 1) -> Tensor:
        """Mask logits (B, 1, 4g, 4g, 4g), or None -> (B, C, g, g, g). The first click officially comes with zeros."""
        if mask is not None:
            embedded: Tensor = self.mask_downscaling(mask)
            return embedded
        grid = self.shape.grid
        return self.no_mask_embed.weight.reshape(1, -1, 1, 1, 1).expand(batch, -1, grid, grid, grid)

    def dense_position(self) -> Tensor:
        """Position encoding of the feature grid, (1, C, g, g, g). Its first two axes are exchanged, as trained."""
        grid = self.shape.grid
        matrix = self.pe_layer.positional_encoding_gaussian_matrix
        place = (torch.arange(grid, device=matrix.device, dtype=matrix.dtype) + 0.5) / grid
        i, j, k = torch.meshgrid(place, place, place, indexing="ij")
        return self.pe_layer(torch.stack([j, i, k], -1)).permute(3, 0, 1, 2)[None]


class PositionEncoding(nn.Module):
    """Places (..., 3) in [0, 1] -> (..., C): sine, cosine and sine again of random frequencies, as trained."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(3, channels // 3))

    def forward(self, places: Tensor) -> Tensor:
        phase = 2 * math.pi * ((2 * places - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([phase.sin(), phase.cos(), phase.sin()], -1)
