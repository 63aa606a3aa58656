"""Norms over the last dimension, with the convention of their gain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slim.compiler.dialect._register import define


def _rms_norm(
    x: Tensor, weight: Tensor | None, *, eps: float, offset: float = 0.0, gain_in_float: bool = False
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), the root in float32 (Zhang & Sennrich, 2019).

    ``offset`` is 1 for models that store the gain as ``1 + w``; ``gain_in_float`` says whether the gain is applied
    before (True) or after (False) rounding back to x's dtype.
    """
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return y.to(x.dtype)
    if gain_in_float:
        return (y * (weight.float() + offset)).to(x.dtype)
    return y.to(x.dtype) * (weight + offset if offset else weight)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, offset: float = 0.0) -> Tensor:
    """(x - mean) / sqrt(var + eps) * (weight + offset) + bias (Ba et al., 2016)."""
    if weight is not None and offset:
        weight = weight + offset
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _same_as_x(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rms_norm_fake(x: Tensor, weight: Tensor | None, **kwargs: object) -> Tensor:
    dtype = x.dtype if weight is None or kwargs.get("gain_in_float") else torch.promote_types(x.dtype, weight.dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


define(
    "rms_norm(Tensor x, Tensor? weight, *, float eps, float offset=0.0, bool gain_in_float=False) -> Tensor",
    _rms_norm,
    _rms_norm_fake,
)
define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, *, float eps, float offset=0.0) -> Tensor",
    _layer_norm,
    _same_as_x,
)
