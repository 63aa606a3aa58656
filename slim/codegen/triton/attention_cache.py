"""Keys and values in memory: as tensors, in a cache of floats or of quantised numbers, contiguous or in pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slim.codegen.regions.schedule import Attention
from slim.codegen.regions.views import View
from slim.codegen.triton.attention_parts import TYPES, across, address, column, inside, masked, padded, terms
from slim.codegen.triton.writer import Writer


@dataclass
class Stored:
    """Keys or values as kernels read and write them, a tile [tokens, channels] at a time.

    Four-bit numbers lie two a byte, channel 2j below channel 2j + 1, and each plus 8.

    Attributes:
        name: "k" or "v".
        tile: what a tile's variable is called.
        view: [B, G, T, width], or [pages, G, page_size, width] with ``pages``; half the width where ``packed``.
        axis: the variable that holds the channels.
        scale: of each token, of the shape of ``view`` but its channels; None where numbers are floats.
        dtype: as Triton spells it, in which products are made.
        scattered: whether the tokens of a tile may lie anywhere.
    """

    writer: Writer
    name: str
    tile: str
    view: View
    axis: str
    width: int
    dtype: str
    scale: View | None = None
    pages: View | None = None
    scattered: bool = False

    @property
    def packed(self) -> bool:
        return self.view.buffer.dtype == torch.uint8

    @property
    def _channels(self) -> tuple[str, str | None]:
        """The variable of a row's elements in memory, and the one that says which there are."""
        if not self.packed:
            return self.axis, inside(self.axis, self.width)
        return f"{self.axis}_pair", f"{self.axis}_pair_in" if padded(self.width) != self.width else None

    @property
    def _pointer(self) -> str:
        return f"{self.name}_cache"

    def begin(self, block: str | None) -> list[str]:
        """What does not change between tiles; ``block`` is the number of tokens of a tile, if any is read."""
        row = None if self.pages else "b"
        lines = [f"{self.name}_base = {address(self.writer, self.view, self._pointer, [row, 'g'])}"]
        if self.scale is not None:
            place = address(self.writer, self.scale, f"{self.name}_scale", [row, "g"])
            lines.append(f"{self.name}_scale_base = {place}")
        if self.packed and block is not None:
            lines.append(f"{self.axis}_pair = tl.arange(0, {padded(self.width) // 2})")
            if self._channels[1]:
                lines.append(f"{self._channels[1]} = {self._channels[0]} < {self.width // 2}")
        if block is not None and not self.pages and not self.scattered:
            parts = terms(self.writer, self.view.strides[2:], [f"tl.arange(0, {block})[:, None]"])
            lines.append(f"{self.name}_tile = {' + '.join([*parts, f'{self._channels[0]}[None, :]'])}")
        return lines

    def load(self, mask: str | None) -> list[str]:
        """The variable ``tile``: that of the tokens ``t``, side by side from ``first`` on unless they are scattered;
        ``mask`` is of tokens.

        Numbers of a quantised cache are left as they are: ``k_scales`` or ``v_scales`` are the factors of the tokens.
        """
        channels, held = self._channels
        if self.pages:
            place = " + ".join(terms(self.writer, (self.view.strides[0], self.view.strides[2]), ["page", "slot"]))
            at = f"{self.name}_base + ({place})[:, None] + {channels}[None, :]"
        elif self.scattered:
            step = terms(self.writer, self.view.strides[2:], ["tl.cast(t, tl.int64)[:, None]"])
            at = " + ".join([f"{self.name}_base", *step, f"{channels}[None, :]"])
        else:
            step = terms(self.writer, self.view.strides[2:], ["tl.cast(first, tl.int64)"])
            at = " + ".join([f"{self.name}_base", *step, f"{self.name}_tile"])
        other = "136" if self.packed else "0"  # two zeros, each plus 8
        lines = [f"{self.tile} = tl.load({at}{masked(column(mask), across(held), other=other)})"]
        if self.packed:
            lines.append(f"{self.tile} = tl.interleave({self.tile} & 15, {self.tile} >> 4).to(tl.int8) - 8")
        if TYPES[self.view.buffer.dtype] != self.dtype:
            # the interpreter makes bfloat16 of floats alone
            whole = ".to(tl.float32)" if self.scale is not None else ""
            lines.append(f"{self.tile} = {self.tile}{whole}.to({self.dtype})")
        return [*lines, *self._scales(mask)]

    def _scales(self, mask: str | None) -> list[str]:
        if self.scale is None:
            return []
        strides = self.scale.strides
        if self.pages:
            place = terms(self.writer, (strides[0], strides[2]), ["page", "slot"])
        else:
            place = terms(self.writer, strides[2:], ["t"])
        at = " + ".join([f"{self.name}_scale_base", *place])
        return [f"{self.name}_scales = tl.load({at}{masked(mask, other='0.0')}).to(tl.float32)"]

    # -- writing -------------------------------------------------------------------------------------------------------

    def append(self, rows: str, mask: str | None, writes: str | None = None) -> list[str]:
        """Stores ``name_new`` [rows, channels], for the tokens ``at``, and leaves it as a later step would read it.

        Args:
            rows: the number of tokens in the tile.
            mask: which of them there are.
            writes: a scalar condition on which this program is the one that stores.
        """
        if self.scale is None:
            kind = TYPES[self.view.buffer.dtype]
            channels = across(inside(self.axis, self.width))
            store = f"tl.store({self._at(self.axis)}, {self.name}_new{masked(column(mask), channels, writes)})"
            return [f"{self.name}_new = {self.name}_new.to({kind})", store]
        return self._quantise(rows, mask, writes)

    def _at(self, channels: str | None) -> str:
        """Where the tokens ``at`` lie; of their scales where ``channels`` is None."""
        view = self.scale if channels is None else self.view
        assert view is not None
        indices = ["page", "slot"] if self.pages else [None, "at"]
        shape = "" if channels is None else "[:, None]"
        place = terms(self.writer, (view.strides[0], view.strides[2]), [i and i + shape for i in indices])
        base = f"{self.name}_scale_base" if channels is None else f"{self.name}_base"
        return " + ".join([base, *place, *([] if channels is None else [f"{channels}[None, :]"])])

    def _quantise(self, rows: str, mask: str | None, writes: str | None) -> list[str]:
        assert self.scale is not None
        n, low, high = self.name, -8 if self.packed else -128, 7 if self.packed else 127
        kept = TYPES[self.scale.buffer.dtype]
        lines = [f"{n}_new = {n}_new.to(tl.float32)"]
        if self.packed:  # the step has a sign: what is largest becomes -8
            lines += [
                f"{n}_high = tl.max({n}_new, 1)", f"{n}_low = tl.min({n}_new, 1)",
                f"{n}_step = tl.where({n}_high > -{n}_low, {n}_high, {n}_low) / -8.0",
            ]  # fmt: skip
        else:
            lines.append(f"{n}_step = tl.max(tl.abs({n}_new), 1) / 127.0")
        lines += [
            # as it is kept: the numbers are chosen for the scale that a later step reads
            f"{n}_step = {n}_step.to({kept})",
            f"tl.store({self._at(None)}, {n}_step{masked(mask, writes)})",
            f"{n}_step = {n}_step.to(tl.float32)[:, None]",
            f"{n}_new = {n}_new / tl.where({n}_step == 0.0, 1.0, {n}_step)",
            f"{n}_new = tl.clamp({self.writer.function('round_even')}({n}_new), {low}.0, {high}.0)",
        ]
        if self.packed:
            half = padded(self.width) // 2
            channels = f"{self.axis}_half"
            lines += [
                f"{channels} = tl.arange(0, {half})",
                f"low, high = tl.split(tl.reshape({n}_new.to(tl.int32) + 8, ({rows}, {half}, 2)))",
                "bits = (low | (high << 4)).to(tl.uint8)",
            ]
            there = f"({channels} < {self.width // 2})[None, :]"
            lines.append(f"tl.store({self._at(channels)}, bits{masked(column(mask), there, writes)})")
        else:
            held = across(inside(self.axis, self.width))
            lines.append(f"tl.store({self._at(self.axis)}, {n}_new.to(tl.int8){masked(column(mask), held, writes)})")
        return [*lines, f"{n}_new = {n}_new * {n}_step"]


def stored(
    writer: Writer, region: Attention, dtype: str, kept: dict[str, View], scattered: bool = False
) -> tuple[Stored, Stored]:
    """Keys and values as attention reads them: from the cache, from ``kept`` ("k" or "v"), or as they were given."""
    found = []
    for name, tile, axis, given, cache, scale in (
        ("k", "key", "d", region.k, region.k_cache, region.k_scale),
        ("v", "value", "e", region.v, region.v_cache, region.v_scale),
    ):  # fmt: skip
        view = kept.get(name, given) if cache is None else cache
        width = int(given.shape[3])
        found.append(Stored(writer, name, tile, view, axis, width, dtype, scale, region.pages, scattered))
    return found[0], found[1]


def less_offset(writer: Writer, region: Attention, width: int) -> list[str]:
    """``k_new`` less what is taken off every key of the head."""
    if region.k_offset is None:
        return []
    place = address(writer, region.k_offset, "k_offset", ["g", None, "d[None, :]"])
    kind = TYPES[region.k.buffer.dtype]
    return [f"k_new = (k_new - tl.load({place}{masked(across(inside('d', width)), other='0.0')})).to({kind})"]


def page(writer: Writer, region: Attention, token: str, mask: str | None) -> list[str]:
    """``page`` and ``slot`` of each of the numbers ``token``, where the cache is in pages."""
    if region.pages is None:
        return []
    assert region.k_cache is not None
    size = writer.size(region.k_cache.shape[2])
    lines = [f"block_of = {token} // {size}"]
    if region.window is not None or region.pattern is not None:  # else nothing leaves, and no column is used twice
        columns, fixed = writer.size(region.pages.shape[1]), region.fixed
        turned = f"{fixed} + (block_of - {fixed}) % tl.maximum({columns} - {fixed}, 1)"
        lines.append(f"block_of = tl.where(block_of < {columns}, block_of, {turned})")
    place = address(writer, region.pages, "pages", ["b", "block_of"])
    return [
        *lines, f"page = tl.load({place}{masked(mask, other='0')}).to(tl.int64)", f"slot = {token} % {size}",
    ]  # fmt: skip
