"""What a pattern means: the keys that each query of a call keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from slim.compiler.patterns import read_pattern
from slim.compiler.patterns.choose import block_bounds
from slim.compiler.patterns.terms import Call, Term


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
    pattern, heads = read_pattern(text), range(q.shape[1])
    first = _padding(key_mask, q.device)
    j = torch.arange(k.shape[2], device=q.device)[None, None, None] - first
    t = torch.arange(offset, offset + q.shape[2], device=q.device)[None, None, :, None] - first
    call = Call(q * scale, k, t, j, seen)
    made = {terms: _kept(terms, call) for terms in {pattern.of(head) for head in heads}}
    if len(made) == 1:
        return next(iter(made.values()))
    shape = (max(part.shape[0] for part in made.values()), len(heads), q.shape[2], k.shape[2])
    whole = {terms: part.expand(shape) for terms, part in made.items()}
    return torch.stack([whole[pattern.of(head)][:, head] for head in heads], 1)


def _kept(terms: tuple[Term, ...], call: Call) -> Tensor:
    """What any of the terms keeps; everything where there is none."""
    if not terms:
        return call.full(True)
    kept = call.full(False)
    for term in terms:
        kept = kept | term.kept(call)
    return kept


def _padding(key_mask: Tensor | None, device: torch.device) -> Tensor:
    """How many keys of each row come before the first real one."""
    if key_mask is None:
        return torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    return (~key_mask).cumprod(1).sum(1)[:, None, None, None]


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
