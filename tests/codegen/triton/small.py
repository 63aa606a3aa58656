"""Kernels of a few lines, for tests of what is done with a kernel's text."""

from slim.codegen.regions.views import Size
from slim.codegen.triton.kernel import Kernel, Pointer


def add(**changed: object) -> Kernel:
    """out = x + y, of n numbers."""
    given = {
        "name": "add",
        "title": ["out = x + y"],
        "body": [
            "i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)",
            "total = tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n)",
            "tl.store(out + i, total, mask=i < n)",
        ],
        "pointers": [Pointer(name, "fp32", "scratch") for name in ("x", "y", "out")],
        "sizes": {"n": 1000},
        "configs": [dict(BLOCK=256, num_warps=4), dict(BLOCK=512, num_warps=4), dict(BLOCK=1024, num_warps=8)],
        "grid": ["triton.cdiv(n, BLOCK)"],
    }
    return Kernel(**{**given, **changed})  # type: ignore[arg-type]


def row_sum(cols: Size = 4096) -> Kernel:
    """out = x.sum(1), with a row's stride that may be known to be a multiple of 16."""
    return Kernel(
        name="row_sum",
        title=["out = x.sum(1)"],
        body=[
            "row = tl.program_id(0)",
            "total = tl.zeros((BLOCK,), tl.float32)",
            "for start in range(0, cols, BLOCK):",
            "    i = start + tl.arange(0, BLOCK)",
            "    total += tl.load(x + row * cols + i, mask=i < cols, other=0.0).to(tl.float32)",
            "tl.store(out + row, tl.sum(total, axis=0))",
        ],
        pointers=[Pointer("x", "bf16", "scratch"), Pointer("out", "fp32", "scratch")],
        sizes={"cols": cols},
        configs=[dict(BLOCK=1024, num_warps=4)],
        grid=["1"],
    )


def spilling(warps: int = 1) -> Kernel:
    """An accumulator of 64 x 256 float32, which no single warp has registers for."""
    return Kernel(
        name="spilling",
        title=["out = x @ y"],
        body=[
            "m, n, k = tl.arange(0, 64), tl.arange(0, 256), tl.arange(0, 32)",
            "total = tl.zeros((64, 256), tl.float32)",
            "for start in range(0, size, 32):",
            "    a = tl.load(x + m[:, None] * size + (start + k)[None, :])",
            "    b = tl.load(y + (start + k)[:, None] * 256 + n[None, :])",
            "    total = tl.dot(a, b, total)",
            "tl.store(out + m[:, None] * 256 + n[None, :], total)",
        ],
        pointers=[Pointer("x", "bf16", "scratch"), Pointer("y", "bf16", "scratch"), Pointer("out", "fp32", "scratch")],
        sizes={"size": 4096},
        configs=[dict(num_warps=warps, num_stages=2)],
        grid=["1"],
    )
