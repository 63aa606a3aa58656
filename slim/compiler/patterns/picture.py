"""A pattern as a picture: a row a query, a column a key."""

from __future__ import annotations

import torch

from slim.compiler.patterns import read_pattern
from slim.compiler.patterns.mask import pattern_mask

_LEFT_OUT, _KEPT = "·", "█"


def picture(text: str, tokens: int = 32, head: int = 0, *, causal: bool = True) -> str:
    """What queries (rows) keep of the keys (columns), both up to ``tokens``, each character standing for one key.

    What a pattern chooses by looking is shown for random queries and keys, the same ones each time.

    Example:
        >>> print(picture("window(2) | columns(1)", 5))
        █····
        ██···
        ███··
        █·██·
        █··██
    """
    kept = kept_keys(text, tokens, head, causal=causal)
    return "\n".join("".join(_KEPT if seen else _LEFT_OUT for seen in row) for row in kept.tolist())


def kept_keys(text: str, tokens: int, head: int = 0, *, causal: bool = True) -> torch.Tensor:
    """bool [tokens, tokens]: which keys each query of one head keeps."""
    last = max((last for _, last, _ in read_pattern(text).groups), default=0)
    kept = kept_by_head(text, tokens, max(last, head) + 1, sees(tokens, causal=causal))
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
