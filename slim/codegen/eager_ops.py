"""The functions that an eager executable calls: what the dialect's operations mean, in few calls of PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slim.compiler.blocks import row_blocks
from slim.compiler.dialect.attention import attend_to, visibility
from slim.compiler.dialect.experts import _expert_linear as expert_linear
from slim.compiler.dialect.kv import held, hold
from slim.compiler.dialect.norm import _rms_norm
from slim.compiler.dialect.quant import _unpack_int3, _unpack_int4, _unpack_nf4
from slim.compiler.dialect.rope import _rope as rope
from slim.compiler.dialect.rope import _rope_table as rope_table

__all__ = ["expert_linear", "rope", "rope_table"]

# -- norms and rotation ------------------------------------------------------------------------------------------------


def rms_norm(
    x: Tensor, weight: Tensor | None, *, eps: float, offset: float = 0.0, gain_in_float: bool = False
) -> Tensor:
    """``slim.rms_norm``; in float32, where nothing is rounded on the way, PyTorch's own."""
    if x.dtype != torch.float32:
        return _rms_norm(x, weight, eps=eps, offset=offset, gain_in_float=gain_in_float)
    gain = weight + offset if offset and weight is not None else weight
    if gain is not None and gain.dtype != torch.float32:
        gain = gain.float()
    return F.rms_norm(x, x.shape[-1:], gain, eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, offset: float = 0.0) -> Tensor:
    """``slim.layer_norm``."""
    if weight is not None and offset:
        weight = weight + offset
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def widen_angles(cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """cos and sin [B,S,R/2] as factors [B,1,S,R] of a channel and of its partner."""
    if interleaved:
        factors = cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)
    else:
        factors = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return factors[0].unsqueeze(1), factors[1].unsqueeze(1)


def rotate(x: Tensor, factors: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """``slim.rope`` of x [B,H,S,D] by widened angles."""
    own, partner = factors
    width = own.shape[-1]
    turned = x if width == x.shape[-1] else x[..., :width]
    if interleaved:
        partners = turned.unflatten(-1, (width // 2, 2)).flip(-1).flatten(-2)
    else:
        partners = turned.roll(width // 2, dims=-1)
    turned = torch.addcmul(turned * own, partners, partner)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)


# -- attention ---------------------------------------------------------------------------------------------------------


def seen_keys(q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool, window: int | None) -> Tensor | None:
    """Which keys the queries of ``slim.attention`` see; None where it is all, or all up to their own."""
    queries, keys = q.shape[2], k.shape[2]
    if key_mask is None and (window is None or (causal and window >= keys)) and (queries == keys or not causal):
        return None
    return visibility(key_mask, queries, keys, causal=causal, window=window, device=q.device)


def attention(
    seen: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    softcap: float | None,
    causal: bool,
) -> Tensor:
    """``slim.attention``, knowing which keys are seen."""
    if seen is None and causal and q.shape[2] > 1:
        if bias is None and sinks is None and slopes is None and softcap is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        seen = visibility(None, q.shape[2], k.shape[2], causal=True, window=None, device=q.device)
    return attend_to(seen, q, k, v, bias, sinks, slopes, scale=scale, softcap=softcap)


def seen_cached_keys(q: Tensor, key_mask: Tensor | None, start: int, window: int | None) -> Tensor | None:
    """Which keys, from the first that ``cached_attention`` reads, new queries see; None as in ``seen_keys``."""
    queries = q.shape[2]
    first = _first_key(start, window)
    if key_mask is not None:
        key_mask = key_mask[:, first:]
    if queries == 1:  # the newest token sees all there is, and the window has cut off what it must not
        return None if key_mask is None else key_mask[:, None, None]
    if key_mask is None and start == 0 and (window is None or window >= queries):
        return None
    end = start + queries - first
    return visibility(key_mask, queries, end, causal=True, window=window, offset=start - first, device=q.device)


def _first_key(start: int, window: int | None) -> int:
    return 0 if window is None else max(0, start - window + 1)


def cached_attention(
    seen: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    start: int,
    window: int | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """``slim.cached_attention``, which is causal, knowing which keys are seen."""
    end = start + q.shape[2]
    hold(k, k_cache, k_scale, start)
    hold(v, v_cache, v_scale, start)
    first = _first_key(start, window)
    keys, values = held(k_cache, k_scale, first, end, k.dtype), held(v_cache, v_scale, first, end, v.dtype)
    if start == 0:
        return attention(seen, q, keys, values, None, sinks, slopes, scale, softcap, True)
    return attend_to(seen, q, keys, values, None, sinks, slopes, scale=scale, softcap=softcap, offset=start - first)


# -- quantised operations ----------------------------------------------------------------------------------------------

_UNPACKS = {"int4": _unpack_int4, "int3": _unpack_int3, "nf4": _unpack_nf4}

# Rows of int8 are widened a block at a time, so that the float copy stays in the cache. Measured on AVX2, elements a
# block: small ones are best for a few tokens (three quarters of the time of large ones), large ones where the product
# dominates; what is no larger than _WHOLE is not worth cutting.
_FEW_TOKENS = 8
_SMALL_BLOCK, _LARGE_BLOCK, _WHOLE = 1 << 17, 1 << 20, 1 << 19


def int8_linear(x: Tensor, q: Tensor, scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """x (q * scale)^T + bias for x [..., n], q int8 or fp8 [m, n], scale [m], which is applied to the product."""
    if dtype == torch.float32:
        y = _widened_product(x, q).mul_(scale)
    elif dtype == torch.bfloat16 and _has_kernel(x := x.contiguous(), q):
        ones = torch.ones(q.shape[0], dtype=dtype)  # a scale rounded to bfloat16 would bias its whole row
        y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), q, ones) * scale
        y = y.to(dtype).view(*x.shape[:-1], q.shape[0])
    else:
        y = F.linear(x, (q.float() * scale[:, None]).to(dtype))
    return y if bias is None else y + bias


def _has_kernel(x: Tensor, q: Tensor) -> bool:
    """Whether torch's int8 kernel, faster than bfloat16 itself, may be used: on a CPU, on aligned rows of int8.

    It loads 16 numbers at a time from aligned addresses and checks neither: a width of 51 ends the process.
    """
    aligned = x.shape[-1] % 16 == 0 and x.data_ptr() % 32 == 0 and q.data_ptr() % 32 == 0
    return x.device.type == "cpu" and q.dtype == torch.int8 and aligned and q.is_contiguous()


def _widened_product(x: Tensor, q: Tensor) -> Tensor:
    if q.numel() <= _WHOLE:
        return F.linear(x, q.to(torch.float32))
    elements = _SMALL_BLOCK if x.numel() <= _FEW_TOKENS * x.shape[-1] else _LARGE_BLOCK
    block = max(1, elements // q.shape[1])
    return torch.cat([F.linear(x, part.to(torch.float32)) for part in q.split(block)], dim=-1)


def int8_embedding(q: Tensor, scale: Tensor, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    """Rows ``tokens`` of q * scale: only the rows that are asked for are widened."""
    return (F.embedding(tokens, q).float() * F.embedding(tokens, scale[:, None])).to(dtype)


def int8_expert_linear(
    x: Tensor, q: Tensor, scale: Tensor, dtype: torch.dtype, bias: Tensor | None, expert: Tensor
) -> Tensor:
    """``slim.expert_linear`` for q int8 [E, m, n] and scale [E, m]: only the experts that are asked for are read."""

    def linear(rows: Tensor, index: int) -> Tensor:
        return int8_linear(rows, q[index], scale[index], dtype, _of(bias, index))

    return _by_expert(linear, x, q.shape[1], expert)


def grouped_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    kind: str | None,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """x w^T + bias for w [m, n] of scales, and zero points, [m, n / group]; q are numbers, or packed as ``kind`` says.

    Columns of int4 are not put back in order, which would cost as much again as widening them: the even ones are
    multiplied with the even ones of x, and the odd ones with the odd.
    """
    halves = kind == "int4" and (x.shape[-1] // scale.shape[-1]) % 2 == 0
    inputs = (x[..., 0::2].contiguous(), x[..., 1::2].contiguous()) if halves else (x,)
    products = []
    for rows in row_blocks(q.shape):
        part = q[rows]
        steps = (_centred(part & 15), _centred(part >> 4)) if halves else (_unpacked(part, kind),)
        zeros = None if zero is None else zero[rows]
        terms = [F.linear(x, _scaled(w, scale[rows], zeros, dtype)) for x, w in zip(inputs, steps, strict=True)]
        products.append(terms[0] + terms[1] if halves else terms[0])
    y = torch.cat(products, dim=-1)
    return y if bias is None else y + bias


def _centred(nibbles: Tensor) -> Tensor:
    return nibbles.view(torch.int8).sub_(8)


def _unpacked(q: Tensor, kind: str | None) -> Tensor:
    return q if kind is None else _UNPACKS[kind](q)


def _scaled(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """q [..., n], less zero [..., groups], times scale [..., groups], in float32, rounded to ``dtype``."""
    groups = q.unflatten(-1, (scale.shape[-1], -1)).to(torch.float32)
    if zero is not None:
        groups.sub_(zero.unsqueeze(-1))
    return groups.mul_(scale.to(torch.float32).unsqueeze(-1)).flatten(-2).to(dtype)


def grouped_embedding(
    q: Tensor, scale: Tensor, zero: Tensor | None, kind: str | None, dtype: torch.dtype, tokens: Tensor
) -> Tensor:
    """Rows ``tokens`` of a table as ``grouped_linear`` has it."""
    rows = _unpacked(F.embedding(tokens, q), kind)
    return _scaled(rows, F.embedding(tokens, scale), None if zero is None else F.embedding(tokens, zero), dtype)


def grouped_expert_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    kind: str | None,
    dtype: torch.dtype,
    bias: Tensor | None,
    expert: Tensor,
) -> Tensor:
    """``slim.expert_linear`` for a stack of weights as ``grouped_linear`` has them."""

    def linear(rows: Tensor, index: int) -> Tensor:
        zeros = None if zero is None else zero[index]
        return grouped_linear(rows, q[index], scale[index], zeros, kind, dtype, _of(bias, index))

    return _by_expert(linear, x, q.shape[1], expert)


def _by_expert(linear: Callable[[Tensor, int], Tensor], x: Tensor, width: int, expert: Tensor) -> Tensor:
    """Row t of x by ``linear`` of expert[t]: experts that no row asks for are not read."""
    y = x.new_empty(x.shape[0], width)
    for index in torch.unique(expert).tolist():
        rows = (expert == index).nonzero(as_tuple=True)[0]
        y[rows] = linear(x[rows], index)
    return y


def _of(bias: Tensor | None, index: int) -> Tensor | None:
    return None if bias is None else bias[index]
