"""Attention: who may look at whom, softmax(QK^T)V, and the same over a key/value cache.

Row ``i`` of the queries is the token with index ``offset + i``; key ``j`` is visible to it when
``j <= i`` (causal), ``i - j < window`` (and ``j - i < window`` when not causal), ``key_mask[b, j]``, and ``pattern``
keeps it (slim/compiler/patterns). A row that sees no key yields zeros. With ``skip``, a lowered form may leave out keys
that hold no more than that share of a row's attention; the reference leaves out nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slim.compiler.dialect._register import define
from slim.compiler.dialect.kv import add_mass, gathered, held, hold, pages_of, scattered
from slim.compiler.patterns.mask import note_bounds, pattern_mask


def visibility(
    key_mask: Tensor | None,
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int | None,
    offset: int = 0,
    device: torch.device | None = None,
) -> Tensor | None:
    """Boolean [B or 1, 1, queries, keys]: True where the key may be seen; None where every key may be."""
    if not causal and window is None and key_mask is None:
        return None
    if key_mask is not None:
        device = key_mask.device
    row = torch.arange(offset, offset + queries, device=device)[:, None]
    column = torch.arange(keys, device=device)[None, :]
    seen = column <= row if causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
    if window is not None:
        seen = seen & (row - column < window)
        if not causal:
            seen = seen & (column - row < window)
    seen = seen[None, None]
    return seen if key_mask is None else seen & key_mask[:, None, None, :]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    pattern: str | None = None,
    offset: int = 0,
) -> Tensor:
    """softmax(scale * q k^T) v for q [B,H,S,D], k [B,G,T,D], v [B,G,T,E]; query head h reads kv head h // (H/G)."""
    queries, keys = q.shape[2], k.shape[2]
    whole = bool(causal and queries == keys and offset == 0)
    plain = softcap is None and sinks is None and pattern is None
    if plain and bias is None and slopes is None and key_mask is None and window is None and (whole or not causal):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=bool(causal and queries > 1), scale=scale, enable_gqa=True
        )
    if queries == 1 and window is None and key_mask is None and causal and offset + 1 == keys:
        seen = None  # the newest token sees everything there is
    else:
        seen = visibility(key_mask, queries, keys, causal=causal, window=window, offset=offset, device=q.device)
    if pattern is not None:
        kept = pattern_mask(pattern, q, k, seen, key_mask, scale=scale, offset=offset)
        seen = kept if seen is None else seen & kept
    return attend_to(seen, q, k, v, bias, sinks, slopes, scale=scale, softcap=softcap, offset=offset)


def attend_to(
    seen: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    offset: int = 0,
) -> Tensor:
    """``attend`` once it is known which keys are seen: bool, [B or 1, H or 1, S, T], None for all of them."""
    bias = _with_slopes(bias, slopes, q.shape[2], k.shape[2], offset, q.dtype)
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, _additive(seen, bias), scale=scale, enable_gqa=True)
    return _attend_by_hand(q, k, v, seen, bias, sinks, scale, softcap)


def _with_slopes(
    bias: Tensor | None, slopes: Tensor | None, queries: int, keys: int, offset: int, dtype: torch.dtype
) -> Tensor | None:
    """ALiBi: slope[h] * (j - i), added to whatever bias there is."""
    if slopes is None:
        return bias
    row = torch.arange(offset, offset + queries, device=slopes.device)[:, None]
    distance = torch.arange(keys, device=slopes.device)[None, :] - row
    alibi = (slopes.float()[:, None, None] * distance).to(dtype)[None]
    if bias is None:
        return alibi
    return alibi.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else bias + alibi


def _additive(seen: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if seen is None or bias is None:
        return seen if bias is None else bias
    if bias.dtype == torch.bool:
        return seen & bias
    return torch.where(seen, bias, float("-inf"))


def _attend_by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = _additive(seen, bias)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = _softmax(scores.float()).to(q.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(weights, v)


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension; zeros, and no gradient, for a row of nothing but -inf."""
    empty = scores.amax(dim=-1, keepdim=True) == float("-inf")
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    layer: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    pattern: str | None = None,
    skip: float | None = None,
) -> Tensor:
    return attend(
        q, k, v, key_mask, bias, sinks, slopes, scale=scale, causal=causal, window=window, softcap=softcap,
        pattern=pattern,
    ).contiguous()  # fmt: skip


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


def _cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_bounds: Tensor | None = None,
    mass: Tensor | None = None,
    *,
    layer: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    pattern: str | None = None,
    skip: float | None = None,
    votes: int = 0,
    q_first: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """``attention`` over the tokens that the caches hold, the new ones written at ``start`` first.

    ``mass`` float32 [B, G, C] counts what each key gets: softmax's weights, of the queries that read its head, of the
    last ``votes`` of a call or, for 0, all. New keys begin at 0; so do all where ``votes`` queries or more come.
    """
    end = start + q.shape[2]
    hold(k, k_cache, k_scale, start)
    hold(v, v_cache, v_scale, start)
    if k_bounds is not None:
        note_bounds(pattern, held(k_cache, k_scale, 0, end, torch.float32), key_mask, k_bounds)
    begin = 0
    if window is not None and pattern is None and mass is None and start - window + 1 > 0:  # no query sees those before
        begin = start - window + 1
        key_mask = None if key_mask is None else key_mask[:, begin:]
    keys = held(k_cache, k_scale, begin, end, k.dtype)
    if q_first is not None:  # keys as pairs of which each query meets one: k, 0 and 0, k for the first of them
        there = (torch.arange(end, device=k.device) < first)[:, None]
        q, keys = torch.cat([q, q_first], -1), torch.cat([keys.masked_fill(there, 0.0), keys * there], -1)
    look: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap, "pattern": pattern}
    look["offset"] = start - begin
    if mass is not None:  # over unit vectors as values, attention is its weights
        units = torch.eye(end, dtype=keys.dtype, device=keys.device).expand(*keys.shape[:2], end, end)
        add_mass(mass, attend(q, keys, units, key_mask, None, sinks, slopes, **look), start, votes)
    values = held(v_cache, v_scale, begin, end, v.dtype)
    return attend(q, keys, values, key_mask, None, sinks, slopes, **look).contiguous()


def _paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    lengths: Tensor,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_bounds: Tensor | None = None,
    q_first: Tensor | None = None,
    *,
    fixed: int = 0,
    first: int = 0,
    **options: Any,
) -> Tensor:
    """``cached_attention`` row by row, each over pages of its own: row b held ``lengths[b]`` tokens before.

    Token i of row b lies in page ``table[b, i // size]`` at ``i % size``, for caches [pages, G, size, D]. Where the
    table has fewer columns, it is a ring: those from ``fixed`` on take turns, and are written anew when their tokens
    are seen no longer. The ``first`` tokens of each row are looked at with ``q_first`` in place of q.
    """
    size, rows = k_cache.shape[2], []
    for row, start in enumerate(lengths.tolist()):
        one, pages = slice(row, row + 1), pages_of(table[row], start + q.shape[2], size, fixed)
        k_held, v_held = gathered(k_cache, pages), gathered(v_cache, pages)
        more = [None if cache is None else gathered(cache, pages) for cache in (k_scale, v_scale, k_bounds)]
        new = (q[one], k[one], v[one], k_held, v_held, start, None, sinks, slopes)
        other = None if q_first is None else q_first[one]
        rows.append(_cached_attention(*new, *more, q_first=other, first=first, **options))
        caches = (k_cache, v_cache, k_scale, v_scale, k_bounds)
        for cache, part in zip(caches, (k_held, v_held, *more), strict=True):
            if cache is not None and part is not None:
                scattered(cache, pages, part)
    return torch.cat(rows)


def _visibility(
    key_mask: Tensor | None,
    batch: int,
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int | None = None,
    additive: torch.dtype | None = None,
) -> Tensor:
    """[batch, 1, queries, keys]: True where visible, or 0 there and the lowest number of ``additive`` elsewhere."""
    seen = visibility(key_mask, queries, keys, causal=causal, window=window)
    if seen is None:
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    seen = seen.expand(batch, 1, queries, keys)
    if additive is None:
        return seen.contiguous()
    return torch.zeros(seen.shape, dtype=additive, device=seen.device).masked_fill(~seen, torch.finfo(additive).min)


def _visibility_fake(
    key_mask: Tensor | None,
    batch: int,
    queries: int,
    keys: int,
    *,
    additive: torch.dtype | None = None,
    **kwargs: object,
) -> Tensor:
    device = "cpu" if key_mask is None else key_mask.device
    return torch.empty(batch, 1, queries, keys, dtype=additive or torch.bool, device=device)


_LOOK = "bool causal=True, int? window=None, float? softcap=None, str? pattern=None, float? skip=None"
define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, Tensor? bias=None, Tensor? sinks=None, "
    f"Tensor? slopes=None, *, int layer, float scale, {_LOOK}) -> Tensor",
    _attention,
    _attention_fake,
)
define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, SymInt start, "
    "Tensor? key_mask=None, Tensor? sinks=None, Tensor? slopes=None, Tensor(c!)? k_scale=None, "
    f"Tensor(d!)? v_scale=None, Tensor(e!)? k_bounds=None, Tensor(f!)? mass=None, *, int layer, float scale, {_LOOK}, "
    "int votes=0) -> Tensor",
    _cached_attention,
    _attention_fake,
    differentiable=False,
)
define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor table, "
    "Tensor lengths, Tensor? sinks=None, Tensor? slopes=None, Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, "
    f"Tensor(e!)? k_bounds=None, Tensor? q_first=None, *, int layer, float scale, {_LOOK}, int fixed=0, int first=0) "
    "-> Tensor",
    _paged_attention,
    _attention_fake,
    differentiable=False,
)
define(
    "visibility(Tensor? key_mask, SymInt batch, SymInt queries, SymInt keys, *, bool causal, int? window=None, "
    "ScalarType? additive=None) -> Tensor",
    _visibility,
    _visibility_fake,
    differentiable=False,
)
