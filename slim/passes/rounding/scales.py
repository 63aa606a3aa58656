"""Scales and zero points of groups: from their extremes, or by a search for the least error."""

from __future__ import annotations

import torch
from torch import Tensor

from slim.passes.rounding.grid import Grid, Scales, stored_scale

SHRINKS = tuple(1.04 - 0.02 * k for k in range(35))  # of the scale that spans a whole group


def spanning(groups: Tensor, grid: Grid, kept: torch.dtype, shrink: float = 1.0) -> list[Scales]:
    """The scales that send the extremes of ``groups`` [..., g] to the ends of the grid: every way to do so.

    Symmetric grids with unequal ends (int4, int3) have two: the largest magnitude at the shorter end, or, whatever
    its sign, at the longer one, for which the scale may be negative (as in llama.cpp's Q4_0).
    """
    low, high = groups.amin(-1), groups.amax(-1)
    if not grid.symmetric:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = stored_scale((high - low) * (shrink / (grid.high - grid.low)), kept)
        zero = (grid.low - low * shrink / scale.float()).round().clamp(grid.low, grid.high)
        return [Scales(scale, zero)]
    extreme = torch.where(high > -low, high, low)
    ends = [grid.high] if grid.low == -grid.high else [grid.high, -grid.low]
    found = [Scales(stored_scale(extreme.abs() * (shrink / ends[0]), kept))]
    if grid.signs_differ:
        found.append(Scales(stored_scale(extreme * (shrink / -max(ends)), kept)))
    return found


def search(
    weight: Tensor,
    grid: Grid,
    kept: torch.dtype,
    importance: Tensor | None = None,
    shrinks: tuple[float, ...] = SHRINKS,
) -> Scales:
    """The best of many scales for each group of ``weight`` [m, n], by squared error weighted with ``importance`` [n]."""
    groups = weight.unflatten(-1, (grid.groups(weight.shape[-1]), -1))
    weights = None if importance is None else importance.float().unflatten(-1, (groups.shape[-2], -1))
    best: Scales | None = None
    least = torch.empty(0)
    for shrink in shrinks:
        for option in spanning(groups, grid, kept, shrink):
            error = _error(groups, grid, option, weights)
            if best is None:
                best, least = option, error
                continue
            better = error < least
            least = torch.where(better, error, least)
            zero = None if option.zero is None or best.zero is None else torch.where(better, option.zero, best.zero)
            best = Scales(torch.where(better, option.scale, best.scale), zero)
    assert best is not None
    return best


def _error(groups: Tensor, grid: Grid, scales: Scales, importance: Tensor | None) -> Tensor:
    scale = scales.scale.float()[..., None]
    zero = None if scales.zero is None else scales.zero[..., None]
    wrong = (groups - grid.nearest(groups / scale, zero) * scale).square_()
    return (wrong if importance is None else wrong * importance).sum(-1)
