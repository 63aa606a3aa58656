"""What a pattern means: the keys that each query of a call keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from slim.compiler.patterns import read_pattern
from slim.compiler.patterns.choose import VOTERS, block_bounds, top_blocks, voted
from slim.compiler.patterns.terms import Term, Top, VerticalSlash


def pattern_mask(
    text: str, q: Tensor, k: Tensor, seen: Tensor | None, key_mask: Tensor | None, *, scale: float, offset: int
) -> Tensor:
    """bool [B or 1, H or 1, S, T], to be joined with ``seen`` by "and".

    Args:
        text: the pattern. q: [B, H, S, D]. k: [B, G, T, D].
        seen: bool [B or 1, 1, S, T], what may be seen at all; None for everything.
        key_mask: bool [B, T], False at padding; None where there is none.
        offset: row i of the queries is key offset + i.
    """
    pattern = read_pattern(text)
    heads = range(q.shape[1])
    made = {terms: _kept(terms, q, k, seen, key_mask, scale, offset) for terms in {pattern.of(head) for head in heads}}
    if len(made) == 1:
        return next(iter(made.values()))
    parts = [made[pattern.of(head)] for head in heads]
    parts = [part[:, head : head + 1] if part.shape[1] > 1 else part for head, part in enumerate(parts)]
    batch = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(batch, 1, *part.shape[2:]) for part in parts], 1)


def _kept(
    terms: tuple[Term, ...],
    q: Tensor,
    k: Tensor,
    seen: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    offset: int,
) -> Tensor:
    queries, keys, heads = q.shape[2], k.shape[2], q.shape[1]
    if not terms:
        return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device)
    first = _padding(key_mask, q.device)  # [B or 1, 1, 1, 1]
    j = torch.arange(keys, device=q.device)[None, None, None] - first
    t = torch.arange(offset, offset + queries, device=q.device)[None, None, :, None] - first
    kept = None
    for term in terms:
        if isinstance(term, Top):
            real = (j >= 0)[:, 0, 0].expand(q.shape[0], keys)
            part = top_blocks(q * scale, k, real, t[:, 0, :, 0].expand(q.shape[0], queries), term.size, term.share)
            own = torch.div(t, term.size, rounding_mode="floor") == torch.div(j, term.size, rounding_mode="floor")
            part = part.repeat_interleave(heads // k.shape[1], 1) | own
        elif isinstance(term, VerticalSlash):
            part = _voted(term, q, k, seen, scale)
        else:
            part = term.kept(t[:, 0], j[:, 0], heads)
            part = part if part.dim() == 4 else part[:, None]
        kept = part if kept is None else kept | part
    assert kept is not None
    return kept


def _padding(key_mask: Tensor | None, device: torch.device) -> Tensor:
    """How many keys of each row come before the first real one."""
    if key_mask is None:
        return torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    return (~key_mask).cumprod(1).sum(1)[:, None, None, None]


def _voted(term: VerticalSlash, q: Tensor, k: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    if queries < VOTERS:
        return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device)
    every = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device) if seen is None else seen
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return voted(q * scale, k, every, term.columns, term.slashes)


def note_bounds(text: str | None, k: Tensor, key_mask: Tensor | None, bounds: Tensor) -> None:
    """Keeps, for the ``top`` of a pattern, the lowest and highest number of each channel in every block of keys.

    Args:
        k: all keys that are held, [B, G, T, D]. key_mask: bool [B, T], or None.
        bounds: float32 [B, G, blocks, 2, D]; those beyond the keys are left alone.
    """
    top = None if text is None else read_pattern(text).top
    if top is None:
        return
    real = _padding(key_mask, k.device)[:, 0, 0] <= torch.arange(k.shape[2], device=k.device)
    real = real.expand(k.shape[0], k.shape[2])
    count = -(-k.shape[2] // top.size)
    bounds[:, :, :count] = torch.stack(block_bounds(k, torch.cumsum(real, 1) - 1, real, top.size, count), 3)
