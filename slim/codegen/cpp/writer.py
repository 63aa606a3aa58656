"""What every kernel's text is made with: its buffers, its loops, and the table of who writes which region."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slim.codegen.cpp.text import STORED, Arguments, Loop, ScalarText, Sizes
from slim.codegen.regions.scalars import Gather, Iota, Load, Scalar, walk
from slim.codegen.regions.schedule import Region
from slim.codegen.regions.views import Buffer, Size, View, coalesce

PIECE = 4096  # elements that a thread takes at a time: some microseconds of work
NAME = "@"  # stands for the kernel's name, so that equal kernels have equal texts


Emit = Callable[["Writer", Any], list[str]]
WRITERS: dict[type, Emit] = {}


def writes(kind: type) -> Callable[[Emit], Emit]:
    """Registers the function that writes the kernel of a kind of region: statements of its body."""

    def register(function: Emit) -> Emit:
        WRITERS[kind] = function
        return function

    return register


@dataclass
class Kernel:
    """The text of a region's kernel, the buffers it takes in order, and the scratch its library call needs."""

    text: str
    buffers: list[Buffer | None]
    scratch: list[str]


class Writer:
    """Writes one kernel."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.arguments = Arguments()
        self.scratch: list[str] = []
        self.helpers: list[str] = []  # functions that the library calls back

    def kernel(self, region: Region) -> Kernel:
        """The kernel of any region but a foreign one."""
        body = WRITERS[type(region)](self, region)
        head = f"static void {NAME}(const Sizes& z, Thread& t, char* const* p) {{"
        text = "\n".join([*self.helpers, head, *indented(["(void)z;", *body]), "}"])
        return Kernel(text, self.arguments.buffers, self.scratch)

    # -- loops ---------------------------------------------------------------------------------------------------------

    def rows(self, shape: Sequence[Size], bodies: Sequence[Scalar], outs: Sequence[View]) -> Rows:
        """How to walk ``shape`` row by row, all of ``bodies`` and ``outs`` with it."""
        maps = [out.strides for out in outs]
        for body in bodies:
            for scalar in walk(body):
                if isinstance(scalar, (Load, Gather)):
                    maps.append(scalar.view.strides)
                elif isinstance(scalar, Iota):
                    maps.append(scalar.map.strides)
        return Rows(self.sizes, shape, coalesce(shape, maps, keep_last=True))

    def scalars(self, loop: Loop, lanes: dict[int, str] | None = None) -> ScalarText:
        return ScalarText(self.sizes, self.arguments, loop, lanes)


class Rows:
    """A shape as rows of its last dimension: ``r`` is the row, ``i`` the column."""

    def __init__(self, sizes: Sizes, shape: Sequence[Size], groups: list[list[int]]) -> None:
        self.sizes = sizes
        self.shape = shape
        if not groups:  # a single number
            groups = [[]]
        self.outer, self.last = groups[:-1], groups[-1]
        names = [f"i{position}" for position in range(len(self.outer))] if len(self.outer) > 1 else ["r"]
        self.loop = Loop(groups, [*names[: len(self.outer)], "i"])
        self.width = sizes.text(math.prod(shape[d] for d in self.last))
        self.count = sizes.text(math.prod(shape[d] for group in self.outer for d in group))

    def index(self) -> list[str]:
        """Statements that find the outer indices of row ``r``."""
        if len(self.outer) < 2:
            return []
        lines, rest = [], "r"
        for position in range(len(self.outer) - 1, 0, -1):
            size = self.sizes.text(math.prod(self.shape[d] for d in self.outer[position]))
            lines.append(f"const i64 i{position} = {rest} % {size};")
            rest = f"({rest} / {size})"
        return [*lines, f"const i64 i0 = {rest};"]

    def share(self, body: list[str]) -> list[str]:
        """The rows, shared by the threads."""
        piece = f"size_max(1, {PIECE} / size_max(1, {self.width}))"
        inner = ["for (i64 r = begin; r < end; r++) {", *indented([*self.index(), *body]), "}"]
        return [f"t.share({self.count}, {piece}, [&](i64 begin, i64 end) {{", *indented(inner), "});"]


def indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def loop_over(bound: str, body: Sequence[str], begin: str = "0", pragma: str = "GCC ivdep") -> list[str]:
    return [f"#pragma {pragma}", f"for (i64 i = {begin}; i < {bound}; i++) {{", *indented(body), "}"]


def assign(writer: Writer, text: ScalarText, out: View, value: str) -> list[str]:
    """Statements of the inner loop that store ``value``; writes the base pointer into ``text.outer``."""
    place = text.base(out)
    inner = text.loop.address(out.strides, writer.sizes, True)
    return [f"{place}[{' + '.join(inner) or '0'}] = ({STORED[out.buffer.dtype]}){value};"]


def decompose(sizes: Sizes, shape: Sequence[Size], index: str, prefix: str) -> list[str]:
    """Statements that split ``index`` into one variable for each dimension of ``shape``."""
    lines, rest = [], index
    for d in range(len(shape) - 1, -1, -1):
        if d == 0:
            lines.append(f"const i64 {prefix}0 = {rest};")
        else:
            size = sizes.text(shape[d])
            lines.append(f"const i64 {prefix}{d} = {rest} % {size};")
            rest = f"({rest} / {size})"
    return [*lines, *(f"(void){prefix}{d};" for d in range(len(shape)))]
