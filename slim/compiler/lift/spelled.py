"""Calls that torch.export cannot take, or that are outside of the dialect, as calls that are in it.

They are exchanged as the model calls them, whoever captures it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SpelledOut(TorchFunctionMode):
    """While it is entered, what stands in ``_SPELLED`` is called instead of the functions that it stands for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _SPELLED.get(_name(func), func)(*args, **(kwargs or {}))


def _name(func: Any) -> str:
    """Of a function, a method of Tensor or an operator that a library has registered: ``transformers::attend``."""
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.name
    if isinstance(func, torch._ops.OpOverloadPacket):
        return func._qualified_op_name
    return getattr(func, "__name__", "")


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """A product and a sum: torch's own shape function for it refuses symbolic sizes."""
    return input * beta + torch.bmm(batch1, batch2) * alpha


def _grouped_mm(
    input: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """Rows [S,n] that are sorted by expert, times weight [E,n,m]; ``offs`` [E]: where the rows of each end."""
    if input.dim() != 2 or weight.dim() != 3 or offs is None or bias is not None or out_dtype is not None:
        return torch._grouped_mm(input, weight, offs=offs, bias=bias, out_dtype=out_dtype)
    rows = torch.arange(input.shape[0], dtype=offs.dtype, device=offs.device)
    expert = torch.searchsorted(offs, rows, right=True)
    return torch.ops.slim.expert_linear(input, weight.transpose(1, 2), None, expert)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, mask_type: int | None) -> Tensor:
    """q, k, v [B,S,E] to [B,S,E]. ``mask`` is not zero at what is hidden: [S,S] (0), [B,S] (1), [B,heads,S,S] (2)."""
    seen = None if mask is None else mask.to(torch.bool).logical_not()
    if seen is not None and mask_type == 1:
        seen = seen[:, None, None, :]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(-2)


def _native_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True,
    average_attn_weights: bool = True, mask_type: int | None = None,
) -> Any:  # fmt: skip
    """nn.MultiheadAttention in one call, as it is in evaluation."""
    if need_weights or query.is_nested:
        return torch._native_multi_head_attention(
            query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, need_weights,
            average_attn_weights, mask_type,
        )  # fmt: skip
    if query is key is value:
        q, k, v = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:
        sides = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        q, k, v = (F.linear(*side) for side in sides)
    return F.linear(_attend(q, k, v, num_head, mask, mask_type), proj_weight, proj_bias), None


def _encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """nn.TransformerEncoderLayer in one call, as it is in evaluation: passes see nothing of what is in it."""

    def first_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attention(x: Tensor) -> Tensor:
        q, k, v = F.linear(x, qkv_weight, qkv_bias).chunk(3, -1)
        return F.linear(_attend(q, k, v, num_heads, mask, mask_type), proj_weight, proj_bias)

    def mlp(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attention(first_norm(src))
        return x + mlp(second_norm(x))
    x = first_norm(src + attention(src))
    return second_norm(x + mlp(x))


_SPELLED = {
    "_native_multi_head_attention": _native_attention,
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "baddbmm": _baddbmm,
    "_grouped_mm": _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm,
}
