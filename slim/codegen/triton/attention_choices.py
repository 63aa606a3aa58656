"""What queries choose by looking at keys, in memory: written by kernels of their own, read by those that attend.

Blocks of ``top`` count from the first token that is no padding, as patterns count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from slim.codegen.regions.schedule import Attention
from slim.codegen.regions.views import Buffer, Size, View
from slim.codegen.triton.attention_cache import Stored, page
from slim.codegen.triton.attention_parts import address, column, masked, terms
from slim.codegen.triton.writer import Writer
from slim.compiler.patterns import Pattern
from slim.compiler.patterns.terms import Rows, VerticalSlash

_EVERYTHING = Rows(2**31 - 1)


@dataclass(frozen=True)
class Choices:
    """int32, each for what some pattern of the region has.

    Attributes:
        tops: [B, G, S, words], bit c % 32 of word c / 32 is block c before the query's own.
        listed: [B, G, 1 + blocks], of a single query: how many blocks its heads look at, then twice the number of each,
            plus 1 where ``top`` keeps it.
        columns, slashes: [B, H, T], for each key and for each distance: 1 where it is kept, plus twice the number of
            those before it.
    """

    tops: View | None = None
    listed: View | None = None
    columns: View | None = None
    slashes: View | None = None

    @property
    def buffers(self) -> list[Buffer]:
        return [view.buffer for view in (self.tops, self.listed, self.columns, self.slashes) if view is not None]


def choices_of(region: Attention, *, single: bool) -> Choices:
    """Memory for what the queries of a call choose; ``single`` for one query a row."""
    if region.pattern is None:
        return Choices()
    batch, heads, queries = region.q.shape[:3]
    kv_heads = region.k.shape[1]
    found: dict[str, View] = {}

    def memory(name: str, *shape: Size) -> None:
        found[name] = Buffer("temp", name, torch.int32, shape).view()

    if region.pattern.top is not None and single:
        memory("listed", batch, kv_heads, 1 + most_blocks(region))
    elif region.pattern.top is not None:
        memory("tops", batch, kv_heads, queries, most_blocks(region) // 32 + 2)
    if region.pattern.vote is not None:
        memory("columns", batch, heads, most_keys(region))
        memory("slashes", batch, heads, most_keys(region))
    return Choices(**found)


def most_keys(region: Attention) -> Size:
    """How many keys there can be, in sizes that no replay changes."""
    if region.k_cache is None:
        return region.k.shape[2]
    if region.pages is None:
        return region.k_cache.shape[2]
    return region.pages.shape[1] * region.k_cache.shape[2]


def most_blocks(region: Attention) -> Size:
    """The same in blocks of ``top``."""
    size = block_size(region)
    return (most_keys(region) + size - 1) // size


def block_size(region: Attention) -> int:
    """Tokens of a block of ``top``."""
    assert region.pattern is not None
    assert region.pattern.top is not None
    return region.pattern.top.size


def keeps_bounds(region: Attention) -> bool:
    """Whether the bounds of earlier calls' keys are at hand."""
    return region.k_bounds is not None and region.k_bounds.buffer.kind != "temp"


def without_votes(region: Attention) -> Attention:
    """The region for calls of too few queries to vote: heads that would choose by a vote see everything."""
    if region.pattern is None or region.pattern.vote is None:
        return region
    groups = [
        (first, last, tuple(_EVERYTHING if isinstance(term, VerticalSlash) else term for term in own))
        for first, last, own in region.pattern.groups
    ]
    return replace(region, pattern=Pattern(tuple(groups)))


def no_bounds(width: int) -> list[str]:
    """``low_of`` and ``high_of`` [1, width] of no keys."""
    return [
        f'low_of = tl.full((1, {width}), float("inf"), tl.float32)',
        f'high_of = tl.full((1, {width}), float("-inf"), tl.float32)',
    ]


class Bounds:
    """The lowest and the highest number of each channel in blocks of keys."""

    def __init__(self, writer: Writer, region: Attention) -> None:
        self._writer, self._region = writer, region
        self._size = block_size(region)

    def load(self, dtype: str, mask: str, channels: str | None) -> list[str]:
        """``low_of`` and ``high_of`` [blocks, channels] of the blocks ``c`` of row ``b`` and head ``g``."""
        held = masked(column(mask), f"{channels}[None, :]" if channels else None, other="0.0")
        lines = page(self._writer, self._region, f"(c * {self._size})", mask)
        return [
            *lines,
            *(
                f"{name}_of = tl.load({self._place(end, '[:, None]')}{held}).to({dtype})"
                for end, name in enumerate(("low", "high"))
            ),
        ]

    def store(self, channels: str | None, writes: str | None = None) -> list[str]:
        """Puts ``low_of`` and ``high_of`` [1, channels] where block ``c`` [1] has them."""
        held = masked(f"{channels}[None, :]" if channels else None, writes)
        lines = page(self._writer, self._region, f"(c * {self._size})", None)
        return [
            *lines,
            *(
                f"tl.store({self._place(end, '[:, None]')}, {name}_of{held})"
                for end, name in enumerate(("low", "high"))
            ),
        ]

    def grow(self, k: Stored, until: str, block: str) -> list[str]:
        """Widens ``low_of`` and ``high_of`` [1, channels] by the keys from ``begin`` to ``until`` as memory holds them.

        ``block`` is the number of keys of a tile.
        """
        scales = "" if k.scale is None else " * k_scales[:, None]"
        body = [
            f"t = first + tl.arange(0, {block})", f"there = t < {until}",
            *page(self._writer, self._region, "t", "there"), *k.load("there"), f"x = key.to(tl.float32){scales}",
            'low_of = tl.minimum(low_of, tl.min(tl.where(there[:, None], x, float("inf")), 0, keep_dims=True))',
            'high_of = tl.maximum(high_of, tl.max(tl.where(there[:, None], x, float("-inf")), 0, keep_dims=True))',
        ]  # fmt: skip
        return [f"for first in range(begin, {until}, {block}):", *(f"    {line}" for line in body)]

    def _place(self, end: int, shape: str) -> str:
        view = self._region.k_bounds
        assert view is not None
        if self._region.pages is None:
            base = address(self._writer, view, "k_bounds", ["b", "g"])
            place = terms(self._writer, view.strides[2:], [f"tl.cast(c, tl.int64){shape}"])
        else:
            base = address(self._writer, view, "k_bounds", [None, "g"])
            block = f"(slot // {self._size}){shape}"
            place = terms(self._writer, (view.strides[0], view.strides[2]), [f"page{shape}", block])
        other = [self._writer.size(view.strides[3])] if end else []
        return " + ".join([base, *place, *other, "d[None, :]"])
