"""Scales and zero points of groups: from their extremes, by a search, or as the best for given numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from slim.passes.rounding.grid import Grid, Scales, spread, stored_scale

SHRINKS = tuple(1.04 - 0.02 * k for k in range(35))  # of the scale that spans a whole group, down to 0.36
_RIDGE = 1e-4  # of the mean diagonal: how firmly a refitted scale holds to the one it replaces


def spanning(groups: Tensor, grid: Grid, kept: torch.dtype, shrink: float = 1.0) -> list[Scales]:
    """The scales that send the extremes of ``groups`` [..., g] to the ends of the grid: every way to do so.

    Symmetric grids with unequal ends (int4, int3) have two: the largest magnitude at the shorter end, or, whatever
    its sign, at the longer one, for which the scale may be negative (as in llama.cpp's Q4_0). So has nf4, whose
    positive levels are not its negative ones.

    Args:
        kept: what scales are stored in. shrink: of the extremes; what lies beyond is clipped.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    if not grid.symmetric:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = stored_scale((high - low) * (shrink / (grid.high - grid.low)), kept)
        zero = (grid.low - low * shrink / scale.float()).round().clamp(grid.low, grid.high)
        return [Scales(scale, zero)]
    extreme = torch.where(high > -low, high, low)
    found = [Scales(stored_scale(extreme.abs() * (shrink / grid.high), kept))]
    if grid.signs_differ:
        found.append(Scales(stored_scale(extreme * (shrink / grid.low), kept)))
    return found


def search(
    weight: Tensor,
    grid: Grid,
    kept: torch.dtype,
    importance: Tensor | None = None,
    shrinks: tuple[float, ...] = SHRINKS,
) -> Scales:
    """The best of many scales for each group of ``weight`` [m, n], by squared error weighted with ``importance`` [n].

    ``shrinks`` of 1 alone is the better of the spanning scales: round to nearest.
    """
    groups = weight.unflatten(-1, (grid.groups(weight.shape[-1]), -1))
    weights = None if importance is None else importance.float().unflatten(-1, (groups.shape[-2], -1))
    best, least = None, torch.empty(0)
    for shrink in shrinks:
        for option in spanning(groups, grid, kept, shrink):
            error = _error(groups, grid, option, weights)
            best, least = (option, error) if best is None else better(best, least, option, error)
    assert best is not None
    return best


def _error(groups: Tensor, grid: Grid, scales: Scales, importance: Tensor | None) -> Tensor:
    scale = scales.scale.float()[..., None]
    zero = None if scales.zero is None else scales.zero[..., None]
    wrong = (groups - grid.nearest(groups / scale, zero) * scale).square_()
    return (wrong if importance is None else wrong * importance).sum(-1)


def better(best: Scales, least: Tensor, option: Scales, error: Tensor) -> tuple[Scales, Tensor]:
    """Group by group, the one of two with the smaller error; the first where they are equal."""
    wins = error < least
    scale = torch.where(wins, option.scale, best.scale)
    if option.zero is None or best.zero is None:
        return Scales(scale), torch.where(wins, error, least)
    return Scales(scale, torch.where(wins, option.zero, best.zero)), torch.where(wins, error, least)


def refit(target: Tensor, gram: Tensor, steps: Tensor, scales: Scales) -> Scales:
    """The scales with which ``steps`` [m, n] come closest to ``target`` under ``gram``, in closed form for each row.

    Row by row, ``(target - steps s) C (target - steps s)^T`` is a quadratic in the k scales s of its groups; its
    minimum solves a system of k equations. A row whose scales, as they are stored, make nothing better keeps the old.
    """
    k = scales.scale.shape[1]
    groups = (k, steps.shape[1] // k)
    mixed = torch.stack(
        [((steps[:, part] @ gram[part]) * steps).unflatten(1, groups).sum(-1) for part in _parts(*groups)], dim=1
    ).double()
    wanted = ((target @ gram) * steps).unflatten(1, groups).sum(-1).double()
    firm = _RIDGE * mixed.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    mixed.diagonal(dim1=1, dim2=2).add_(firm)
    best = torch.linalg.solve(mixed, wanted + firm * scales.scale.double())
    new = Scales(stored_scale(best.float(), scales.scale.dtype), scales.zero)
    wins = layer_loss(target, gram, steps, new) < layer_loss(target, gram, steps, scales)
    return Scales(torch.where(wins[:, None], new.scale, scales.scale), scales.zero)


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count * size, size)]


def layer_loss(target: Tensor, gram: Tensor, steps: Tensor, scales: Scales) -> Tensor:
    """``E C E^T`` of each row [m], where E is how far ``steps`` times the scales are from ``target``."""
    wrong = target - steps * spread(scales.scale, target.shape[1])
    return ((wrong @ gram) * wrong).sum(-1)
