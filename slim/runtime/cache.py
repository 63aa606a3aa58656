"""The key/value cache: what a user asks for, and the tensors of one batch of sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from slim import errors

_LEAST_BUDGET = 8
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "layout": ("contiguous", "paged"), "dtype": (None, "int8", "int4"), "eviction": (None, "h2o", "snapkv"),
}  # fmt: skip


@dataclass(frozen=True)
class KVCacheConfig:
    """How keys and values of past tokens are kept.

    Args:
        layout: "contiguous": one tensor a layer, rows of one length; "paged": pages of 64 tokens, rows of lengths of
            their own, without padding, that may fork.
        dtype: "int8" or "int4": hold numbers of so many bits, with a float32 scale for each token of each head. None
            keeps what the program says: its own type, or what ``QuantizeKV`` made of it. See docs/kv_cache.md.
        window: keep only so many newest tokens, in pages that are written anew in turns: memory stays what it is
            however long the text gets. Windows of the model's own are its attention's business.
        sinks: first tokens to keep beside a window.
        eviction: which tokens leave when ``budget`` tokens are held: "h2o" keeps the newest and those that got most
            attention, "snapkv" what the newest look at. Each head keeps tokens of its own. See docs/kv_cache.md.
        budget: tokens that a head holds, with ``eviction``.
        max_tokens: the most tokens a sequence may have, prompt included; None for no limit but the model's own.

    Raises:
        BadInput, ContradictoryOptions: for what makes no sense.

    Example:
        >>> KVCacheConfig(max_tokens=4096)
    """

    layout: Literal["contiguous", "paged"] = "contiguous"
    dtype: Literal["int8", "int4"] | None = None
    window: int | None = None
    sinks: int = 0
    eviction: Literal["h2o", "snapkv"] | None = None
    max_tokens: int | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        for option, choices in _CHOICES.items():
            if getattr(self, option) not in choices:
                raise errors.BadInput(
                    argument=option,
                    reason=f"{getattr(self, option)!r} is not one of {choices}",
                    of="slim.KVCacheConfig",
                )
        for option in ("window", "max_tokens", "sinks", "budget"):
            value, free = getattr(self, option), option != "sinks"
            if (value is not None or not free) and (
                not isinstance(value, int) or isinstance(value, bool) or value < free
            ):
                raise errors.BadInput(
                    argument=option, reason=f"{value!r} is no number of tokens", of="slim.KVCacheConfig"
                )
        if self.sinks and self.window is None:
            raise errors.ContradictoryOptions(
                a=f"sinks={self.sinks}", b="window=None", reason="without a window all tokens are kept"
            )
        self._check_eviction()

    def _check_eviction(self) -> None:
        eviction, budget = f"eviction={self.eviction!r}", f"budget={self.budget}"
        if self.eviction is None:
            if self.budget is not None:
                raise errors.ContradictoryOptions(a=budget, b=eviction, reason="a budget is for what evicts")
            return
        if self.budget is None or self.budget < _LEAST_BUDGET:
            reason = f"eviction needs one, of {_LEAST_BUDGET} tokens at least, and it is {self.budget}"
            raise errors.BadInput(argument="budget", reason=reason, of="slim.KVCacheConfig")
        if self.window is not None:
            reason = "a window has said already which tokens are kept"
            raise errors.ContradictoryOptions(a=eviction, b=f"window={self.window}", reason=reason)
        if self.layout == "paged":
            reason = "heads keep tokens of their own choice, and all heads of a page hold the same tokens"
            raise errors.ContradictoryOptions(a=eviction, b="layout='paged'", reason=reason)

    @property
    def changes(self) -> str | None:
        """What a model that runs over such a cache computes otherwise than without one; None for nothing."""
        said = {name: getattr(self, name) for name in ("dtype", "window", "eviction")}
        lost = ", ".join(f"{name}={value!r}" for name, value in said.items() if value is not None)
        return f"KVCacheConfig({lost})" if lost else None

    @property
    def bits(self) -> int:
        """Bits of a number, where ``dtype`` says; 0 where it does not."""
        return {None: 0, "int8": 8, "int4": 4}[self.dtype]


def as_config(given: KVCacheConfig | None) -> KVCacheConfig:
    """``given``, or the default.

    Raises:
        BadInput: for anything else.
    """
    if not isinstance(given, KVCacheConfig | None):
        raise errors.BadInput(argument="kv_cache", reason=f"{given!r:.60} is no KVCacheConfig", of="slim.KVCacheConfig")
    return given or KVCacheConfig()


class Tensors(NamedTuple):
    """One tensor of a slot: its name, what follows [B, heads, T] in its shape, its type, and tokens of an entry."""

    name: str
    width: tuple[int, ...]
    dtype: torch.dtype
    tokens: int = 1


@dataclass(frozen=True)
class Slot:
    """The keys and values of one attention layer: [B, heads, T, key_width] and [B, heads, T, value_width].

    Attributes:
        dtype: of the keys and values that attention computes with.
        key_bits, value_bits: 8 where int8 numbers are held, 4 where there are two in a byte, both with a float32 scale
            [B, heads, T]; 0 where they are held as they are.
        bounds: tokens of the blocks whose lowest and highest keys are held as well; 0 for none.
        mass: whether it is counted what each key gets of attention.
    """

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    key_bits: int = 0
    value_bits: int = 0
    bounds: int = 0
    mass: bool = False

    @property
    def tensors(self) -> tuple[Tensors, ...]:
        """Keys, values, the scales of those that have them, the bounds of blocks of keys, and their mass."""
        sides = (("k", self.key_width, self.key_bits), ("v", self.value_width, self.value_bits))
        numbers = [Tensors(f"{name}_cache", *self._numbers(width, bits)) for name, width, bits in sides]
        scales = [Tensors(f"{name}_scale", (), torch.float32) for name, _, bits in sides if bits]
        bounds = [Tensors("k_bounds", (2, self.key_width), torch.float32, self.bounds)] if self.bounds else []
        mass = [Tensors("mass", (), torch.float32)] if self.mass else []
        return (*numbers, *scales, *bounds, *mass)

    def _numbers(self, width: int, bits: int) -> tuple[tuple[int, ...], torch.dtype]:
        if bits == 4:
            return (width // 2,), torch.uint8
        return (width,), torch.int8 if bits else self.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.heads * sum(-(-math.prod(t.width) * t.dtype.itemsize // t.tokens) for t in self.tensors)


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds: tokens of each row, padding included; tokens there is memory for; bytes of that memory."""

    held: int
    capacity: int
    nbytes: int


def check_truncate(length: int) -> None:
    """Raises BadInput for what is no number of tokens."""
    if not isinstance(length, int) or isinstance(length, bool) or length < 0:
        raise errors.BadInput(
            argument="length", reason=f"{length!r} is no number of tokens", of="slim.runtime.cache.KVCache.truncate"
        )


def check_fork(order: Sequence[int], batch: int) -> None:
    """Raises BadInput for an order that names a row that there is not, or none."""
    if not isinstance(order, Sequence) or not order:
        reason = f"{order!r:.60} is no list of rows; give one or more of {batch}, counted from 0"
        raise errors.BadInput(argument="order", reason=reason, of="slim.runtime.cache.KVCache.fork")
    for row in order:
        if not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < batch:
            reason = f"{row!r} is no row; there are {batch}, from 0 on"
            raise errors.BadInput(argument="order", reason=reason, of="slim.runtime.cache.KVCache.fork")


_ROOM = 64  # tokens to make room for at least, so that a short prompt does not grow at once


class KVCache:
    """Keys and values of a batch of sequences, with room to grow.

    Attributes:
        slots: one a pair of tensors; layers that share keys and values share a slot.
        length: tokens held, pad tokens included, the same for every row.
        mask: bool [B, capacity], False at pad tokens.
        tensors: those of each slot in turn: keys and values [B, heads, capacity, width], then the scales of quantised
            ones [B, heads, capacity].
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        batch: int,
        capacity: int = _ROOM,
        max_tokens: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.slots = tuple(slots)
        self.batch = batch
        self.max_tokens = max_tokens
        self.device = torch.device(device)
        self.length = 0
        self.mask = torch.ones(batch, 0, dtype=torch.bool, device=self.device)
        self._kinds = [(slot.heads, kind) for slot in self.slots for kind in slot.tensors]
        self.tensors = [self._empty(index, 0) for index in range(len(self._kinds))]
        self._resize(max(1, capacity if max_tokens is None else min(capacity, max_tokens)))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch={self.batch}, length={self.length}, capacity={self.capacity}, "
            f"layers={len(self.slots)}, bytes={self.nbytes:,})"
        )

    @property
    def capacity(self) -> int:
        """Tokens there is memory for."""
        return self.mask.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values and of their scales, in bytes, room to grow included."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def columns(self) -> Tensor:
        """Which of the tokens so far are no padding: bool [B, tokens]."""
        return self.mask[:, : self.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """``length``, under the name that transformers' caches have for it."""
        return self.length

    def remask(self, mask: Tensor) -> None:
        """Says anew which of the tokens so far are padding."""
        self.mask[:, : self.length] = mask

    def pieces(self, tokens: int) -> list[int]:
        """In how many tokens at a time ``tokens`` are to be run."""
        return [tokens]

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more, doubling: in new tensors, and with a new mask.

        Raises:
            PromptTooLong: beyond ``max_tokens``.
        """
        needed = self.length + tokens
        if self.max_tokens is not None and needed > self.max_tokens:
            raise errors.PromptTooLong(length=needed, capacity=self.max_tokens)
        if needed <= self.capacity:
            return
        doubled = max(needed, 2 * self.capacity)
        self._resize(doubled if self.max_tokens is None else min(doubled, self.max_tokens))

    def prepare(self, tokens: int, mask: Tensor | None = None) -> Tensor:
        """Makes room for ``tokens`` and notes which are pad tokens; returns the mask of all keys, [B, T] bool.

        Nothing is held until ``advance``: a step that raises leaves the cache as it was.
        """
        self.reserve(tokens)
        end = self.length + tokens
        self.mask[:, self.length : end] = True if mask is None else mask
        self.mask[:, end:] = True  # a step that raised may have left its own mask there
        return self.mask[:, :end]

    def advance(self, tokens: int) -> None:
        """Counts ``tokens`` as held, once a step has written them."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forgets all tokens of each row from ``length`` on: what was tried and not taken is rolled back.

        Raises:
            BadInput: below zero.
        """
        check_truncate(length)
        self.length = min(self.length, length)

    def fork(self, order: Sequence[int]) -> None:
        """Row i becomes a copy of row ``order[i]``, as beams do; there may be more rows than before, or fewer.

        Raises:
            BadInput: for a row that there is not.
        """
        check_fork(order, self.batch)
        rows = torch.tensor(list(order), dtype=torch.int64, device=self.device)
        for index, tensor in enumerate(self.tensors):
            self.tensors[index] = tensor[rows]  # one at a time, so that only one is held twice
        self.mask, self.batch = self.mask[rows], len(rows)

    def stats(self) -> CacheStats:
        """Tokens held, tokens there is memory for, and bytes."""
        return CacheStats(held=self.length, capacity=self.capacity, nbytes=self.nbytes)

    def reset(self) -> None:
        """Forgets all tokens and keeps the memory."""
        self.length = 0
        self.mask.fill_(True)

    def _empty(self, index: int, capacity: int) -> Tensor:
        heads, kind = self._kinds[index]
        entries = -(-capacity // kind.tokens)
        return torch.empty(self.batch, heads, entries, *kind.width, dtype=kind.dtype, device=self.device)

    def _resize(self, capacity: int) -> None:
        for index, old in enumerate(self.tensors):
            new, held = self._empty(index, capacity), -(-self.length // self._kinds[index][1].tokens)
            new[:, :, :held] = old[:, :, :held]
            self.tensors[index] = new  # one at a time, so that only one is held twice
        mask = torch.ones(self.batch, capacity, dtype=torch.bool, device=self.device)
        mask[:, : self.length] = self.mask[:, : self.length]
        self.mask = mask
