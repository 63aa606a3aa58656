"""A cache in pages: rows of any length in one pool, prompts that share what they have in common, and rings.

A page holds the keys and values of ``PAGE`` tokens of one row, in every layer. A row is a list of pages; two rows may
name the same page, and whoever is to write into it gets a copy of its own first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slim import errors
from slim.runtime.cache import Slot

PAGE = 64  # tokens: what kernels attend to at a time


@dataclass(frozen=True)
class Stats:
    """What a pool holds.

    ``tokens`` counts those of every row, the ``evicted`` ones that a ring has overwritten among them; ``shared`` the
    pages that more than one row names.
    """

    pages: int
    free: int
    shared: int
    tokens: int
    nbytes: int
    copies: int
    evicted: int


class PagePool:
    """Memory for pages, which pages are free, and how many rows name each.

    Args:
        slots: one a pair of tensors.
        pages: that there are at first.
        limit: pages that there may be at most; None to grow as needed, doubling.

    Attributes:
        tensors: those of each slot in turn, [pages, heads, PAGE, width]; growing makes new ones.
        generation: how often they were made anew.
    """

    def __init__(
        self, slots: Sequence[Slot], pages: int, limit: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.slots, self.limit, self.device = tuple(slots), limit, torch.device(device)
        self._kinds = [(slot.heads, kind) for slot in self.slots for kind in slot.tensors]
        self.tensors: list[Tensor] = [self._empty(index, 0) for index in range(len(self._kinds))]
        self.references: list[int] = []
        self._free: list[int] = []
        self.generation = self.copies = 0
        self._grow(max(1, pages if limit is None else min(pages, limit)))

    @property
    def pages(self) -> int:
        """How many there is memory for."""
        return len(self.references)

    @property
    def available(self) -> int | None:
        """Pages that can still be taken; None for as many as memory holds."""
        return None if self.limit is None else len(self._free) + self.limit - self.pages

    @property
    def free(self) -> int:
        """Pages that nobody names."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Memory of all pages, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def take(self) -> int:
        """A page for the caller alone.

        Raises:
            CacheFull: where ``limit`` is reached.
        """
        if not self._free:
            doubled = 2 * self.pages if self.limit is None else min(2 * self.pages, self.limit)
            if doubled == self.pages:
                raise errors.CacheFull(pages=self.pages, tokens=self.pages * PAGE)
            self._grow(doubled)
        page = self._free.pop()
        self.references[page] = 1
        return page

    def share(self, page: int) -> int:
        """The same page, for one more row."""
        self.references[page] += 1
        return page

    def release(self, page: int) -> None:
        """One row less names the page; it is free when none does."""
        self.references[page] -= 1
        assert self.references[page] >= 0, "a page was given back twice"
        if self.references[page] == 0:
            self._free.append(page)

    def own(self, page: int) -> int:
        """The page itself where only the caller names it, else a copy in its place."""
        if self.references[page] == 1:
            return page
        copy = self.take()
        for tensor in self.tensors:
            tensor[copy] = tensor[page]
        self.copies += 1
        self.release(page)
        return copy

    def _empty(self, index: int, pages: int) -> Tensor:
        heads, kind = self._kinds[index]
        shape = (pages, heads, PAGE // kind.tokens, *kind.width)
        return torch.empty(shape, dtype=kind.dtype, device=self.device)

    def _grow(self, pages: int) -> None:
        before = self.pages
        for index, old in enumerate(self.tensors):
            new = self._empty(index, pages)
            new[:before] = old
            self.tensors[index] = new  # one at a time, so that only one is held twice
        self.references += [0] * (pages - before)
        self._free += reversed(range(before, pages))
        self.generation += 1


@dataclass
class Row:
    """The pages of one sequence, in order, and how many tokens they hold."""

    pool: PagePool
    pages: list[int] = field(default_factory=list)
    length: int = 0

    @property
    def room(self) -> int:
        """Tokens that there are pages for, beyond those held."""
        return len(self.pages) * PAGE - self.length

    def missing(self, tokens: int) -> int:
        """Pages that ``reserve`` would take, the copy of a shared one among them."""
        more = max(0, -(-(self.length + tokens) // PAGE) - len(self.pages))
        return more + (tokens > 0 and self._writes_into_shared())

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more, in pages that no other row names.

        Raises:
            CacheFull: the row is then as it was.
        """
        if tokens > 0 and self._writes_into_shared():
            last = self.length // PAGE
            self.pages[last] = self.pool.own(self.pages[last])
        taken: list[int] = []
        try:
            while len(self.pages) + len(taken) < -(-(self.length + tokens) // PAGE):
                taken.append(self.pool.take())
        except errors.CacheFull:
            for page in taken:
                self.pool.release(page)
            raise
        self.pages += taken

    def _writes_into_shared(self) -> bool:
        last = self.length // PAGE
        return last < len(self.pages) and self.pool.references[self.pages[last]] > 1

    def fork(self) -> Row:
        """Another row that begins with the same tokens; no page is copied before one of the two writes into it."""
        held = self.pages[: -(-self.length // PAGE)]
        return Row(self.pool, [self.pool.share(page) for page in held], self.length)

    def truncate(self, length: int) -> None:
        """Forgets all tokens from ``length`` on, and gives back the pages that held no others."""
        self.length = min(self.length, length)
        keep = -(-self.length // PAGE)
        for page in self.pages[keep:]:
            self.pool.release(page)
        del self.pages[keep:]

    def free(self) -> None:
        """Gives back all pages."""
        self.truncate(0)


def stats(pool: PagePool, rows: Sequence[Row], evicted: int = 0) -> Stats:
    """What ``pool`` holds for ``rows``."""
    shared = sum(count > 1 for count in pool.references)
    tokens = sum(row.length for row in rows)
    return Stats(pool.pages, pool.free, shared, tokens, pool.nbytes, pool.copies, evicted)
