"""A cache of bounded size: each head of each layer keeps the tokens that its attention cares for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slim import errors
from slim.runtime.cache import CacheStats, KVCache, Slot, check_truncate
from slim.runtime.eviction import Eviction

_CHUNK = 512  # tokens of a prompt that are run at a time, beyond what fits


@dataclass(frozen=True)
class EvictionStats(CacheStats):
    """What a cache holds; tokens are those of each head of each row, padding included.

    Attributes:
        budget: tokens that are held at most.
        seen, evicted: tokens that came, and those of them that left.
        choices: how often tokens were chosen to leave.
    """

    budget: int
    seen: int
    evicted: int
    choices: int


class EvictingKVCache(KVCache):
    """Keys and values of a batch; every head holds as many tokens as the others, but tokens of its own choice.

    Tokens lie from old to new. ``length`` counts those that are held, ``seen`` those that came. Between calls up to
    ``budget`` tokens are held; a prompt takes 512 more while it is run ("h2o"), or its whole length, as its last tokens
    are to choose ("snapkv"; where it is run in pieces, each piece chooses).

    Attributes:
        seen: tokens so far, the same for every row; ``columns`` says which are no padding.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        batch: int,
        capacity: int,
        eviction: Eviction,
        max_tokens: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.eviction = eviction
        self.seen = self.choices = 0
        self._columns: Tensor | None = None  # None while no token was padding
        self._chosen: list[Tensor] = []  # of each slot, the indices of the tokens at its first places, [B, G, chosen]
        super().__init__(slots, batch, min(capacity, eviction.budget), None, device)
        self.max_tokens = max_tokens

    @property
    def columns(self) -> Tensor:
        if self._columns is not None:
            return self._columns
        return torch.ones(1, 1, dtype=torch.bool, device=self.device).expand(self.batch, self.seen)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """``seen``: what came before the next token."""
        return self.seen

    def remask(self, mask: Tensor) -> None:
        """Refuses another mask than that of before: padding has been let go, and tokens have been counted."""
        if not torch.equal(mask, self.columns):
            reason = "it hides tokens that the cache has seen, or shows padding, and some of them are evicted"
            raise errors.BadInput(argument="attention_mask", reason=reason)

    def stats(self) -> EvictionStats:
        """Tokens seen, held and evicted, how often was chosen, and bytes."""
        return EvictionStats(
            held=self.length, capacity=self.capacity, nbytes=self.nbytes, budget=self.eviction.budget,
            seen=self.seen, evicted=self.seen - self.length, choices=self.choices,
        )  # fmt: skip

    def held(self, slot: int) -> Tensor:
        """The indices of the tokens that each head of a slot holds, int64 [B, G, length], from old to new."""
        heads = self.slots[slot].heads
        newest = self.length - (self._chosen[slot].shape[2] if self._chosen else 0)
        new = torch.arange(self.seen - newest, self.seen, device=self.device).expand(self.batch, heads, newest)
        return torch.cat([self._chosen[slot], new], 2) if self._chosen else new

    def truncate(self, length: int) -> None:
        """Raises CacheUnsupported: there is no way back.

        Tokens that left are gone, and what those to be forgotten paid to others cannot be taken back.
        """
        check_truncate(length)
        if length < self.seen:
            reason = (
                f"a cache with eviction={self.eviction.kind!r} has counted whom the tokens to be forgotten looked at, "
                "and may have let others go by it, so it cannot go back"
            )
            raise errors.CacheUnsupported(reason=reason)

    def fork(self, order: Sequence[int]) -> None:
        super().fork(order)
        rows = torch.tensor(list(order), dtype=torch.int64, device=self.device)
        self._chosen = [chosen[rows] for chosen in self._chosen]
        self._columns = None if self._columns is None else self._columns[rows]

    def reset(self) -> None:
        super().reset()
        self.seen = self.choices = 0
        self._columns, self._chosen = None, []

    # -- what a step asks for ----------------------------------------------------------------------------------------

    def pieces(self, tokens: int) -> list[int]:
        if self.eviction.votes or self.length + tokens <= self.eviction.budget:
            return [tokens]
        first = min(tokens, max(_CHUNK, self.eviction.budget - self.length))
        rest = tokens - first
        return [first, *[_CHUNK] * (rest // _CHUNK), *([rest % _CHUNK] if rest % _CHUNK else [])]

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more. For a few, others leave; a piece of a prompt goes in beside what is held."""
        if self.max_tokens is not None and self.seen + tokens > self.max_tokens:
            raise errors.PromptTooLong(length=self.seen + tokens, capacity=self.max_tokens)
        budget, needed = self.eviction.budget, self.length + tokens
        if needed > budget and tokens <= self.eviction.at_once:
            self._evict()
        elif needed > self.capacity:
            self._resize(max(needed, min(2 * self.capacity, budget)))

    def advance(self, tokens: int) -> None:
        """Counts ``tokens`` as held; where they are more than the budget, some leave."""
        new = self.mask[:, self.length : self.length + tokens]
        if self._columns is not None or not bool(new.all()):
            self._columns = torch.cat([self.columns, new], 1)
        self.length += tokens
        self.seen += tokens
        if self.length > self.eviction.budget:
            self._evict()
            if self.capacity > self.eviction.budget:
                self._resize(self.eviction.budget)

    def _evict(self) -> None:
        """Moves what stays to the front, head by head; memory stays where it is."""
        length, kept, real = self.length, self.eviction.kept, self.mask[:, : self.length]
        chosen, tensors = [], iter(self.tensors)
        loses = (~real).sum(1) < length - kept  # [B], tokens and not padding alone
        fades = torch.where(loses, self.eviction.fades, 1.0)[:, None, None]
        for index, slot in enumerate(self.slots):
            held = {kind.name: next(tensors) for kind in slot.tensors}
            places = self.eviction.choose(held["mass"][:, :, :length], real)
            chosen.append(self.held(index).gather(2, places))
            for tensor in held.values():
                tensor[:, :, :kept] = _picked(tensor[:, :, :length], places)
            held["mass"] *= fades
        self.mask[:, :kept] = real.gather(1, places[:, 0])  # padding comes first, in every head as much
        self.mask[:, kept:] = True
        self._chosen, self.length = chosen, kept
        self.choices += 1


def _picked(tensor: Tensor, places: Tensor) -> Tensor:
    """tensor [B, G, T, ...] at places [B, G, n]."""
    index = places if tensor.dim() == 3 else places[..., None].expand(*places.shape, tensor.shape[3])
    return tensor.gather(2, index)
