"""The image encoder: a vision transformer on 16³ patches; 8 of its 12 blocks attend within windows.

Two properties of the published weights have to be kept. The relative-position bias adds its three terms along other
axes than their names say. And windows are padded to a fixed size with tokens that take part in the softmax. All padded
tokens of a window have the same key and value, so their total weight has a closed form: one virtual key stands for all
of them, exactly, and 512 queries with 513 keys replace 2744 with 2744.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architecture import Architecture
from .layers import LayerNorm3d, Mlp


class ImageEncoder(nn.Module):
    """(B, 1, s, s, s) z-normalised intensities -> (B, out_channels, g, g, g) features, g = s / 16.

    The axes are those of the input; SAM-Med3D was trained on (x, y, z).
    """

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.size = shape.size
        grid, channels, out = shape.grid, shape.embed_dim, shape.out_channels
        self.patch_embed = PatchEmbed(channels, shape.patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, grid, channels))
        windows = [grid if n in shape.global_blocks else shape.window for n in range(shape.depth)]
        self.blocks = nn.ModuleList(Block(channels, shape.heads, 4 * channels, window) for window in windows)
        self.neck = nn.Sequential(
            nn.Conv3d(channels, out, 1, bias=False),
            LayerNorm3d(out),
            nn.Conv3d(out, out, 3, padding=1, bias=False),
            LayerNorm3d(out),
        )

    def forward(self, volume: Tensor) -> Tensor:
        if volume.shape[1:] != (1, self.size, self.size, self.size):
            raise ValueError(f"the encoder needs (B, 1, s, s, s) with s = {self.size}, got {tuple(volume.shape)}")
        tokens = self.patch_embed(volume) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        features: Tensor = self.neck(tokens.movedim(-1, 1))
        return features


class PatchEmbed(nn.Module):
    """Cut into patches, each described by a linear map: (B, 1, s, s, s) -> (B, g, g, g, d)."""

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(1, channels, patch, patch)

    def forward(self, volume: Tensor) -> Tensor:
        embedded: Tensor = self.proj(volume)
        return embedded.movedim(1, -1)


class Block(nn.Module):
    """Attention within windows of `window`³ tokens, then an MLP, each behind a layer norm and added."""

    def __init__(self, channels: int, heads: int, hidden: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels, hidden, nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self._attend(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))

    def _attend(self, tokens: Tensor) -> Tensor:
        """Attention window by window; those at the end of an axis hold fewer tokens."""
        if max(tokens.shape[1:4]) <= self.window:
            return self.attn(tokens)
        out = torch.empty_like(tokens)
        ranges = [[slice(a, a + self.window) for a in range(0, n, self.window)] for n in tokens.shape[1:4]]
        for window in itertools.product(*ranges):
            out[:, *window] = self.attn(tokens[:, *window])
        return out


class Attention(nn.Module):
    """Multi-head attention of one window with the relative-position bias as trained.

    For a query at (a, b, c) and a key at (i, j, l) of the same window, with unscaled queries Q and tables
    T[u, v] = rel_pos[u - v + n - 1]:

        bias = Q[a,b,c]·Td[a,l] + Q[a,b,i]·Th[b,l] + Q[a,b,j]·Tw[j,l]
    """

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        size = channels // heads
        self.rel_pos_d = nn.Parameter(torch.zeros(2 * window - 1, size))
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * window - 1, size))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * window - 1, size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, D, H, W, d) of one window, each extent at most the window's; the rest of it counts as padding."""
        batch, *extent, channels = tokens.shape
        # the K part of the bias shifts all logits of a query alike: it is kept only because it costs nothing
        q, k, v = self.qkv(tokens).reshape(batch, *extent, 3, self.heads, -1).permute(4, 0, 5, 1, 2, 3, 6)
        with torch.autocast(q.device.type, enabled=False):  # sums of exponentials need more than half precision
            bias, padding = self._bias(q)
        q, k, v = (one.flatten(2, 4) for one in (q, k, v))  # (B, heads, tokens, size)
        if padding is not None:
            _, key, value = self.qkv.bias.to(k.dtype).reshape(3, 1, self.heads, 1, -1)
            k = torch.cat([k, key.expand(batch, -1, -1, -1)], 2)
            v = torch.cat([v, value.expand(batch, -1, -1, -1)], 2)
            bias = torch.cat([bias, padding], -1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(batch, *extent, channels))
        return out

    def _bias(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Additive logits from queries (B, heads, D, H, W, size).

        Returns:
            for real keys (B, heads, D·H·W, D·H·W), and for the virtual key that stands for all padded tokens
            (B, heads, D·H·W, 1); None for a window without padding. At least float32.
        """
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        d, h, w = q.shape[2:5]
        n = self.window
        padded = self.qkv.bias.to(q.dtype)[: q.shape[1] * q.shape[-1]].reshape(1, q.shape[1], 1, 1, 1, -1)
        row = torch.cat([q, padded.expand(len(q), -1, d, h, n - w, -1)], 4)  # the queries of a row, padding included
        offset = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device) + n - 1
        along_d, along_h, along_w = (
            torch.einsum(rule, queries, table.to(q.dtype)[offset[:rows]])
            for rule, queries, table, rows in (
                ("zmabcs,als->zmabcl", q, self.rel_pos_d, d),
                ("zmabis,bls->zmabil", row, self.rel_pos_h, h),
                ("zmabjs,jls->zmabjl", row, self.rel_pos_w, n),
            )
        )
        real = (
            along_d[:, :, :, :, :, None, None, :w]
            + along_h[:, :, :, :, None, :d, None, :w]
            + along_w[:, :, :, :, None, None, :h, :w]
        )
        real = real.reshape(len(q), self.heads, d * h * w, d * h * w)
        if (d, h, w) == (n, n, n):
            return real, None
        return real, _padding_logit(along_d, along_h, along_w, (d, h, w)).reshape(len(q), self.heads, d * h * w, 1)


def _padding_logit(along_d: Tensor, along_h: Tensor, along_w: Tensor, extent: tuple[int, int, int]) -> Tensor:
    """Logarithm of the summed weights of all padded keys, for every query.

    A key (i, j, l) is padded if i >= D, j >= H or l >= W. For a fixed l the sum over (i, j) is a product of sums.

    Args:
        along_d: (..., W, n) terms of query c and key l.
        along_h: (..., n, n) terms of key i and key l.
        along_w: (..., n, n) terms of key j and key l.
        extent: real tokens along each axis, D, H, W.

    Returns:
        (..., W).
    """
    d, h, w = extent
    real_i, padded_i, all_i = (
        along_h[..., :d, :].logsumexp(-2),
        along_h[..., d:, :].logsumexp(-2),
        along_h.logsumexp(-2),
    )
    padded_j, all_j = along_w[..., h:, :].logsumexp(-2), along_w.logsumexp(-2)
    inside = torch.logaddexp(padded_i + all_j, real_i + padded_j)  # l < W: i or j is padded
    outside = all_i + all_j  # l >= W: every (i, j)
    weight = torch.cat([inside[..., :w], outside[..., w:]], -1)
    return (along_d + weight[..., None, :]).logsumexp(-1)
