"""Prompts that begin alike share the pages of what they have in common."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from slim.runtime.pages import PAGE, PagePool, Row


@dataclass
class _Node:
    """A whole page of tokens after those of its parents."""

    page: int
    parent: _Node | None
    key: bytes
    used: int = 0
    children: dict[bytes, _Node] = field(default_factory=dict)


class Prefixes:
    """Whole pages of prompts, found again by their tokens and those before them.

    The index names its pages as a row does, so that they outlive the rows that wrote them; when pages run short, those
    that nobody else names go first, the least recently used ahead.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._root = _Node(-1, None, b"")
        self._clock = 0
        self.hits = 0  # tokens that need not be computed

    def begin(self, tokens: list[int]) -> Row:
        """A row that holds as many of the first tokens as are known, in whole pages, but never the last token."""
        node, row = self._root, Row(self.pool)
        for key in _keys(tokens[: len(tokens) - 1]):
            found = node.children.get(key)
            if found is None:
                break
            node = found
            node.used = self._tick()
            row.pages.append(self.pool.share(node.page))
            row.length += PAGE
        self.hits += row.length
        return row

    def known(self, tokens: list[int]) -> int:
        """How many pages ``begin`` would find."""
        node, count = self._root, 0
        for key in _keys(tokens[: len(tokens) - 1]):
            found = node.children.get(key)
            if found is None:
                break
            node, count = found, count + 1
        return count

    def learn(self, tokens: list[int], row: Row) -> None:
        """Remembers the whole pages of ``row``, which holds the first of ``tokens``."""
        node = self._root
        for key, page in zip(_keys(tokens[: row.length]), row.pages, strict=False):
            found = node.children.get(key)
            if found is None:
                found = node.children[key] = _Node(self.pool.share(page), node, key)
            found.used = self._tick()
            node = found

    def evict(self, pages: int) -> int:
        """Gives back up to ``pages`` pages that only the index names; returns how many."""
        free = [(node.used, node) for node in self._all() if self._may_go(node)]
        heapq.heapify(free)
        given = 0
        while free and given < pages:
            _, oldest = heapq.heappop(free)
            parent = oldest.parent
            assert parent is not None
            del parent.children[oldest.key]
            self.pool.release(oldest.page)
            given += 1
            if self._may_go(parent):
                heapq.heappush(free, (parent.used, parent))
        return given

    def clear(self) -> None:
        """Forgets everything."""
        for node in list(self._all()):
            self.pool.release(node.page)
        self._root.children = {}

    def _may_go(self, node: _Node) -> bool:
        """Whether nothing comes after it, and nobody else names its page."""
        return node is not self._root and not node.children and self.pool.references[node.page] == 1

    def _all(self) -> Iterator[_Node]:
        """One long prompt is one long branch, which a recursion would not get to the end of."""
        left = [self._root]
        while left:
            children = left.pop().children.values()
            yield from children
            left += children

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _keys(tokens: list[int]) -> Iterator[bytes]:
    """The tokens of each whole page."""
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        yield b"".join(token.to_bytes(8, "little", signed=True) for token in tokens[start : start + PAGE])
