"""What a KV cache holds of keys and values: floats, or int8 or packed int4 numbers, a scale a token and head."""

from __future__ import annotations

import torch
from torch import Tensor

from slim.compiler.dialect.quant import _quantize, _token_scale, _unpack_int4, pack_int4

LEVELS = {8: (-128, 127), 4: (-8, 7)}  # bits -> the numbers that slim.quantize may choose


def bits_of(dtype: torch.dtype) -> int:
    """Bits of a number in a cache of ``dtype``; 0 where it holds floats."""
    return {torch.int8: 8, torch.uint8: 4}.get(dtype, 0)


def hold(x: Tensor, cache: Tensor, scale: Tensor | None, start: int) -> None:
    """Writes x [B, G, S, n] at ``start`` into a cache [B, G, C, n], rounded where there is a scale [B, G, C].

    An int8 cache has n numbers a row; a uint8 one n / 2 bytes, as ``slim.unpack_int4`` reads them.
    """
    end = start + x.shape[2]
    if scale is None:
        cache[:, :, start:end].copy_(x)
        return
    bits = bits_of(cache.dtype)
    step = _token_scale(x, bits=bits)
    low, high = LEVELS[bits]
    numbers = _quantize(x, step, axis=2, low=low, high=high)
    cache[:, :, start:end].copy_(pack_int4(numbers) if bits == 4 else numbers)
    scale[:, :, start:end].copy_(step)


def held(cache: Tensor, scale: Tensor | None, first: int, end: int, dtype: torch.dtype) -> Tensor:
    """Tokens first..end - 1 of a cache, as floats of ``dtype`` where it holds numbers."""
    part = cache[:, :, first:end]
    if scale is None:
        return part
    numbers = _unpack_int4(part) if bits_of(cache.dtype) == 4 else part
    return (numbers.float() * scale[:, :, first:end, None]).to(dtype)


def add_mass(mass: Tensor, weights: Tensor, start: int, votes: int) -> None:
    """Adds to mass [B, G, C] what keys get of ``weights`` [B, H, S, T], of the last ``votes`` queries or, for 0, all.

    Keys from ``start`` on are new, and begin at nothing; so do all where there are ``votes`` queries or more.
    """
    _, _, queries, keys = weights.shape
    counted = weights[:, :, max(0, queries - votes) if votes else 0 :].float()
    mass[:, :, 0 if 0 < votes <= queries else start : keys] = 0.0
    mass[:, :, :keys] += counted.unflatten(1, (mass.shape[1], -1)).sum((2, 3))


# -- pages -------------------------------------------------------------------------------------------------------------


def pages_of(table: Tensor, tokens: int, size: int, fixed: int) -> Tensor:
    """The page of each block of a row's first ``tokens``, whose pages ``table`` [P] names; see ``paged_attention``."""
    blocks = torch.arange(-(-tokens // size), device=table.device)
    turning = table.shape[0] - fixed
    columns = torch.where(blocks < table.shape[0], blocks, fixed + (blocks - fixed) % max(turning, 1))
    return table[columns].long()


def gathered(cache: Tensor, pages: Tensor) -> Tensor:
    """The tokens in ``pages`` of a cache [pages, G, size, ...], side by side: [1, G, tokens, ...]."""
    return cache[pages].transpose(0, 1).flatten(1, 2)[None]


def scattered(cache: Tensor, pages: Tensor, tokens: Tensor) -> None:
    """Puts back what ``gathered`` took; a page that was taken twice holds the later tokens."""
    blocks = tokens[0].unflatten(1, (pages.shape[0], -1)).transpose(0, 1)
    last = {page: block for block, page in enumerate(pages.tolist())}
    where = torch.tensor(list(last.values()), device=cache.device)
    cache[pages[where]] = blocks[where]
