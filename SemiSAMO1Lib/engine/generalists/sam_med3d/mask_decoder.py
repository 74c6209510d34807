"""The mask decoder: a two-way transformer between prompt tokens and image features, then masks and their quality."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architecture import Architecture
from .layers import Head, LayerNorm3d, Mlp

#: Masks that one prompt yields: one for a clear prompt, three for an ambiguous one.
MASKS = 4


class MaskDecoder(nn.Module):
    """Features and prompts -> low-resolution mask logits (B, 1 or 3, 4g, 4g, 4g) and predicted IoU (B, 1 or 3)."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        channels = shape.out_channels
        self.transformer = TwoWayTransformer(channels, depth=2, heads=8, hidden=2048)
        self.iou_token = nn.Embedding(1, channels)
        self.mask_tokens = nn.Embedding(MASKS, channels)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose3d(channels, channels // 4, 2, 2),
            LayerNorm3d(channels // 4),
            nn.GELU(),
            nn.ConvTranspose3d(channels // 4, channels // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            Head(channels, channels, channels, channels // 8) for _ in range(MASKS)
        )
        self.iou_prediction_head = Head(channels, 256, 256, MASKS)

    def forward(
        self, features: Tensor, position: Tensor, sparse: Tensor, dense: Tensor, several: bool = False
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            features: (1 or B, C, g, g, g) of the image encoder.
            position: (1, C, g, g, g) of `PromptEncoder.dense_position`.
            sparse: (B, N, C) prompt tokens.
            dense: (B, C, g, g, g) mask embedding.
            several: three masks for an ambiguous prompt instead of one.

        Returns:
            mask logits and IoU predictions (no sigmoid).
        """
        batch, grid = len(sparse), features.shape[2:]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(batch, -1, -1), sparse], 1)
        image = (features + dense).flatten(2).transpose(1, 2)
        tokens, image = self.transformer(image, position.flatten(2).transpose(1, 2), tokens)
        upscaled = self.output_upscaling(image.transpose(1, 2).reshape(batch, -1, *grid))
        weights = torch.stack([head(tokens[:, 1 + n]) for n, head in enumerate(self.output_hypernetworks_mlps)], 1)
        masks = torch.einsum("bmc,bcxyz->bmxyz", weights, upscaled)
        quality = self.iou_prediction_head(tokens[:, 0])
        chosen = slice(1, None) if several else slice(0, 1)
        return masks[:, chosen], quality[:, chosen]


class TwoWayTransformer(nn.Module):
    """Tokens look at the image, the image looks at the tokens; `depth` times."""

    def __init__(self, channels: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(channels, heads, hidden, first=n == 0) for n in range(depth))
        self.final_attn_token_to_image = CrossAttention(channels, channels // 2, heads)
        self.norm_final_attn = nn.LayerNorm(channels)

    def forward(self, image: Tensor, position: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, n, C), its position encoding (1, n, C) and tokens (B, N, C) -> tokens and image."""
        initial = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, initial, position)
        attended = self.final_attn_token_to_image(tokens + initial, image + position, image)
        return self.norm_final_attn(tokens + attended), image


class TwoWayBlock(nn.Module):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens. The first block's self-attention is bare."""

    def __init__(self, channels: int, heads: int, hidden: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = CrossAttention(channels, channels, heads)
        self.norm1 = nn.LayerNorm(channels)
        self.cross_attn_token_to_image = CrossAttention(channels, channels // 2, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, hidden, nn.ReLU())
        self.norm3 = nn.LayerNorm(channels)
        self.norm4 = nn.LayerNorm(channels)
        self.cross_attn_image_to_token = CrossAttention(channels, channels // 2, heads)

    def forward(self, tokens: Tensor, image: Tensor, initial: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:  # neither position nor residual, as in SAM
            tokens = self.norm1(self.self_attn(tokens, tokens, tokens))
        else:
            placed = tokens + initial
            tokens = self.norm1(tokens + self.self_attn(placed, placed, tokens))
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + initial, image + position, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(image + position, tokens + initial, tokens))
        return tokens, image


class CrossAttention(nn.Module):
    """Multi-head attention with an inner size of its own: (B, n, C) queries, (B, m, C) keys and values."""

    def __init__(self, channels: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(channels, inner)
        self.k_proj = nn.Linear(channels, inner)
        self.v_proj = nn.Linear(channels, inner)
        self.out_proj = nn.Linear(inner, channels)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(queries), self.k_proj(keys), self.v_proj(values))
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out
