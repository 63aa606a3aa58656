"""A linear with one input row: each weight is read once, and nothing else takes time.

Sums are [BLOCK_N, BLOCK_K / PIECE], of pieces of a row that one thread holds: fewer registers than a sum an element,
and where groups have scales, one multiplication a piece.
"""

from __future__ import annotations

from collections.abc import Sequence

from slim.codegen.regions.products import Matrix
from slim.codegen.triton.kernel import Config, Kernel
from slim.codegen.triton.source import Input
from slim.codegen.triton.sweep import Results, Row, Sum, Sweep, choose, columns, gather, is_split, span
from slim.codegen.triton.text import Axis
from slim.codegen.triton.weights import PACKINGS, moved, packed, rows_of, to_float, units, zero_points
from slim.codegen.triton.writer import Target, Writer, indented, power_of_two


def one_row(sweep: Sweep, target: Target) -> Kernel:
    """The kernel for one row; with experts, for few rows, each by the matrices of its own expert."""
    writer = Writer(sweep.region, target)
    configs = configurations(sweep, target)
    experts = sweep.source.expert is not None
    row = Row("row") if experts else Row()
    body = _Body(writer, sweep, row, configs)
    split, (spanned, bounds) = is_split(configs), span(sweep, configs)
    lines = [
        "block = tl.program_id(0)", *(["row = tl.program_id(2).to(tl.int64)"] if experts else []),
        *choose(writer, sweep), *(expert(writer, sweep) if experts else []), *columns(sweep, body.ragged_n),
        *body.input.begin, *body.results.early(), *body.input.statistics(), *body.sums(), *spanned, *body.loop(bounds),
        *body.reduced(),
    ]  # fmt: skip
    blocks = f"({sweep.blocks})"
    grid = [blocks, "SPLIT_K", *([writer.size(sweep.rows)] if experts else [])]
    units = f"{blocks} * {writer.size(sweep.rows)}" if experts else blocks
    if split:
        unit = "(block + tl.num_programs(0) * tl.program_id(2))" if experts else "block"
        lines += gather(writer, unit, body.kept())
    lines += [*body.finished(), *body.results.store()]
    counters = f"{units} * (SPLIT_K > 1)" if split else "0"
    scratch = f"{units} * (SPLIT_K > 1) * SPLIT_K * ({sweep.lanes} * BLOCK_N + 1)" if split else "0"
    name = "experts_one_row" if experts else "linear_one_row"
    return writer.kernel(name, lines, configs, grid, scratch, counters)


def expert(writer: Writer, sweep: Sweep) -> list[str]:
    """Moves the weights to those of the expert of ``row``."""
    view = sweep.source.expert
    assert view is not None
    ids = writer.pointer(view.buffer, "expert_of")
    offset = "" if view.offset == 0 else f" + {writer.size(view.offset)}"
    load = f"expert = tl.load({ids}{offset} + row * {writer.size(view.strides[-1])}).to(tl.int64)"
    return [load, *moved(sweep.branches[0].matrices)]


class _Body:
    """The statements of the kernel, in parts."""

    def __init__(self, writer: Writer, sweep: Sweep, row: Row, configs: Sequence[Config]) -> None:
        self.writer, self.sweep = writer, sweep
        self.ragged_n = sweep.ragged(configs, "BLOCK_N")
        self.input = Input(writer, sweep.source, row, sweep.ragged(configs, "BLOCK_K"))
        self.results = Results(writer, sweep, row, Axis("column", "inside" if self.ragged_n else None))
        self.piece = PACKINGS[sweep.matrix.format].piece
        self.integer = sweep.is_integer

    def sums(self) -> list[str]:
        kind = "tl.int32" if self.integer and not self.sweep.matrix.group else "tl.float32"
        lines = [f"y{lane} = tl.zeros((BLOCK_N, BLOCK_K // {self.piece}), {kind})" for lane in range(self.sweep.lanes)]
        for lane in range(self.sweep.lanes):
            lines += rows_of(lane, self.sweep.matrix, "at[:, None]")
        return [*lines, *self.input.squares()]

    def loop(self, bounds: str) -> list[str]:
        matrix = self.sweep.matrix
        lines = [*self.input.columns(), *self.input.block_of()]
        if self.integer:
            lines.append("x_k = x_k.to(tl.int32)")
        lines += [*units(matrix.format, self.sweep.n, self.input.ragged), *self._parted()]
        if matrix.group:
            lines.append(f"piece = start // {self.piece} + tl.arange(0, BLOCK_K // {self.piece})")
            lines.append(f"group = (piece // {matrix.group // self.piece})[None, :]")
        for lane, each in enumerate(self._matrices):
            lines += self._added(lane, each)
        return [f"for start in tl.range({bounds}, BLOCK_K, num_stages=STAGES):", *indented(lines)]

    @property
    def _matrices(self) -> tuple[Matrix, ...]:
        return self.sweep.branches[0].matrices

    @property
    def _shifts(self) -> bool:
        """Whether numbers are as large as they are stored, not plus what is the same for a piece."""
        return bool(PACKINGS[self.sweep.matrix.format].offset) or self.sweep.matrix.zero is not None

    def _parted(self) -> list[str]:
        """x at the columns that lie at the same place of what they are packed in; ``sums`` of the pieces."""
        format, count = self.sweep.matrix.format, f"BLOCK_K // {self.piece}"
        if PACKINGS[format].numbers == 1:
            return []
        if format == "int3":
            names = [f"x{i}" for i in range(8)]
            lines = [f"{', '.join(names)} = {self.writer.function('every_eighth')}(x_k)"]
            return [*lines, f"sums = {' + '.join(names)}"]
        lines = ["even, odd = tl.split(tl.reshape(x_k, (BLOCK_K // 2, 2)))"]
        if self._shifts:
            lines.append(f"sums = tl.sum(tl.reshape(even + odd, ({count}, {self.piece // 2})), 1)")
        if format == "int4" and not self.integer:
            lines.append("odd = odd * 0.0625")  # nibbles are not shifted, so 16 times as large
        return lines

    def _added(self, lane: int, matrix: Matrix) -> list[str]:
        lines, total = self._products(lane, matrix)
        mask = f", mask=(piece < {self.sweep.n // self.piece})[None, :], other=0" if self.input.ragged else ""
        if self._shifts:
            offset = PACKINGS[matrix.format].offset
            found, points = zero_points(lane, matrix, mask, offset) if matrix.zero is not None else ([], str(offset))
            lines, total = [*lines, *found], f"{total} - {points} * sums[None, :]"
        if not matrix.group:
            return [*lines, f"y{lane} += {total}"]
        convert = ".to(tl.float32)" if self.integer else ""
        return [*lines, f"y{lane} += ({total}){convert} * tl.load(scale{lane} + group{mask}).to(tl.float32)"]

    def _products(self, lane: int, matrix: Matrix) -> tuple[list[str], str]:
        """Statements, and the sums of pieces [BLOCK_N, BLOCK_K / PIECE] of the numbers, as they are stored, times x."""
        ragged, kind = self.input.ragged, "tl.int32" if self.integer else "tl.float32"
        if matrix.format == "int3":
            terms = [f"(bits >> {3 * i} & 7).to({kind}) * x{i}[None, :]" for i in range(8)]
            added = [f"p += {term}" for term in terms[1:]]
            return [*packed(lane, matrix.format, ragged), f"p = {terms[0]}", *added], "p"
        if matrix.format in ("int4", "nf4"):
            low, high = "(bits & 15)", "(bits >> 4)" if matrix.format == "nf4" or self.integer else "(bits & 0xF0)"
            if matrix.format == "nf4":
                low, high = (f"{self.writer.function('nf4_level')}({code})" for code in (low, high))
            lines = packed(lane, matrix.format, ragged)
            lines.append(f"p = {low}.to({kind}) * even[None, :] + {high}.to({kind}) * odd[None, :]")
            width = self.piece // 2
        else:
            mask = ", mask=there[None, :], other=0" if ragged else ""
            load = f"tl.load(data{lane} + k[None, :]{mask})"
            w = f"{load}.to(tl.int32)" if self.integer else to_float(self.writer, matrix.format, load)
            lines, width = [f"p = {w} * x_k[None, :]"], self.piece
        return lines, f"tl.sum(tl.reshape(p, (BLOCK_N, BLOCK_K // {self.piece}, {width})), 2)"

    def reduced(self) -> list[str]:
        lines = [f"y{lane} = tl.sum(y{lane}, 1)" for lane in range(self.sweep.lanes)]
        return [*lines, *(["square = tl.sum(squares, 0)"] if self.input.is_late else [])]

    def kept(self) -> list[Sum]:
        """What programs that split the columns pass on."""
        integer = self.integer and not self.sweep.matrix.group
        sums = [Sum(f"y{lane}", "tl.arange(0, BLOCK_N)", "BLOCK_N", integer) for lane in range(self.sweep.lanes)]
        return [*sums, *([Sum("square", "0", "1")] if self.input.is_late else [])]

    def finished(self) -> list[str]:
        """The sums with all factors that were left out of them."""
        lines = self.input.late()
        for lane, matrix in enumerate(self._matrices):
            factors = self.input.factors()
            if matrix.scale is not None and not matrix.group:
                factors = [*factors, f"tl.load(scale{lane} + at).to(tl.float32)"]
            if factors:
                convert = ".to(tl.float32)" if self.integer and not matrix.group else ""
                lines.append(f"y{lane} = y{lane}{convert} * {' * '.join(factors)}")
        return lines


# -- configurations ----------------------------------------------------------------------------------------------------

# Weights in a block of one program: 8 KB, which four programs a processor keep in flight; less where registers end.
_BLOCK = {
    "f32": 2048, "bf16": 4096, "f16": 4096, "int8": 8192, "fp8": 8192, "int4": 8192, "int3": 8192, "nf4": 8192,
}  # fmt: skip


def configurations(sweep: Sweep, target: Target) -> list[Config]:
    """The default has four programs a processor, by fewer columns of results a program, then by splitting."""
    block = _BLOCK[sweep.matrix.format] // sweep.lanes
    rows = 8 // sweep.lanes
    while rows > 2 and sweep.m < rows * 4 * target.processors:
        rows //= 2
    split = 1
    while split < 8 and sweep.m * split < rows * 2 * target.processors:
        split *= 2
    found: list[Config] = []

    def add(rows: int, numbers: int, warps: int, stages: int, split: int) -> None:
        block_k = columns_of(sweep.n, numbers // rows, PACKINGS[sweep.matrix.format].piece)
        split = max(1, min(split, sweep.n // block_k))
        config = dict(BLOCK_N=rows, BLOCK_K=block_k, SPLIT_K=split, STAGES=stages, num_warps=warps)
        if config not in found:
            found.append(config)

    for stages in (3, 1):
        add(rows, block, 4, stages, split)
        add(2 * rows, block, 4, stages, split)
        add(rows, block // 2, 4, stages, split)
        add(rows, 2 * block, 8, stages, split)
        add(rows // 2, block, 4, stages, split)
    add(rows, block // 2, 2, 4, split)
    add(rows, block, 4, 3, 2 * split)
    add(2 * rows, block, 4, 3, 2 * split)
    return found


def columns_of(n: int, most: int, least: int) -> int:
    """Columns of a block: a power of two that divides n, for masks cost, unless that would leave too little."""
    block = max(2 * least, min(power_of_two(n), most))
    even = n & -n
    return even if block // 4 <= even < block and even >= 2 * least else block


__all__ = ["expert", "one_row"]
