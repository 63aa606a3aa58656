"""The input rows of a linear inside its kernel: loaded by columns, normalised or rounded to int8 on the way.

An RMS norm needs no pass of its own: the sum of squares grows beside the products, and the inverse multiplies the
result. A layer norm, and any norm before rounding, is computed from the whole row first.
"""

from __future__ import annotations

from slim.codegen.regions.products import Source
from slim.codegen.regions.views import View
from slim.codegen.triton.rounding import step_of
from slim.codegen.triton.sweep import Row, place
from slim.codegen.triton.text import Axis, Index, ScalarText, number
from slim.codegen.triton.writer import Writer, indented


class Input:
    """Blocks of rows as text; ``k`` is the variable that holds a block's columns.

    Attributes:
        begin: statements before all others.
        wide: what turns a vector over ``k`` into the shape of a block of x: "" or "[None, :]".
        sum: how a block is summed over its columns.
    """

    def __init__(self, writer: Writer, source: Source, row: Row, ragged: bool, late: bool = True) -> None:
        self.writer, self.source, self.ragged, self._late = writer, source, ragged, late
        self.n = int(source.view.shape[-1])
        self.block = row.mask is not None  # rows are [BLOCK_M, 1], else one
        self.wide = "[None, :]" if self.block else ""
        writer.pointer(source.view.buffer, "x")
        lead = source.view.shape[:-1]
        maps = [view.strides for view in (source.view, source.scale) if view is not None]
        column = Axis(f"k{self.wide}")
        self.begin, self._index = place(writer, lead, maps, Row(row.name), "o", column)
        self._steps: str | None = None
        if source.scale is not None:
            axes = Index(self._index.axes[:-1], self._index.groups[:-1])
            self._steps = ScalarText(writer, axes).address(source.scale).text
            self.begin = [*self.begin, f"step = tl.load({self._steps}).to(tl.float32)"]

    @property
    def is_late(self) -> bool:
        """Whether the norm's factor is applied to the sums."""
        norm = self.source.norm
        return norm is not None and norm.kind == "rms" and not self.source.is_rounded and self._late

    @property
    def rounds(self) -> bool:
        """Whether x is still to be rounded to int8."""
        return self.source.is_rounded and self.source.view.buffer.dtype.is_floating_point

    def columns(self) -> list[str]:
        lines = ["k = start + tl.arange(0, BLOCK_K)"]
        return [*lines, f"there = k < {self.n}"] if self.ragged else lines

    def raw(self) -> str:
        """The block as it is stored."""
        return self._load(self.source.view, self._index, self.wide)

    def block_of(self) -> list[str]:
        """``x_k``: the block in float32, normalised but for a late factor, and in whole steps where it is rounded."""
        lines = [f"x_k = {self.raw()}.to(tl.float32)", *self.squared(), *self.scaled()]
        if self.rounds:
            rounded = f"{self.writer.function('round_even')}(x_k / step)"
            lines.append(f"x_k = tl.minimum(tl.maximum({rounded}, -128.0), 127.0)")
        return lines

    def squared(self) -> list[str]:
        if not self.is_late:
            return []
        return ["square += tl.sum(x_k * x_k, 1, keep_dims=True)" if self.block else "squares += x_k * x_k"]

    def scaled(self) -> list[str]:
        """What a norm does to ``x_k`` before it is multiplied."""
        norm = self.source.norm
        if norm is None:
            return []
        lines = []
        if not self.is_late:
            lines.append(f"x_k = {'(x_k - mean)' if norm.kind == 'layer' else 'x_k'} * inverse")
        if norm.gain is not None:
            offset = f" + {number(norm.offset)}" if norm.offset else ""
            gain = f"({self._vector(norm.gain)}{offset})"
            lines.append(f"x_k = x_k * {gain}{self.wide}")
        if norm.bias is not None:
            lines.append(f"x_k = x_k + {self._vector(norm.bias)}{self.wide}")
        if self.ragged and norm.kind == "layer":  # what lies beyond the end was 0, and is less the mean
            lines.append(f"x_k = tl.where(there{self.wide}, x_k, 0.0)")
        return lines

    def statistics(self) -> list[str]:
        """What must be known of the rows before the first product: ``inverse``, ``mean`` and their own ``step``."""
        total = f"tl.zeros({'(BLOCK_M, BLOCK_K)' if self.block else '(BLOCK_K,)'}, tl.float32)"
        lines = self._moments(total)
        if self.source.own_step:
            largest = f"tl.max(largest, {1 if self.block else 0}{', keep_dims=True' if self.block else ''})"
            each = [*self.scaled(), "largest = tl.maximum(largest, tl.abs(x_k))"]
            lines += [f"largest = {total}", *self._pass(*each), f"step = {step_of(largest)}"]
        return lines

    def _moments(self, total: str) -> list[str]:
        norm = self.source.norm
        if norm is None or self.is_late:
            return []
        lines = []
        term = "x_k * x_k"
        if norm.kind == "layer":
            lines = [f"total = {total}", *self._pass("total += x_k"), f"mean = {self.sum('total')} / {self.n}"]
            term = "(x_k - mean) * (x_k - mean)"
        if norm.kind == "layer" and self.ragged:
            term = f"tl.where(there{self.wide}, {term}, 0.0)"
        lines += [f"square = {total}", *self._pass(f"square += {term}")]
        return [*lines, f"inverse = {self._inverse(self.sum('square'))}"]

    def squares(self) -> list[str]:
        """Where the sum of squares grows: of several rows a number each, of one a number for each column of a block."""
        if not self.is_late:
            return []
        name, shape = ("square", "(BLOCK_M, 1)") if self.block else ("squares", "(BLOCK_K,)")
        return [f"{name} = tl.zeros({shape}, tl.float32)"]

    def late(self) -> list[str]:
        """``inverse``, from the sum of squares ``square``."""
        return [f"inverse = {self._inverse('square')}"] if self.is_late else []

    def sum(self, name: str) -> str:
        return f"tl.sum({name}, 1, keep_dims=True)" if self.block else f"tl.sum({name}, 0)"

    def factors(self) -> list[str]:
        """What the sums of a row are multiplied with."""
        return [*(["inverse"] if self.is_late else []), *(["step"] if self.source.is_rounded else [])]

    def _pass(self, *step: str) -> list[str]:
        load = f"x_k = {self.raw()}.to(tl.float32)"
        return [f"for start in range(0, {self.n}, BLOCK_K):", *indented([*self.columns(), load, *step])]

    def _inverse(self, square: str) -> str:
        assert self.source.norm is not None
        return f"1.0 / tl.sqrt_rn({square} / {self.n} + {number(self.source.norm.eps)})"

    def _vector(self, view: View) -> str:
        return f"{self._load(view, Index([Axis('k')]), '')}.to(tl.float32)"

    def _load(self, view: View, index: Index, wide: str) -> str:
        self.writer.pointer(view.buffer, "gain")
        place_ = ScalarText(self.writer, index).address(view).text
        return f"tl.load({place_}{f', mask=there{wide}, other=0' if self.ragged else ''})"
