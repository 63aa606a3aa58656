"""A copy of a quantised weight in a float type: for so many rows that each number would be widened many times."""

from __future__ import annotations

from slim.codegen.regions.schedule import Linear, Matrix
from slim.codegen.regions.views import Buffer
from slim.codegen.triton.kernel import Config, Kernel
from slim.codegen.triton.weights import to_float
from slim.codegen.triton.writer import Target, Writer

_CONFIGS: tuple[Config, ...] = (
    dict(BLOCK_N=8, BLOCK_K=512, num_warps=4), dict(BLOCK_N=4, BLOCK_K=1024, num_warps=4),
    dict(BLOCK_N=16, BLOCK_K=256, num_warps=4), dict(BLOCK_N=8, BLOCK_K=1024, num_warps=8),
)  # fmt: skip


def dequantize(region: Linear, matrix: Matrix, out: Buffer, target: Target) -> Kernel:
    """[m, n] of ``matrix`` into ``out``, times its scales."""
    writer = Writer(region, target)
    data, wide = writer.pointer(matrix.data, "data"), writer.pointer(out, "out")
    assert matrix.scale is not None
    scale = writer.pointer(matrix.scale, "scale")
    lines = [
        "row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]",
        "first = tl.program_id(1) * BLOCK_K",
        "k = (first + tl.arange(0, BLOCK_K))[None, :]",
        f"inside = (row < {matrix.m}) & (k < {matrix.n})",
    ]
    if matrix.format == "int4":
        lines += [
            "byte = (first // 2 + tl.arange(0, BLOCK_K // 2))[None, :]",
            f"stored = (row < {matrix.m}) & (byte < {matrix.n // 2})",
            f"bytes = tl.load({data} + row * {matrix.n // 2} + byte, mask=stored, other=0)",
            "both = tl.join(bytes & 15, bytes >> 4)",
            "w = tl.reshape(both, (BLOCK_N, BLOCK_K)).to(tl.float32) - 8.0",
        ]
    else:
        load = f"tl.load({data} + row * {matrix.n} + k, mask=inside, other=0)"
        lines.append(f"w = {to_float(writer, matrix.format, load)}")
    groups = f"row * {matrix.n // matrix.group} + k // {matrix.group}" if matrix.group else "row"
    mask = "inside" if matrix.group else f"row < {matrix.m}"
    lines += [
        f"step = tl.load({scale} + {groups}, mask={mask}, other=0).to(tl.float32)",
        f"tl.store({wide} + row * {matrix.n} + k, w * step, mask=inside)",
    ]
    grid = [f"triton.cdiv({matrix.m}, BLOCK_N)", f"triton.cdiv({matrix.n}, BLOCK_K)"]
    return writer.kernel("dequantize_weight", lines, _CONFIGS, grid)
