"""Which tokens leave a full cache: those that the attention of a head has cared for least.

Keys are held rotated, so a token keeps its position wherever it lies, and the place of one that left serves another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from slim.compiler.rules import argument
from slim.runtime.cache import KVCacheConfig

_VOTERS = 32  # of SnapKV
_POOL = 5  # tokens that share what they got
_FADES = 0.7  # what is left of a count after a choice, of H2O
_MOST_AT_ONCE = 64  # tokens that leave together


@dataclass(frozen=True)
class Eviction:
    """A rule of eviction over ``budget`` tokens of each head.

    "h2o" (Zhang et al. 2023, H2O): what is kept is the newest, 5 in 8, and what has got most attention, summed over all
    queries since it came; a sum fades to 0.7 each time some leave, which costs less than sums that do not (docs).
    "snapkv" (Li et al. 2024, SnapKV): what is kept is the newest 32, and what the last 32 queries of a prompt look at
    most, later those since the last choice. Both take what the five tokens around one got, on average.
    """

    kind: str
    budget: int

    @classmethod
    def of(cls, config: KVCacheConfig) -> Eviction | None:
        """That of a configuration; None where nothing is evicted."""
        return None if config.eviction is None or config.budget is None else cls(config.eviction, config.budget)

    @property
    def votes(self) -> int:
        """Of a call, the last queries that count; 0 for all. See ``slim.cached_attention``."""
        return _VOTERS if self.kind == "snapkv" else 0

    @property
    def at_once(self) -> int:
        """Tokens that leave together, so that choosing is rare."""
        return max(1, min(_MOST_AT_ONCE, self.budget // 32))

    @property
    def kept(self) -> int:
        """Tokens that stay when some leave."""
        return self.budget - self.at_once

    @property
    def newest(self) -> int:
        """Of those, the newest."""
        return min(_VOTERS, self.kept // 2) if self.votes else 5 * self.kept // 8

    @property
    def fades(self) -> float:
        """What is left of a count after a choice."""
        return 0.0 if self.votes else _FADES

    def choose(self, mass: Tensor, real: Tensor) -> Tensor:
        """The places of what stays, int64 [B, G, kept], padding first and then from old to new.

        Args:
            mass: what each key got of attention, [B, G, T], from old to new.
            real: bool [B, T], False at padding, which leaves first.
        """
        tokens = mass.shape[2]
        score = _averaged(mass) / _averaged(real[:, None].float())
        score = score.index_fill(2, torch.arange(tokens - self.newest, tokens, device=mass.device), torch.inf)
        score = score.masked_fill(~real[:, None], -1.0)
        chosen = score.topk(self.kept, dim=2).indices
        order = torch.arange(tokens, device=mass.device) + tokens * real  # [B, T]
        return order[:, None].expand_as(score).gather(2, chosen).sort(dim=2).values % tokens


def _averaged(x: Tensor) -> Tensor:
    """x [B, G, T] over the tokens around each."""
    return F.avg_pool1d(x, _POOL, stride=1, padding=_POOL // 2)


def objections(nodes: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """Attention nodes whose keys cannot be evicted, and why."""
    found: dict[fx.Node, str] = {}
    pairs: set[tuple[fx.Node, fx.Node]] = set()
    for node in nodes:
        pair = (argument(node, "k"), argument(node, "v"))
        if argument(node, "window") is not None or argument(node, "pattern") is not None:
            found[node] = "keeps tokens by how far away they are, which the places in a cache with eviction do not say"
        elif argument(node, "slopes") is not None:
            found[node] = "weighs tokens by how far away they are, which the places in a cache with eviction do not say"
        elif pair in pairs:
            found[node] = "shares keys with another layer, and each of the two would evict its own"
        pairs.add(pair)
    return found
