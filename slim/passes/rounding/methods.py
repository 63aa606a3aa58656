"""Rounds one weight, or a stack of them, by a method of the user's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from slim import errors
from slim.compiler.blocks import row_blocks
from slim.passes.rounding.awq import clipped
from slim.passes.rounding.curvature import Curvature
from slim.passes.rounding.gptq import descend, gptq
from slim.passes.rounding.grid import Grid, Rounded, Scales, spread
from slim.passes.rounding.hqq import hqq
from slim.passes.rounding.scales import refit, search

Method = Literal["rtn", "hqq", "gptq", "awq", "best", "search"]
Result = tuple[Tensor, Scales]  # steps [m, n] and what they are multiplied with

with_data: frozenset[Method] = frozenset({"gptq", "awq", "best"})

_NUMBERS_AT_ONCE = 1 << 22  # of a weight whose columns are rounded one by one: 16 MB, and some times that to work in
_ROUNDS, _SWEEPS = 3, 3


def default_method(grid: Grid, data: bool) -> Method:
    """What ``method=None`` means: see docs/quantize.md for what was measured."""
    if grid.format in ("int8", "fp8"):  # what they lose is noise
        return "rtn"
    return "best" if data else "search"


def round_weight(weight: Tensor, grid: Grid, method: Method, curvature: Curvature | None = None) -> Rounded:
    """``weight`` [m, n] or [E, m, n] in the numbers of ``grid``; rows of a large one are taken a few at a time.

    Args:
        method: "rtn": scales that span each group, numbers to nearest. "search": the scales with the least squared
            error, weighted by the inputs if they are known. "hqq": scales fitted to the weights. "awq":
            clipping judged by the inputs (``awq_factors`` is its other half). "gptq": numbers that make up for each
            other's errors. "best": scales found for the inputs, gptq, then descent of numbers and refit of scales.
        curvature: of the rows that meet the weight; it is needed by the last three. All experts share one.

    Raises:
        BadInput: a group that does not divide the rows, a weight that is not finite, a curvature of another width, or
            none where the method needs it.

    Example:
        >>> rounded = round_weight(weight, Grid("int4", 32), "best", Curvature(statistics.gram, statistics.cross))
        >>> rounded.packed().numbers.dtype
        torch.uint8
    """
    width = weight.shape[-1]
    k = grid.groups(width)
    if method in with_data and curvature is None:
        raise errors.BadInput(argument="curvature", reason=f"{method} rounds by statistics of what meets the weight")
    if curvature is not None and curvature.width != width:
        reason = f"it is of {curvature.width} channels, and the weight has {width}"
        raise errors.BadInput(argument="curvature", reason=reason)
    kept = grid.scale_type(_largest(weight))
    rows = weight.reshape(-1, width)
    numbers = torch.empty(rows.shape, dtype=grid.number_type, device=weight.device)
    scale = torch.empty(len(rows), k, dtype=kept, device=weight.device)
    zero = None if grid.symmetric else torch.empty(len(rows), k, dtype=torch.int8, device=weight.device)
    for block in _blocks(rows.shape, method):
        wide = rows[block].to(torch.float32, copy=True)
        steps, scales = _METHODS[method](wide, grid, kept, curvature)
        scale[block] = scales.scale
        numbers[block] = grid.numbers(steps, None if scales.zero is None else spread(scales.zero, width))
        if zero is not None and scales.zero is not None:
            zero[block] = scales.zero.to(torch.int8)
    shape = (*weight.shape[:-1], k) if grid.group_size else weight.shape[:-1]
    return Rounded(grid, numbers.view(weight.shape), scale.view(shape), None if zero is None else zero.view(shape))


def _largest(weight: Tensor) -> float:
    """The largest magnitude. Raises BadInput where that is NaN or infinite."""
    largest = float(max(-weight.min(), weight.max())) if weight.numel() else 0.0
    if not largest < float("inf"):
        raise errors.BadInput(argument="weight", reason="it holds NaN or infinity, and no scale reaches that")
    return largest


def _blocks(shape: torch.Size, method: Method) -> list[slice]:
    """Rows to work on together: many where each of their columns costs a few calls."""
    if method not in ("gptq", "best"):
        return list(row_blocks(shape))
    step = max(1, _NUMBERS_AT_ONCE // max(shape[1], 1))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def _nearest(weight: Tensor, grid: Grid, scales: Scales) -> Result:
    width = weight.shape[1]
    zero = None if scales.zero is None else spread(scales.zero, width)
    return grid.nearest(weight.div_(spread(scales.scale, width)), zero), scales


def _rtn(weight: Tensor, grid: Grid, kept: torch.dtype, curvature: Curvature | None) -> Result:
    return _nearest(weight, grid, search(weight, grid, kept, shrinks=(1.0,)))


def _hqq(weight: Tensor, grid: Grid, kept: torch.dtype, curvature: Curvature | None) -> Result:
    return _nearest(weight, grid, hqq(weight, grid, search(weight, grid, kept, shrinks=(1.0,))))


def _search(weight: Tensor, grid: Grid, kept: torch.dtype, curvature: Curvature | None) -> Result:
    importance = None if curvature is None else curvature.moments.diagonal()
    return _nearest(weight, grid, search(weight, grid, kept, importance))


def _awq(weight: Tensor, grid: Grid, kept: torch.dtype, curvature: Curvature | None) -> Result:
    assert curvature is not None
    return _nearest(weight, grid, clipped(weight, grid, kept, curvature))


def _gptq(weight: Tensor, grid: Grid, kept: torch.dtype, curvature: Curvature | None) -> Result:
    assert curvature is not None
    scales = search(weight, grid, kept, shrinks=(1.0,))
    return gptq(weight, curvature, grid, scales), scales


def _best(weight: Tensor, grid: Grid, kept: torch.dtype, curvature: Curvature | None) -> Result:
    assert curvature is not None
    target = curvature.target(weight)
    scales = search(target, grid, kept, curvature.moments.diagonal())
    steps = gptq(target, curvature, grid, scales)
    for _ in range(_ROUNDS):
        steps = descend(target, curvature, grid, scales, steps, _SWEEPS)
        scales = refit(target, curvature.moments, steps, scales)
    return steps, scales


_METHODS: dict[Method, Callable[[Tensor, Grid, torch.dtype, Curvature | None], Result]] = {
    "rtn": _rtn,
    "hqq": _hqq,
    "awq": _awq,
    "gptq": _gptq,
    "best": _best,
    "search": _search,
}
