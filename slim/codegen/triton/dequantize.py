"""A copy of a quantised weight in a float type: for so many rows that each number would be widened many times."""

from __future__ import annotations

from slim.codegen.regions.products import Linear, Matrix
from slim.codegen.regions.views import Buffer
from slim.codegen.triton.kernel import Config, Kernel
from slim.codegen.triton.weights import rows_of, tile, to_float, units, zero_points
from slim.codegen.triton.writer import Target, Writer

_CONFIGS: tuple[Config, ...] = (
    dict(BLOCK_N=8, BLOCK_K=512, num_warps=4), dict(BLOCK_N=4, BLOCK_K=1024, num_warps=4),
    dict(BLOCK_N=16, BLOCK_K=256, num_warps=4), dict(BLOCK_N=8, BLOCK_K=1024, num_warps=8),
)  # fmt: skip


def dequantize(region: Linear, matrix: Matrix, out: Buffer, target: Target) -> Kernel:
    """[m, n] of ``matrix`` into ``out``, times its scales."""
    writer = Writer(region, target)
    assert matrix.scale is not None
    lines = [
        f"data0 = {writer.pointer(matrix.data, 'data')}", f"scale0 = {writer.pointer(matrix.scale, 'scale')}",
        *([f"zero0 = {writer.pointer(matrix.zero, 'zero')}"] if matrix.zero is not None else []),
        f"out = {writer.pointer(out, 'wide')}",
        "row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]", f"held = row < {matrix.m}",
        f"row = tl.minimum(row, {matrix.m} - 1)", *rows_of(0, matrix, "row"), "start = tl.program_id(1) * BLOCK_K",
        "k = start + tl.arange(0, BLOCK_K)", f"there = k < {matrix.n}", *units(matrix.format, matrix.n, ragged=True),
    ]  # fmt: skip
    numbers, loaded = tile(writer, 0, matrix.format, ragged=True)
    lines += [*numbers, f"w = {to_float(writer, matrix.format, loaded)}"]
    mask = ", mask=there[None, :], other=0" if matrix.group else ""
    lines.append(f"group = (k // {matrix.group})[None, :]" if matrix.group else "group = row")
    if matrix.zero is not None:
        found, points = zero_points(0, matrix, mask)
        lines += [*found, f"w -= {points}"]
    lines += [
        f"step = tl.load(scale0 + group{mask}).to(tl.float32)",
        f"tl.store(out + row * {matrix.n} + k[None, :], w * step, mask=held & there[None, :])",
    ]
    grid = [f"triton.cdiv({matrix.m}, BLOCK_N)", f"triton.cdiv({matrix.n}, BLOCK_K)"]
    return writer.kernel("dequantize_weight", lines, _CONFIGS, grid)
