"""A pattern as a picture: a row a query, a column a key."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from slim import errors
from slim.compiler.patterns import read_pattern
from slim.compiler.patterns.mask import pattern_mask

_LEFT_OUT, _SOME, _KEPT = "·", "▒", "█"
_LONGEST = 4096


def picture(text: str, tokens: int = 32, head: int = 0, *, step: int = 1, causal: bool = True) -> str:
    """What queries (rows) keep of the keys (columns), both up to ``tokens``; a character stands for ``step`` of each.

    Of several, "█" says that all are kept that come before, "▒" that some are. What a pattern chooses by looking is
    shown for random queries and keys, the same ones each time.

    Raises:
        BadInput: for no tokens, or a head that the pattern does not name.

    Example:
        >>> print(picture("window(2) | columns(1)", 5))
        █····
        ██···
        ███··
        █·██·
        █··██
    """
    kept, seen = (_counts(x, step) for x in (kept_keys(text, tokens, head, causal=causal), sees(tokens, causal=causal)))
    rows = zip(kept.tolist(), seen.tolist(), strict=True)
    return "\n".join("".join(map(_character, own, all_)) for own, all_ in rows)


def shown(text: str, head: int = 0, characters: int = 32, longest: int = _LONGEST) -> tuple[int, int]:
    """(tokens, tokens a character): how much text it takes to see what a head leaves out, ``longest`` at most."""
    tokens = characters
    while tokens < longest and share_kept(text, tokens, head) > 0.7:
        tokens *= 2
    return tokens, tokens // characters


def _counts(seen: torch.Tensor, step: int) -> torch.Tensor:
    """How many of each ``step`` queries and ``step`` keys there are."""
    short = -len(seen) % step
    return F.pad(seen.int(), (0, short, 0, short)).unflatten(1, (-1, step)).unflatten(0, (-1, step)).sum((1, 3))


def _character(kept: int, seen: int) -> str:
    return _LEFT_OUT if kept == 0 else _KEPT if kept == seen else _SOME


def kept_keys(text: str, tokens: int, head: int = 0, *, causal: bool = True) -> torch.Tensor:
    """bool [tokens, tokens]: which keys each query of one head keeps."""
    named = read_pattern(text).heads
    if not isinstance(tokens, int) or tokens < 1:
        raise errors.BadInput(argument="tokens", reason=f"{tokens!r} is no number of tokens")
    if not isinstance(head, int) or not 0 <= head < (head + 1 if named is None else named):
        raise errors.BadInput(argument="head", reason=f"{head!r} is no head" + f" of {named}" * (named is not None))
    kept = kept_by_head(text, tokens, named or head + 1, sees(tokens, causal=causal))
    return kept[min(head, len(kept) - 1)]


def sees(tokens: int, *, causal: bool = True, window: int | None = None) -> torch.Tensor:
    """bool [tokens, tokens]: the keys that a model lets each query look at, whatever the pattern."""
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    return seen if window is None else seen & (back.abs() < window)


def kept_by_head(text: str, tokens: int, heads: int, seen: torch.Tensor) -> torch.Tensor:
    """bool [heads, tokens, tokens], or [1, tokens, tokens] where all are alike: what is left of ``seen``."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, tokens, 8, generator=generator) for _ in range(2))
    seen = seen[None, None]
    return (seen & pattern_mask(text, q, k, seen, None, scale=1.0, offset=0))[0]


def share_kept(text: str, tokens: int, head: int = 0) -> float:
    """The share of causal attention over ``tokens`` that one head still computes."""
    return float(kept_keys(text, tokens, head).sum()) / (tokens * (tokens + 1) / 2)
