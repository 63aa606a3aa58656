"""Scales fitted to the weights alone, so that most numbers are met well and a few are let go."""

from __future__ import annotations

import torch
from torch import Tensor

from slim.passes.rounding.grid import Grid, Scales, stored_scale
from slim.passes.rounding.scales import better

_ROUNDS = 20
_POWER = 0.7  # of the error's norm; below one, outliers cost little
_BETA, _GROWTH = 10.0, 1.01


def hqq(weight: Tensor, grid: Grid, scales: Scales) -> Scales:
    """``scales`` [m, k] after half-quadratic fitting to ``weight`` [m, n]: no group's ``sum |error|^0.7`` grows.

    Each round splits what rounding leaves into what is let go, by a shrinkage that keeps large errors, and the rest,
    for which zero point and scale have a closed form. Source: Badri and Shaji, Half-Quadratic Quantization, 2023,
    which moves the zero point alone, and keeps it as a fraction; here it is an integer, and the scale moves too.
    """
    groups = weight.unflatten(-1, (scales.scale.shape[-1], -1))
    size = groups.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    groups = groups / size  # the shrinkage has a length of its own
    scale, zero, kept = scales.scale.float() / size[..., 0], scales.zero, scales.scale.dtype
    best, beta = scales, _BETA
    steps = _steps(groups, grid, scale, zero)
    least = _cost(groups - steps * scale[..., None])
    for _ in range(_ROUNDS):
        wanted = groups - _shrunk(groups - steps * scale[..., None], beta)
        if zero is not None:
            numbers = steps + zero[..., None]
            zero = (numbers - wanted / scale[..., None]).mean(-1).round().clamp(grid.low, grid.high)
            steps = numbers - zero[..., None]
        used = steps.square().sum(-1)
        scale = torch.where(used > 0, (steps * wanted).sum(-1) / used.clamp_min(1), scale)
        option = Scales(stored_scale(scale * size[..., 0], kept), zero)
        scale = option.scale.float() / size[..., 0]
        steps = _steps(groups, grid, scale, zero)
        cost = _cost(groups - steps * scale[..., None])
        best, least = better(best, least, option, cost)
        beta *= _GROWTH
    return best


def _steps(groups: Tensor, grid: Grid, scale: Tensor, zero: Tensor | None) -> Tensor:
    return grid.nearest(groups / scale[..., None], None if zero is None else zero[..., None])


def _cost(wrong: Tensor) -> Tensor:
    return wrong.abs().pow_(_POWER).sum(-1)


def _shrunk(wrong: Tensor, beta: float) -> Tensor:
    """The part of each error that is let go: all but ``|error|^(p - 1) / beta`` of it."""
    size = wrong.abs()
    return wrong.sign() * (size - size.clamp_min(1e-8).pow(_POWER - 1) / beta).clamp_min_(0)
