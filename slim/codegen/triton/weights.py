"""How the numbers of each weight format come out of memory: tiles of them, their scales, their zero points.

In a kernel's text ``data``, ``scale`` and ``zero``, each with the number of the lane, point to a matrix, its scales and
its zero points: first to their beginnings, then, as columns [BLOCK_N, 1], to the rows of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slim.codegen.regions.products import Matrix
from slim.codegen.triton.writer import Writer


@dataclass(frozen=True)
class Packing:
    """How numbers lie in memory.

    Attributes:
        piece: numbers of a row that are summed before anything else is done to their sum. Of plain numbers those in 16
            bytes, which one thread loads at once.
        numbers, elements: so many numbers lie in so many elements.
        offset: what is stored is a number plus this.
    """

    piece: int
    numbers: int = 1
    elements: int = 1
    offset: int = 0


PACKINGS = {
    "f32": Packing(4), "bf16": Packing(8), "f16": Packing(8), "int8": Packing(16), "fp8": Packing(16),
    "int4": Packing(16, 2, 1, 8), "nf4": Packing(16, 2, 1), "int3": Packing(8, 8, 3, 4),
}  # fmt: skip
QUANTIZED = ("int8", "int4", "int3", "nf4", "fp8")
INTEGERS = ("int8", "int4", "int3", "nf4")  # whose numbers are integers: the levels of NF4 come in steps of 1/127


def width(format: str, numbers: int) -> int:
    """Elements in memory of a row of ``numbers``."""
    packing = PACKINGS[format]
    return numbers // packing.numbers * packing.elements


def groups(matrix: Matrix) -> int:
    """Scales of a row."""
    return matrix.n // matrix.group if matrix.group else 1


def rows_of(lane: int, matrix: Matrix, rows: str) -> list[str]:
    """Moves the pointers of a matrix by ``rows``; scales of whole rows are left for the sums."""
    lines = [f"data{lane} += {rows} * {width(matrix.format, matrix.n)}"]
    if matrix.group:
        lines.append(f"scale{lane} += {rows} * {groups(matrix)}")
    if matrix.zero is not None:
        lines.append(f"zero{lane} += {rows} * {width(matrix.zero_format, groups(matrix))}")
    return lines


def moved(matrices: Sequence[Matrix]) -> list[str]:
    """Moves the pointers of a stack's matrices to those of ``expert``."""
    lines = []
    for lane, matrix in enumerate(matrices):
        lines += rows_of(lane, matrix, f"expert * {matrix.m}")
        if matrix.scale is not None and not matrix.group:
            lines.append(f"scale{lane} += expert * {matrix.m}")
    return lines


def to_float(writer: Writer, format: str, loaded: str) -> str:
    """Numbers in float32 of ``loaded``: as they are stored, and what is packed as ``tile`` leaves it."""
    return f"{writer.function('from_fp8')}({loaded})" if format == "fp8" else f"{loaded}.to(tl.float32)"


# -- tiles -------------------------------------------------------------------------------------------------------------


def units(format: str, n: int, ragged: bool) -> list[str]:
    """Statements for a block of columns from ``start`` on: ``unit``, the numbers of what columns are packed in.

    ``unit`` counts the bytes of int4 and nf4, and of int3 three at once; ``stored`` says which there are. Numbers that
    lie plainly need neither.
    """
    many = PACKINGS[format].numbers
    if many == 1:
        return []
    lines = [f"unit = start // {many} + tl.arange(0, BLOCK_K // {many})"]
    return [*lines, f"stored = unit < {n // many}"] if ragged else lines


def packed(lane: int, format: str, ragged: bool) -> list[str]:
    """``bits``: what lies at ``unit``; 24 of int3, in an int32."""
    mask = ", mask=stored[None, :], other=0" if ragged else ""
    if format != "int3":
        return [f"bits = tl.load(data{lane} + unit[None, :]{mask})"]
    bytes_ = [f"tl.load(data{lane} + 3 * unit[None, :] + {i}{mask}).to(tl.int32)" for i in range(3)]
    return [f"bits = {bytes_[0]}", f"bits |= {bytes_[1]} << 8", f"bits |= {bytes_[2]} << 16"]


def tile(writer: Writer, lane: int, format: str, ragged: bool) -> tuple[list[str], str]:
    """(statements, the numbers [BLOCK_N, BLOCK_K] at the columns ``k``): as they are stored, or int8 of packed ones.

    Packed numbers are joined, not the columns of x parted: x goes to the matrix units as it lies in memory.
    """
    if PACKINGS[format].numbers == 1:
        mask = ", mask=there[None, :], other=0" if ragged else ""
        return [], f"tl.load(data{lane} + k[None, :]{mask})"
    lines = packed(lane, format, ragged)
    if format == "int3":
        joined = writer.function("eight_of")
        return lines, f"(tl.reshape({joined}(bits), (BLOCK_N, BLOCK_K)).to(tl.int8) - 4)"
    nibbles = "tl.reshape(tl.join(bits & 15, bits >> 4), (BLOCK_N, BLOCK_K))"
    if format == "nf4":
        return lines, f"{writer.function('nf4_level')}({nibbles})"
    return lines, f"({nibbles}.to(tl.int8) - 8)"


def zero_points(lane: int, matrix: Matrix, mask: str, plus: int = 0) -> tuple[list[str], str]:
    """(statements, the zero points of the groups ``group`` plus a number, int32); ``mask`` as a load takes it."""
    less = plus - PACKINGS[matrix.zero_format].offset
    more = f" {'-' if less < 0 else '+'} {abs(less)}" if less else ""
    if matrix.zero_format == "int8":
        return [], f"(tl.load(zero{lane} + group{mask}).to(tl.int32){more})"
    if matrix.zero_format == "int4":
        return [], f"((tl.load(zero{lane} + group // 2{mask}).to(tl.int32) >> group % 2 * 4 & 15){more})"
    lines = [  # a number may end in the next of three bytes
        "bit = group % 8 * 3", f"low = tl.load(zero{lane} + group // 8 * 3 + bit // 8{mask}).to(tl.int32)",
        f"high = tl.load(zero{lane} + group // 8 * 3 + tl.minimum(bit // 8 + 1, 2){mask}).to(tl.int32)",
    ]  # fmt: skip
    return lines, f"(((low | high << 8) >> bit % 8 & 7){more})"


__all__ = [
    "INTEGERS", "PACKINGS", "QUANTIZED", "groups", "moved", "packed", "rows_of", "tile", "to_float", "units", "width",
    "zero_points",
]  # fmt: skip
