"""Rotary position embedding (Su et al., 2021): a table of angles, and the rotation of pairs of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from slim.compiler.dialect._register import define


def _rope_table(
    positions: Tensor, inv_freq: Tensor, *, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin of positions [B,S] times inv_freq [R/2], each [B,S,R/2], computed in float32 and then rounded."""
    angles = positions[..., None].float() * inv_freq.float()
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _rope_table_fake(
    positions: Tensor, inv_freq: Tensor, *, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, inv_freq.shape[0])
    return inv_freq.new_empty(shape, dtype=dtype), inv_freq.new_empty(shape, dtype=dtype)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotates the first R channels of x [B,H,S,D] by cos, sin [B,S,R/2]; the other D - R pass through.

    Channel p is paired with p + R/2, or 2p with 2p + 1 when interleaved.
    """
    half = cos.shape[-1]
    turned, kept = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    turned = turned.to(x.dtype)
    return torch.cat([turned, kept], dim=-1) if kept.shape[-1] else turned


def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


define(
    "rope_table(Tensor positions, Tensor inv_freq, *, float scale=1.0, ScalarType dtype=float32) -> (Tensor, Tensor)",
    _rope_table,
    _rope_table_fake,
    differentiable=False,
)
define("rope(Tensor x, Tensor cos, Tensor sin, *, bool interleaved=False) -> Tensor", _rope, _rope_fake)
