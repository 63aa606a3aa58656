"""What the kernels of a linear share: choosing a part, placing rows, splitting over columns, storing results.

A kernel's program makes ``BLOCK_N`` columns of one part's results. Programs of all parts are counted together: the
program finds its part by its number, and from there on only pointers differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from slim.codegen.regions.products import Linear, Matrix, Part, Source
from slim.codegen.regions.scalars import Gather, Iota, Load, Scalar, walk
from slim.codegen.regions.views import Size, View, coalesce
from slim.codegen.triton.kernel import Config
from slim.codegen.triton.loops import decompose
from slim.codegen.triton.text import Axis, Index, ScalarText, Text
from slim.codegen.triton.weights import INTEGERS
from slim.codegen.triton.writer import Writer, indented


@dataclass(frozen=True)
class Branch:
    """A part, and the matrices that its products read: its own, or copies of them in another format."""

    part: Part
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True)
class Sweep:
    """Parts whose matrices are alike, over the same rows: one kernel.

    Attributes:
        like: the type that the rows have in the Program, or had before they were rounded to int8.
    """

    region: Linear
    source: Source
    branches: tuple[Branch, ...]
    like: torch.dtype

    @property
    def matrix(self) -> Matrix:
        """One of them, for what all have in common."""
        return self.branches[0].matrices[0]

    @property
    def lanes(self) -> int:
        return len(self.branches[0].matrices)

    @property
    def n(self) -> int:
        return self.matrix.n

    @property
    def m(self) -> int:
        """Rows of all weights together, the two of gate and up counted once."""
        return sum(branch.matrices[0].m for branch in self.branches)

    @property
    def lead(self) -> tuple[Size, ...]:
        return self.source.view.shape[:-1]

    @property
    def rows(self) -> Size:
        return math.prod(self.lead)

    @property
    def is_integer(self) -> bool:
        """Whether both sides are integers, so that sums are exact."""
        return self.source.is_rounded and self.matrix.format in INTEGERS

    def ragged(self, configs: Sequence[Config], block: str) -> bool:
        """Whether some block of ``configs`` sticks out over the end: masks cost, so they are only where this is."""
        sizes = [self.n] if block == "BLOCK_K" else [branch.matrices[0].m for branch in self.branches]
        return any(size % config[block] for size in sizes for config in configs)

    @property
    def blocks(self) -> str:
        """Number of blocks of columns, of all parts."""
        return " + ".join(f"triton.cdiv({branch.matrices[0].m}, BLOCK_N)" for branch in self.branches)


def choose(writer: Writer, sweep: Sweep) -> list[str]:
    """Statements that find the part of ``block``: its weights, its scales, its first column, how many it has."""
    if len(sweep.branches) == 1:
        return [*_pointers(writer, sweep, 0), "first = block * BLOCK_N"]
    lines, before = [], ""
    for index, branch in enumerate(sweep.branches):
        own = f"({branch.matrices[0].m} + BLOCK_N - 1) // BLOCK_N"
        start = f"(block - ({before}))" if before else "block"
        before = f"{before} + {own}" if before else own
        lines.append(_case(index, len(sweep.branches), before))
        chosen = [*_pointers(writer, sweep, index), f"first = {start} * BLOCK_N", f"m = {branch.matrices[0].m}"]
        lines += indented(chosen)
    return lines


def columns(sweep: Sweep, ragged: bool) -> list[str]:
    """``column``: those of the results. ``at``: the rows of the weight, inside it where a block is not."""
    m = str(sweep.m) if len(sweep.branches) == 1 else "m"
    lines = ["column = first + tl.arange(0, BLOCK_N)"]
    if not ragged:
        return [*lines, "at = column.to(tl.int64)"]
    return [*lines, f"inside = column < {m}", f"at = tl.minimum(column, {m} - 1).to(tl.int64)"]


def _case(index: int, count: int, before: str) -> str:
    if index == count - 1:
        return "else:"
    return f"{'elif' if index else 'if'} block < {before}:"


def _pointers(writer: Writer, sweep: Sweep, index: int) -> list[str]:
    lines = []
    for lane, matrix in enumerate(sweep.branches[index].matrices):
        name = f"{index}" + "b" * lane
        lines.append(f"data{lane} = {writer.pointer(matrix.data, f'w{name}')}")
        if matrix.scale is not None:
            lines.append(f"scale{lane} = {writer.pointer(matrix.scale, f's{name}')}")
        if matrix.zero is not None:
            lines.append(f"zero{lane} = {writer.pointer(matrix.zero, f'z{name}')}")
    return lines


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The rows that a program works on.

    Attributes:
        name: the variable with their numbers, int64: a scalar, or a block [BLOCK_M, 1]; None where there is one row.
        mask: which of them there are.
    """

    name: str | None = None
    mask: str | None = None


def place(
    writer: Writer, lead: Sequence[Size], maps: Sequence[Sequence[Size]], row: Row, prefix: str, column: Axis | None
) -> tuple[list[str], Index]:
    """The index of a shape (lead..., columns) for ``row`` and ``column``, with the statements that find its axes.

    ``maps`` are the strides of all that is read or written with it. Without ``column`` the shape is ``lead``.
    """
    groups = coalesce(lead, [strides[: len(lead)] for strides in maps])
    last = [[len(lead)]] if column is not None else []
    if row.name is None:
        return [], Index([*(None for _ in groups), *([column] if column else [])], [*groups, *last])
    counts = [math.prod(lead[d] for d in group) for group in groups]
    axes = [Axis(f"{prefix}{g}", row.mask) for g in range(len(groups))]
    return decompose(writer, counts, row.name, prefix), Index([*axes, *([column] if column else [])], [*groups, *last])


# -- results -----------------------------------------------------------------------------------------------------------


class Results:
    """What is made of the sums, part by part."""

    def __init__(self, writer: Writer, sweep: Sweep, row: Row, column: Axis) -> None:
        self.writer, self.sweep = writer, sweep
        self._texts = [self._of_part(index, row, column) for index in range(len(sweep.branches))]

    def _of_part(self, index: int, row: Row, column: Axis) -> tuple[_Stored, ...]:
        """The results side by side, then where each goes to a column of its own."""
        part = self.sweep.branches[index].part
        tag = f"_{index}" if len(self.sweep.branches) > 1 else ""
        lanes = {id(product): f"y{lane}" for lane, product in enumerate(part.products)}
        plain = _Stored.of(self.writer, part.body, part.shape, part.out, row, column, lanes, f"out{index}", "r", tag)
        if part.placed is None:
            return (plain,)
        to = part.placed
        goes = Axis(column.name.replace("column", f"goes{tag}"), column.mask)
        placed = _Stored.of(self.writer, to.body, to.out.shape, to.out, row, goes, {}, f"placed{index}", "p", f"{tag}p")
        offset = "" if to.columns.offset == 0 else f" + {self.writer.size(to.columns.offset)}"
        placed.lines.append(f"goes{tag} = tl.load({self.writer.pointer(to.columns.buffer)}{offset} + at).to(tl.int32)")
        return plain, placed

    def early(self) -> list[str]:
        """What can be read before the sums are known, so that nothing waits for it after them."""
        if len(self._texts) > 1:
            return []
        return [line for stored in self._texts[0] for line in stored.early()]

    def store(self) -> list[str]:
        """From the sums ``y0`` (and ``y1``) to memory."""
        stores = []
        for branch, texts in zip(self.sweep.branches, self._texts, strict=True):
            lines = texts[0].store()
            for stored in texts[1:]:
                assert branch.part.placed is not None
                stored.text.lanes[id(branch.part.placed.pair)] = Text(texts[0].value, stored.axes)
                lines += stored.store()
            stores.append(lines)
        if len(stores) == 1:
            return stores[0]
        result, before = [], ""
        for index, (branch, body) in enumerate(zip(self.sweep.branches, stores, strict=True)):
            own = f"({branch.matrices[0].m} + BLOCK_N - 1) // BLOCK_N"
            before = f"{before} + {own}" if before else own
            result += [_case(index, len(stores), before), *indented(body)]
        return result


@dataclass
class _Stored:
    """A body over the results of one part, and where it goes.

    Attributes:
        lines: statements that find the axes of its index.
        value: the variable that holds it, once it is stored.
    """

    body: Scalar
    out: View | None
    lines: list[str]
    text: ScalarText
    axes: frozenset[Axis]
    value: str = ""

    @classmethod
    def of(
        cls, writer: Writer, body: Scalar, shape: Sequence[Size], out: View | None, row: Row, column: Axis,
        lanes: Mapping[int, str], name: str, prefix: str, tag: str,
    ) -> _Stored:  # fmt: skip
        """``body`` over ``shape``; ``name`` is what the memory of ``out`` is called."""
        if out is not None:
            writer.pointer(out.buffer, name)
        maps = [out.strides] if out is not None else []
        for scalar in walk(body):
            if isinstance(scalar, (Load, Gather)):
                maps.append(scalar.view.strides)
            elif isinstance(scalar, Iota):
                maps.append(scalar.map.strides)
        lines, index = place(writer, shape[:-1], maps, row, f"{prefix}{tag}_", column)
        axes = frozenset(axis for axis in index.axes if axis is not None)
        texts = {anchor: Text(lane, axes) for anchor, lane in lanes.items()}
        return cls(body, out, lines, ScalarText(writer, index, texts, tag), axes)

    def early(self) -> list[str]:
        for scalar in walk(self.body):
            if isinstance(scalar, Load):
                self.text.write(scalar)
        done = [*self.lines, *self.text.lines]
        self.lines, self.text.lines = [], []
        return done

    def store(self) -> list[str]:
        self.value = self.text.write(self.body).text
        stores = [self.text.store(self.out, self.value)] if self.out is not None else []
        return [*self.lines, *self.text.lines, *stores]


# -- splitting over columns of the weight ------------------------------------------------------------------------------


def is_split(configs: Sequence[Config]) -> bool:
    return any(config["SPLIT_K"] > 1 for config in configs)


def span(sweep: Sweep, configs: Sequence[Config]) -> tuple[list[str], str]:
    """The program's columns of the weight: statements, and the bounds as a range takes them."""
    n = sweep.n
    if not is_split(configs):
        return [], f"0, {n}"
    chunk = f"({n} + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K"
    lines = [f"begin = tl.program_id(1) * ({chunk})", f"end = tl.minimum(begin + {chunk}, {n})"]
    return lines, "begin, end"


@dataclass(frozen=True)
class Sum:
    """A variable that programs which share a block add up: where its elements lie among ``count`` numbers."""

    name: str
    at: str
    count: str
    is_integer: bool = False


def gather(writer: Writer, unit: str, sums: Sequence[Sum]) -> list[str]:
    """The last of the programs that share block ``unit`` adds what all have summed, always in the same order."""
    scratch, counters = writer.pointer("scratch"), writer.pointer("counters")
    size = " + ".join(each.count for each in sums)
    lines = [f"held = {scratch} + {unit}.to(tl.int64) * (SPLIT_K * ({size}))"]
    memory = {False: "held", True: "whole"}
    if any(each.is_integer for each in sums):
        lines.append("whole = held.to(tl.pointer_type(tl.int32), bitcast=True)")
    places = []
    for index, each in enumerate(sums):
        before = "".join(f"{other.count} + " for other in sums[:index])
        places.append(f"{memory[each.is_integer]} + {{}} * ({size}) + {before}{each.at}")
    for each, place_ in zip(sums, places, strict=True):
        lines.append(f"tl.store({place_.format('tl.program_id(1)')}, {each.name})")
    lines += [
        "tl.debug_barrier()  # all of this program's sums are stored before it is counted",
        f'arrived = tl.atomic_add({counters} + {unit}, 1, sem="acq_rel")',
        "if arrived != SPLIT_K - 1:",
        "    return",
        f"tl.store({counters} + {unit}, 0)",
    ]
    read = ['{0} {1} tl.load({2}, cache_modifier=".cg")'] * len(sums)
    lines += [r.format(s.name, "=", p.format("0")) for r, s, p in zip(read, sums, places, strict=True)]
    more = [r.format(s.name, "+=", p.format("part")) for r, s, p in zip(read, sums, places, strict=True)]
    return ["if SPLIT_K > 1:", *indented([*lines, "for part in tl.static_range(1, SPLIT_K):", *indented(more)])]
