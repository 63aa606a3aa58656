"""The cache of one batch in pages: ragged rows, beams that fork, and a ring for text without end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slim import errors
from slim.runtime.binding import Paging
from slim.runtime.cache import KVCacheConfig, Slot, check_fork, check_truncate
from slim.runtime.pages import PAGE, PagePool, Row, Stats, stats

_CHUNK = 512  # tokens of a prompt that go into a ring at a time


@dataclass(frozen=True)
class Ring:
    """Pages of a row that keeps sinks and a window, however long it gets.

    Attributes:
        fixed: pages that hold sinks and stay.
        turning: pages that are written anew in turns.
        chunk: tokens that a call may add, so that none is overwritten that its first query still sees.
    """

    fixed: int
    turning: int
    chunk: int = _CHUNK

    @property
    def pages(self) -> int:
        return self.fixed + self.turning

    @classmethod
    def of(cls, config: KVCacheConfig) -> Ring | None:
        """That of a configuration; None where all tokens are kept."""
        if config.window is None:
            return None
        return cls(-(-config.sinks // PAGE), -(-(config.window + _CHUNK) // PAGE) + 1)


def paging(config: KVCacheConfig) -> Paging | None:
    """How a configuration lays out pages; None where it wants none."""
    ring = Ring.of(config)
    if ring is not None:
        return Paging(PAGE, ring.fixed, config.window, config.sinks)
    return Paging(PAGE) if config.layout == "paged" else None


class PagedKVCache:
    """Keys and values of a batch whose rows have lengths of their own. Padding is not held.

    To its caller it has columns, as a batch has: ``length`` of them, and ``mask`` says which are tokens.

    Attributes:
        pool: where the pages lie.
        rows: the pages of each row.
        length: columns so far, padding included, the same for every row.
        mask: bool [B, length], False at padding.
        table: int32 [B, columns], the pages of each row, as kernels read them.
        lengths: int64 [B], how many tokens each row holds.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        batch: int,
        tokens: int = PAGE,
        config: KVCacheConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        config = config or KVCacheConfig(layout="paged")
        self.slots, self.batch, self.max_tokens = tuple(slots), batch, config.max_tokens
        self.ring = Ring.of(config)
        each = -(-max(1, tokens) // PAGE) if self.ring is None else self.ring.pages
        self.pool = PagePool(slots, batch * each, device=device)
        self.device = self.pool.device
        self.rows = [Row(self.pool) for _ in range(batch)]
        self.length = 0
        self._padded = False
        self.mask = torch.ones(batch, 0, dtype=torch.bool, device=self.device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.table = torch.zeros(batch, each, dtype=torch.int32, device=self.device)
        if self.ring is not None:
            self._fill_ring()

    def __repr__(self) -> str:
        rows = ", ".join(str(row.length) for row in self.rows)
        return f"PagedKVCache(rows of [{rows}] tokens, pages={self.pool.pages}, bytes={self.nbytes:,})"

    @property
    def tensors(self) -> list[Tensor]:
        """Those of the pool: keys, values and what belongs to them."""
        return self.pool.tensors

    @property
    def nbytes(self) -> int:
        """Memory of the pages, in bytes, free ones included."""
        return self.pool.nbytes

    @property
    def layout(self) -> tuple[int, int]:
        """Changes when ``tensors`` or ``table`` are others than before: what is bound to them must be bound anew."""
        return self.pool.generation, self.table.data_ptr()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """``length``, under the name that transformers' caches have for it."""
        return self.length

    @property
    def columns(self) -> Tensor:
        """``mask``, under the name that it has in other caches."""
        return self.mask

    def remask(self, mask: Tensor) -> None:
        """Refuses another mask than that of before."""
        if not torch.equal(mask, self.mask):
            reason = "it hides tokens that the cache holds, or shows padding, which pages do not keep"
            raise errors.BadInput(argument="attention_mask", reason=reason)

    def stats(self) -> Stats:
        """Pages, free and shared ones, tokens, bytes, copies made on writing, tokens that a ring has overwritten."""
        return stats(self.pool, self.rows, self._overwritten)

    @property
    def _overwritten(self) -> int:
        """Tokens whose places a ring has given to later ones."""
        kept = None if self.ring is None else self.ring.pages * PAGE
        return 0 if kept is None else sum(max(0, row.length - kept) for row in self.rows)

    def reserve(self, tokens: int | Sequence[int]) -> None:
        """Makes room for so many more tokens, in every row or in each.

        Raises:
            PromptTooLong: beyond ``max_tokens``.
        """
        counts = [tokens] * self.batch if isinstance(tokens, int) else tokens
        longest = max((row.length + count for row, count in zip(self.rows, counts, strict=True)), default=0)
        if self.max_tokens is not None and longest > self.max_tokens:
            raise errors.PromptTooLong(length=longest, capacity=self.max_tokens)
        if self.ring is not None:
            return
        for index, (row, count) in enumerate(zip(self.rows, counts, strict=True)):
            before = list(row.pages)
            row.reserve(count)
            if row.pages != before:
                self._note_pages(index)

    def note(self, counts: Sequence[int], columns: int, mask: Tensor | None) -> None:
        """Counts tokens as held, once a step has written them: ``columns`` more, of which ``mask`` are tokens."""
        for row, count in zip(self.rows, counts, strict=True):
            row.length += count
        self.lengths.copy_(torch.tensor([row.length for row in self.rows]))
        new = torch.ones(self.batch, columns, dtype=torch.bool, device=self.device) if mask is None else mask
        self._padded |= not bool(new.all())
        if self._padded:
            self.mask = torch.cat([self.mask, new], 1)
        else:  # nothing is kept of what has no padding
            self.mask = new.new_ones(1, 1).expand(self.batch, self.length + columns)
        self.length += columns

    def fork(self, order: Sequence[int]) -> None:
        """Row i becomes row ``order[i]``, as beams do; no token is copied before one of two equal rows goes on.

        Raises:
            CacheUnsupported: for a ring, whose pages are written in place.
        """
        self._refuse_ring("fork")
        check_fork(order, self.batch)
        rows = [self.rows[index].fork() for index in order]
        for row in self.rows:
            row.free()
        self.rows = rows
        self.mask, self.batch = self.mask[list(order)], len(rows)
        self.lengths = torch.tensor([row.length for row in rows], device=self.device)
        self.table = self.table.new_zeros(len(rows), self.table.shape[1])
        for index in range(len(rows)):
            self._note_pages(index)

    def truncate(self, length: int) -> None:
        """Forgets all columns from ``length`` on: what was tried and not taken is rolled back.

        Raises:
            CacheUnsupported: for a ring that has overwritten what it would have to see again.
        """
        check_truncate(length)
        if length >= self.length:
            return
        gone = self.mask[:, length:].sum(1).tolist()
        if self._overwritten:
            self._refuse_ring("go back")
        for row, count in zip(self.rows, gone, strict=True):
            if self.ring is None:
                row.truncate(row.length - count)
            else:
                row.length -= count
        self.mask, self.length = self.mask[:, :length], length
        self.lengths.copy_(torch.tensor([row.length for row in self.rows]))

    def reset(self) -> None:
        """Forgets all tokens and keeps the memory; pages that rows share after a fork are theirs no longer."""
        for row in self.rows:
            if self.ring is None:
                row.free()
            row.length = 0
        self.length = 0
        self.mask = self.mask[:, :0]
        self.lengths.zero_()

    def _refuse_ring(self, what: str) -> None:
        if self.ring is not None:
            reason = f"a cache with a window overwrites its oldest tokens, so it cannot {what}"
            raise errors.CacheUnsupported(reason=reason)

    def _fill_ring(self) -> None:
        assert self.ring is not None
        for index, row in enumerate(self.rows):
            row.pages = [self.pool.take() for _ in range(self.ring.pages)]
            self._note_pages(index)

    def _note_pages(self, index: int) -> None:
        pages = self.rows[index].pages
        if len(pages) > self.table.shape[1]:
            wider = self.table.new_zeros(self.batch, max(len(pages), 2 * self.table.shape[1]))
            wider[:, : self.table.shape[1]] = self.table
            self.table = wider
        self.table[index, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
