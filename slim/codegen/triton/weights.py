"""How the numbers of each weight format come out of memory."""

from __future__ import annotations

from slim.codegen.regions.schedule import Matrix
from slim.codegen.triton.writer import Writer

# Numbers of a row that lie in 16 bytes, which one thread loads at once; of int4 in 8, for its registers' sake.
PIECES = {"f32": 4, "bf16": 8, "f16": 8, "int8": 16, "fp8": 16, "int4": 16}


def piece_of(matrix: Matrix) -> int:
    """Numbers of a row that are summed before anything else is done to their sum."""
    return PIECES[matrix.format]


def to_float(writer: Writer, format: str, loaded: str) -> str:
    """Numbers as stored, in float32; int4 comes as two numbers a byte and has no such text."""
    return f"{writer.function('from_fp8')}({loaded})" if format == "fp8" else f"{loaded}.to(tl.float32)"


__all__ = ["PIECES", "piece_of", "to_float"]
