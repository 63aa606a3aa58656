"""Finer columns where inputs are large: a factor for each channel of a site, and clipping that its inputs judge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slim.compiler.blocks import row_blocks
from slim.passes.rounding.curvature import Curvature
from slim.passes.rounding.grid import Grid, Scales, spread
from slim.passes.rounding.scales import better, search, spanning

_EXPONENTS = tuple(k / 20 for k in range(20))
_CLIPS = tuple(1 - k / 20 for k in range(10))


def awq_factors(weights: Sequence[Tensor], grid: Grid, curvature: Curvature, absmean: Tensor) -> Tensor:
    """s [n] for a site: its weights should become ``W diag(s)``, and what enters it ``x / s``.

    ``s = absmean^a``, with the a of 0, 0.05, ... 0.95 for which rounding to nearest loses least in the site's results;
    all ones where none is better than rounding as it is. The caller moves 1 / s into what makes x.

    Args:
        weights: all that read the site, each [m, n]. absmean: E|x_j|, [n].

    Source: Lin et al., AWQ, 2023.
    """
    best = torch.ones_like(absmean)
    least = _loss(weights, grid, curvature, best)
    seen = absmean.clamp_min(float(absmean.max()) * 1e-4 or 1.0)
    for exponent in _EXPONENTS[1:]:
        powers = seen.pow(exponent)
        factors = powers / (powers.max() * powers.min()).sqrt()
        loss = _loss(weights, grid, curvature, factors)
        if loss < least:
            best, least = factors, loss
    return best


def _loss(weights: Sequence[Tensor], grid: Grid, curvature: Curvature, factors: Tensor) -> float:
    total = 0.0
    for weight in weights:
        for block in row_blocks(weight.shape):
            rows = weight[block].float()
            scaled = rows * factors
            scales = search(scaled, grid, torch.float32, shrinks=(1.0,))
            wrong = rows - _restored(scaled, grid, scales) / factors
            total += float(((wrong @ curvature.moments) * wrong).sum(dtype=torch.float64))
    return total


def _restored(weight: Tensor, grid: Grid, scales: Scales) -> Tensor:
    width = weight.shape[1]
    scale = spread(scales.scale, width)
    zero = None if scales.zero is None else spread(scales.zero, width)
    return grid.nearest(weight / scale, zero) * scale


def clipped(weight: Tensor, grid: Grid, kept: torch.dtype, curvature: Curvature) -> Scales:
    """The clipping of each group of ``weight`` [m, n], at 1, 0.95, ... 0.55 of its extremes, that inputs mind least.

    The error of a group is judged by the second moments of the inputs it meets. Source: Lin et al., AWQ, 2023.
    """
    k = grid.groups(weight.shape[1])
    groups = weight.unflatten(-1, (k, -1))
    size = groups.shape[-1]
    moments = torch.stack([curvature.moments[i : i + size, i : i + size] for i in range(0, k * size, size)])
    best, least = None, torch.empty(0)
    for clip in _CLIPS:
        for option in spanning(groups, grid, kept, clip):
            wrong = (weight - _restored(weight, grid, option)).unflatten(-1, (k, -1))
            error = (torch.einsum("mkg,kgh->mkh", wrong, moments) * wrong).sum(-1)
            best, least = (option, error) if best is None else better(best, least, option, error)
    assert best is not None
    return best
