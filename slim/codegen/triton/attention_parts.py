"""What the kernels of attention share: their shapes, addresses, how scores are made, the running softmax.

Names in a kernel's text: ``b`` the row of the batch, ``g`` the kv head, ``d`` and ``e`` the channels of keys and of
values, ``index`` the numbers of the queries, ``t`` those of a tile's keys, ``s`` [queries, keys] its scores in units of
log 2, ``top`` and ``total`` the maximum and the sum of the exponentials so far, ``acc`` [queries, e] the values so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slim.codegen.regions.schedule import Attention
from slim.codegen.regions.views import Size, View
from slim.codegen.triton.text import number
from slim.codegen.triton.writer import Writer, power_of_two

LOG2E = 1.4426950408889634
TYPES = {
    torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
}  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """Numbers of a region that are known when its kernels are written.

    Attributes:
        width, value_width: channels of a key and of a value.
        share: query heads that read the same kv head.
        dtype: of the queries, in which products are made.
    """

    heads: int
    kv_heads: int
    width: int
    value_width: int
    dtype: str

    @property
    def share(self) -> int:
        return self.heads // self.kv_heads

    @property
    def precision(self) -> str:
        """What a tl.dot is told."""
        return ', input_precision="ieee"' if self.dtype == "tl.float32" else ""

    @property
    def bytes(self) -> int:
        return 4 if self.dtype == "tl.float32" else 2

    def channels(self) -> list[str]:
        """Statements for ``d`` and ``e``, and for which of them there are."""
        lines = []
        for axis, width in (("d", self.width), ("e", self.value_width)):
            lines.append(f"{axis} = tl.arange(0, {padded(width)})")
            if inside(axis, width):
                lines.append(f"{inside(axis, width)} = {axis} < {width}")
        return lines


def geometry(region: Attention) -> Geometry:
    heads, kv_heads, width, value_width = (
        int(size) for size in (region.q.shape[1], region.k.shape[1], region.q.shape[3], region.v.shape[3])
    )
    return Geometry(heads, kv_heads, width, value_width, TYPES[region.q.buffer.dtype])


def padded(width: int) -> int:
    """The number of channels of a tile: what tl.dot takes."""
    return max(16, power_of_two(width))


def inside(axis: str, width: int) -> str | None:
    """The variable that says which channels there are; None where the tile has no others."""
    return f"{axis}_in" if padded(width) != width else None


def masked(*conditions: str | None, other: str | None = None) -> str:
    """The arguments by which a load or a store leaves out what does not hold all of ``conditions``."""
    held = [condition for condition in conditions if condition]
    if not held:
        return ""
    return f", mask={' & '.join(held)}" + (f", other={other}" if other is not None else "")


def column(mask: str | None) -> str | None:
    """A mask of a tile's rows."""
    return f"{mask}[:, None]" if mask else None


def across(mask: str | None) -> str | None:
    """A mask of a tile's columns."""
    return f"{mask}[None, :]" if mask else None


def address(writer: Writer, view: View, name: str, indices: Sequence[str | None]) -> str:
    """The pointer to ``view`` at ``indices``; None is index 0."""
    parts = [writer.pointer(view.buffer, name)]
    if view.offset != 0:
        parts.append(writer.size(view.offset))
    return " + ".join([*parts, *(terms(writer, view.strides, indices))])


def terms(writer: Writer, strides: Sequence[Size], indices: Sequence[str | None]) -> list[str]:
    found = []
    for stride, index in zip(strides, indices, strict=False):
        if index is not None and stride != 0:
            found.append(index if stride == 1 else f"{index} * {writer.size(stride)}")
    return found


def held(writer: Writer, region: Attention) -> str:
    """How many keys row ``b`` has from before."""
    if region.lengths is not None:
        return f"tl.load({address(writer, region.lengths, 'lengths', ['b'])})"
    return "0" if region.start is None else writer.size(region.start)


# -- scores ------------------------------------------------------------------------------------------------------------


class Softmax:
    """How scores are made of products, and what becomes of them.

    Args:
        index: the numbers of the queries, as a column or a scalar.
    """

    def __init__(self, writer: Writer, region: Attention, index: str) -> None:
        self._writer, self._region, self._index = writer, region, index
        extras = (region.softcap, region.slopes, region.bias)
        # scores stay products, and the scale becomes part of the exponent, where nothing is added to them
        self._late = all(extra is None for extra in extras) and region.scale > 0
        self._factor = f" * {number(region.scale * LOG2E)}" if self._late else ""

    def begin(self, head: str, column_of: str, mask: str | None = None) -> list[str]:
        """Operands that a query head has one of; ``column_of`` makes a column of them, such as "[:, None]"."""
        lines = []
        for name, view in (("sink", self._region.sinks), ("slope", self._region.slopes)):
            if view is not None:
                place = address(self._writer, view, f"{name}s", [head])
                shape = column_of if name == "slope" else ""
                lines.append(f"{name} = tl.load({place}{masked(mask, other='0.0')}).to(tl.float32){shape} * {LOG2E}")
        return lines

    def scores(self, seen: Sequence[str], bias: str | None = None) -> list[str]:
        """``s`` of the products ``s``.

        Args:
            seen: conditions, over the tile, on which a key counts.
            bias: what is loaded and added.
        """
        region, lines = self._region, []
        if region.softcap is not None:
            tanh = self._writer.function("tanh")
            lines.append(f"s = {tanh}(s * {number(region.scale / region.softcap)}) * {number(region.softcap * LOG2E)}")
        elif not self._late:
            lines.append(f"s = s * {number(region.scale * LOG2E)}")
        if region.slopes is not None:
            lines.append(f"s += slope * (t[None, :] - {self._index}).to(tl.float32)")
        if bias is not None:
            lines.append(f"s += {bias}.to(tl.float32) * {LOG2E}")
        if seen:
            lines.append(f's = tl.where({" & ".join(seen)}, s, float("-inf"))')
        return lines

    def limit(self, keys: str) -> list[str]:
        """``limit``: log 2 of the share that one key must reach to count, so that all that is left out is ``skip``."""
        skip = self._region.skip
        return [f"limit = tl.log2({number(skip)} / tl.maximum({keys}, 1).to(tl.float32))"] if skip else []

    def enough(self) -> list[str]:
        """``enough``: whether a key of the tile may hold more than that share in one of the rows ``row_in``."""
        most = f"tl.max(s, 1){self._factor}"
        return [
            f"highest = {most}", 'looks = row_in & (highest > float("-inf"))',
            'enough = tl.max(tl.where(looks, highest - top, float("-inf")), 0) >= limit',
        ]  # fmt: skip

    def step(self, guarded: bool) -> list[str]:
        """``p``, the exponentials of ``s``, and what is left of the values so far.

        Args:
            guarded: whether a row may have seen no key yet.
        """
        lines = [f"most = tl.maximum(top, tl.max(s, 1){self._factor})"]
        base = "most"
        if guarded:
            lines.append('base = tl.where(most == float("-inf"), 0.0, most)')
            base = "base"
        return [
            *lines, f"p = {self.weights(base)}", f"left = tl.exp2(top - {base})",
            "total = total * left + tl.sum(p, 1)", "acc = acc * left[:, None]", "top = most",
        ]  # fmt: skip

    def weights(self, level: str) -> str:
        """The exponentials of ``s`` less the level of each row."""
        return f"tl.exp2(s{self._factor} - {level}[:, None])"

    def finish(self) -> list[str]:
        """``acc``, divided by all that was summed; rows that saw no key are zeros."""
        return [*self.sinks(), "acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]"]

    def sinks(self) -> list[str]:
        """``total``, with the logit that each head adds."""
        if self._region.sinks is None:
            return []
        return ['total += tl.exp2(sink - tl.where(top == float("-inf"), 0.0, top))']


class Nearer:
    """Queries of their own for the first keys: ``q_near``, rotated already."""

    def __init__(self, writer: Writer, region: Attention, geometry: Geometry) -> None:
        self._writer, self._region, self._g = writer, region, geometry

    def __bool__(self) -> bool:
        return self._region.q_first is not None

    def load(self, indices: Sequence[str | None], mask: str) -> list[str]:
        """``indices`` are all but the channels; ``mask`` says which rows there are, as a column."""
        if self._region.q_first is None:
            return []
        place = address(self._writer, self._region.q_first, "q_first", [*indices, "d[None, :]"])
        held = masked(mask, across(inside("d", self._g.width)), other="0.0")
        return [f"q_near = tl.load({place}{held})"]

    def scores(self) -> list[str]:
        """The products ``s``, where a tile may hold first keys."""
        if not self:
            return []
        near = f"tl.dot(q_near, tl.trans(key){self._g.precision})"
        return [f"s = tl.where((t < {self._region.first})[None, :], {near}, s)"]


def start(rows: str, geometry: Geometry) -> list[str]:
    """The running softmax before the first key."""
    return [
        f'top = tl.full(({rows},), float("-inf"), tl.float32)', f"total = tl.zeros(({rows},), tl.float32)",
        f"acc = tl.zeros(({rows}, {padded(geometry.value_width)}), tl.float32)",
    ]  # fmt: skip


def key_mask(writer: Writer, region: Attention, mask: str | None) -> list[str]:
    """``counts``: which keys of the tile may be seen at all."""
    if region.key_mask is None:
        return []
    place = address(writer, region.key_mask, "key_mask", ["b", "t"])
    return [f"counts = tl.load({place}{masked(mask, other='0')}) != 0"]
