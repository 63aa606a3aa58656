"""A linear with several input rows: tiles of results, made by the matrix units."""

from __future__ import annotations

from collections.abc import Sequence

from slim.codegen.regions.products import Matrix
from slim.codegen.triton.kernel import Config, Kernel
from slim.codegen.triton.source import Input
from slim.codegen.triton.sweep import Results, Row, Sum, Sweep, choose, columns, gather, is_split, span
from slim.codegen.triton.text import Axis
from slim.codegen.triton.weights import rows_of, tile, to_float, units, zero_points
from slim.codegen.triton.writer import DTYPES, Target, Writer, indented, power_of_two

FLOATS = {"f32": "tl.float32", "bf16": "tl.bfloat16", "f16": "tl.float16"}
_STORED = {"fp32": "tl.float32", "bf16": "tl.bfloat16", "fp16": "tl.float16", "i8": "tl.int8"}


def operand(sweep: Sweep) -> str:
    """The type of both sides of a product of tiles."""
    if sweep.is_integer and not sweep.matrix.group:
        return "tl.int8"
    stored = _STORED[DTYPES[sweep.like]]
    return "tl.float32" if FLOATS.get(sweep.matrix.format, stored) != stored else stored


def few_rows(sweep: Sweep, target: Target, rows: int) -> Kernel:
    """Up to ``rows`` rows, which one tile holds: each weight is read once, by programs that may share a block."""
    writer = Writer(sweep.region, target)
    configs = few_configurations(sweep, target, rows)
    tile = Tile(writer, sweep, configs)
    tiles = f"triton.cdiv({writer.size(sweep.rows)}, BLOCK_M)"
    head = ["block = tl.program_id(0)", *choose(writer, sweep), *tile.rows("tl.program_id(2)")]
    blocks = f"({sweep.blocks})"
    split, (spanned, bounds) = is_split(configs), span(sweep, configs)
    lines = [*head, *tile.before(), *spanned, *tile.loop(bounds)]
    if split:
        lines += gather(writer, "(block + tl.num_programs(0) * tl.program_id(2))", tile.kept())
    lines += [*tile.finished(), *tile.results.store()]
    units = f"{blocks} * {tiles} * (SPLIT_K > 1)" if split else "0"
    scratch = f"{units} * SPLIT_K * BLOCK_M * ({sweep.lanes} * BLOCK_N + 1)" if split else "0"
    return writer.kernel("linear_few_rows", lines, configs, [blocks, "SPLIT_K", tiles], scratch, units)


def many_rows(sweep: Sweep, target: Target) -> Kernel:
    """Any number of rows. Programs that follow each other share rows and weights, which the cache then holds."""
    writer = Writer(sweep.region, target)
    configs = many_configurations(sweep)
    tile = Tile(writer, sweep, configs)
    rows = writer.size(sweep.rows)
    blocks = sweep.blocks.replace("triton.", "tl.")
    head = [
        f"tiles = tl.cdiv({rows}, BLOCK_M)", f"blocks = {blocks}", "band = tl.program_id(0) // (GROUP_M * blocks)",
        "within = tl.program_id(0) % (GROUP_M * blocks)", "height = tl.minimum(tiles - band * GROUP_M, GROUP_M)",
        "tile = band * GROUP_M + within % height", "block = within // height",
    ]  # fmt: skip
    lines = [*head, *choose(writer, sweep), *tile.rows("tile"), *tile.before(), *tile.loop(f"0, {sweep.n}")]
    lines += [*tile.finished(), *tile.results.store()]
    grid = [f"triton.cdiv({rows}, BLOCK_M) * ({sweep.blocks})"]
    return writer.kernel("linear_tiles", lines, configs, grid)


class Tile:
    """The statements that make one tile, in parts."""

    def __init__(self, writer: Writer, sweep: Sweep, configs: Sequence[Config]) -> None:
        self.writer, self.sweep = writer, sweep
        self.dtype = operand(sweep)
        self.block_k = max(config["BLOCK_K"] for config in configs)
        self.least_k = min(config["BLOCK_K"] for config in configs)
        self.ragged_n = sweep.ragged(configs, "BLOCK_N")
        late = self.dtype != "tl.float16"  # rows that are not normalised yet may be too large for it
        self.input = Input(writer, sweep.source, Row("row", "present"), sweep.ragged(configs, "BLOCK_K"), late)
        column = Axis("column[None, :]", "inside[None, :]" if self.ragged_n else None)
        self.results = Results(writer, sweep, Row("row", "present"), column)

    def rows(self, tile: str) -> list[str]:
        """``row``: the tile's rows, inside x where the tile is not; ``present``: which of them there are."""
        count = self.writer.size(self.sweep.rows)
        return [
            f"row = ({tile} * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]",
            f"present = row < {count}", f"row = tl.minimum(row, {count} - 1).to(tl.int64)",
        ]  # fmt: skip

    def before(self) -> list[str]:
        sweep = self.sweep
        lines = [*columns(sweep, self.ragged_n), *self.input.begin, *self.input.statistics()]
        kind = "tl.int32" if self.dtype == "tl.int8" else "tl.float32"
        lines += [f"y{lane} = tl.zeros((BLOCK_M, BLOCK_N), {kind})" for lane in range(sweep.lanes)]
        for lane in range(sweep.lanes):
            lines += rows_of(lane, sweep.matrix, "at[:, None]")
        return [*lines, *self.input.squares()]

    def loop(self, bounds: str) -> list[str]:
        lines = [*self.input.columns(), *self._x()]
        lines += units(self.sweep.matrix.format, self.sweep.n, self.input.ragged)
        for lane, matrix in enumerate(self.sweep.branches[0].matrices):
            lines += self._added(lane, matrix)
        return [f"for start in range({bounds}, BLOCK_K):", *indented(lines)]

    def _x(self) -> list[str]:
        """``x_k`` as the matrix units take it; as it is stored where nothing is to be done to it."""
        source = self.sweep.source
        stored = DTYPES[source.view.buffer.dtype]
        if source.norm is None and not self.input.rounds:
            same = _STORED.get(stored) == self.dtype
            convert = "" if same else f".to(tl.float32).to({self.dtype})"
            return [f"x_k = {self.input.raw()}{convert}"]
        return [*self.input.block_of(), *([f"x_k = x_k.to({self.dtype})"] if self.dtype != "tl.float32" else [])]

    def _added(self, lane: int, matrix: Matrix) -> list[str]:
        steps = self._steps(lane, matrix) if matrix.group else []
        lines, loaded = tile(self.writer, lane, matrix.format, self.input.ragged)
        return [*steps, *lines, f"w = {self._operand(lane, matrix, loaded)}", self._dot(lane)]

    def _dot(self, lane: int) -> str:
        precision = ', input_precision="ieee"' if self.dtype == "tl.float32" else ""
        kind = ", out_dtype=tl.int32" if self.dtype == "tl.int8" else ""
        return f"y{lane} = tl.dot(x_k, w.T, y{lane}{precision}{kind})"

    def _operand(self, lane: int, matrix: Matrix, loaded: str) -> str:
        """Numbers of the weight as the matrix units take them; scales of rows are left for the sums."""
        if matrix.format in FLOATS:
            return loaded if FLOATS[matrix.format] == self.dtype else f"{loaded}.to({self.dtype})"
        if self.dtype == "tl.int8":
            return loaded
        wide = to_float(self.writer, matrix.format, loaded)  # int8 by way of float32: the interpreter needs it
        if matrix.zero is not None:
            wide = f"({wide} - points{lane})"
        if matrix.group:
            wide = f"({wide} * steps{lane})"
        return wide if self.dtype == "tl.float32" else f"{wide}.to({self.dtype})"

    def _steps(self, lane: int, matrix: Matrix) -> list[str]:
        """``steps`` and ``points``: what the groups of a block have, as wide as what is loaded of it."""
        even = matrix.group & -matrix.group  # the largest power of two that divides it
        if self.block_k <= even:  # the block lies in one group
            lines, loads = _of_group(lane, matrix, "")
            return [f"group = start // {matrix.group}", *lines, *(f"{name} = {load}" for name, load in loads)]
        piece = min(even, self.least_k)
        count = f"BLOCK_K // {piece}"
        lines = [
            f"piece = start // {piece} + tl.arange(0, {count})", f"group = (piece // {matrix.group // piece})[None, :]",
        ]  # fmt: skip
        mask = f", mask=(piece < {matrix.n // piece})[None, :], other=0" if self.input.ragged else ""
        more, loads = _of_group(lane, matrix, mask)
        lines += more
        for name, load in loads:
            wide = f"tl.broadcast_to({load}[:, :, None], (BLOCK_N, {count}, {piece}))"
            lines.append(f"{name} = tl.reshape({wide}, (BLOCK_N, BLOCK_K))")
        return lines

    def kept(self) -> list[Sum]:
        tile = "tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]"
        integer = self.dtype == "tl.int8"
        sums = [Sum(f"y{lane}", tile, "BLOCK_M * BLOCK_N", integer) for lane in range(self.sweep.lanes)]
        return [*sums, *([Sum("square", "tl.arange(0, BLOCK_M)[:, None]", "BLOCK_M")] if self.input.is_late else [])]

    def finished(self) -> list[str]:
        lines = self.input.late()
        for lane, matrix in enumerate(self.sweep.branches[0].matrices):
            factors = self.input.factors()
            if matrix.scale is not None and not matrix.group:
                factors = [*factors, f"tl.load(scale{lane} + at).to(tl.float32)[None, :]"]
            if factors:
                convert = ".to(tl.float32)" if self.dtype == "tl.int8" else ""
                lines.append(f"y{lane} = y{lane}{convert} * {' * '.join(factors)}")
        return lines


def _of_group(lane: int, matrix: Matrix, mask: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Statements, and (name, text) of the scale of ``group`` and of its zero point, in float32."""
    found = [(f"steps{lane}", f"tl.load(scale{lane} + group{mask}).to(tl.float32)")]
    if matrix.zero is None:
        return [], found
    lines, points = zero_points(lane, matrix, mask)
    return lines, [*found, (f"points{lane}", f"{points}.to(tl.float32)")]


# -- configurations ----------------------------------------------------------------------------------------------------


_FEW = ((32, 128, 4, 4), (64, 128, 4, 3), (32, 256, 4, 3), (16, 256, 4, 3), (64, 64, 4, 5), (128, 64, 4, 4),
        (128, 128, 8, 3), (32, 64, 2, 5))  # fmt: skip
_TALL = ((64, 64, 8, 3), (128, 64, 8, 3), (64, 64, 4, 4), (32, 64, 4, 4), (64, 128, 8, 3), (128, 64, 4, 4))


def few_configurations(sweep: Sweep, target: Target, rows: int) -> list[Config]:
    """Short blocks, and columns split until every processor has two programs: what counts is the weights' way in."""
    float32, tall = operand(sweep) == "tl.float32", rows > 64
    width = min(max(32, power_of_two(sweep.n)), _widest(sweep))
    found: list[Config] = []

    def add(block_n: int, block_k: int, warps: int, stages: int, more: int = 1) -> None:
        block_n = max(16, block_n // sweep.lanes)
        block_k = min(width, block_k // 2 if float32 else block_k)
        while block_k > 64 and sweep.n % block_k and not sweep.n % 64:
            block_k //= 2
        programs, split = -(-sweep.m // block_n), 1
        while (
            split < 8 and programs * split < (1 if tall else 2) * target.processors and sweep.n >= 4 * split * block_k
        ):
            split *= 2
        split = max(1, min(split * more, sweep.n // block_k))
        if rows == 64:  # of shared memory some GPUs have 64 KB
            stages = min(stages, 3)
        config = dict(
            BLOCK_M=rows, BLOCK_N=block_n, BLOCK_K=block_k, SPLIT_K=split, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if config not in found:
            found.append(config)

    shapes = _TALL if tall else _FEW
    for shape in shapes:
        add(*shape)
    add(*shapes[0], more=2)
    return found


def many_configurations(sweep: Sweep) -> list[Config]:
    """Large tiles; of two products half as wide, for both have their sums in registers."""
    if operand(sweep) == "tl.float32":  # not the work of matrix units
        shapes = [(64, 64, 32, 4, 3), (128, 64, 32, 8, 3), (32, 64, 32, 4, 3), (64, 32, 32, 4, 4)]
    else:  # 128 bytes of a row
        shapes = [
            (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 4), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4),
            (64, 64, 64, 4, 4), (256, 128, 64, 8, 3), (128, 128, 128, 8, 2),
        ]  # fmt: skip
        if any(branch.part.placed is not None for branch in sweep.branches):  # an address for each result, in registers
            shapes.insert(0, (128, 64, 64, 8, 3))
    found: list[Config] = []
    for block_m, block_n, block_k, warps, stages in shapes:
        if operand(sweep) == "tl.int8":
            block_k *= 2
        block_n = min(block_n // sweep.lanes, max(16, power_of_two(sweep.m)))
        block_k = min(block_k, max(32, power_of_two(sweep.n)), _widest(sweep))
        config = dict(
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=8, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if config not in found:
            found.append(config)
    return found


def _widest(sweep: Sweep) -> int:
    """Columns of a block that one scale serves, where groups are no shorter than a block should be."""
    return max(64, sweep.matrix.group & -sweep.matrix.group) if sweep.matrix.group else 256
