"""Work on a matrix a few rows at a time, so that no float32 copy of a large weight is ever made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_ELEMENTS = 1 << 18  # 1 MB of float32: a block stays in a core's cache from one step to the next


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the first dimension, each of a quarter million elements at most (and of one row at least)."""
    rows, width = shape[0], 1
    for size in shape[1:]:
        width *= size
    step = max(1, _ELEMENTS // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
