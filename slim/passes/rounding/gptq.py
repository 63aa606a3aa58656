"""Rounding in which what is known of the data makes up for errors: column after column, and again until none helps."""

from __future__ import annotations

import torch
from torch import Tensor

from slim.passes.rounding.curvature import Curvature
from slim.passes.rounding.grid import Grid, Scales, spread

_COLUMNS = 128  # at once; what they do to all later ones is one product of matrices


def gptq(target: Tensor, curvature: Curvature, grid: Grid, scales: Scales) -> Tensor:
    """Steps [m, n] for ``target`` [m, n]: each column is rounded, and later ones move to make up for its error.

    Columns that see the largest inputs go first; the scales of all groups are known before (static groups), so that
    the order is not stored. Source: Frantar et al., GPTQ, 2022, and its code (act-order, static groups).
    """
    order, spending = curvature.order, curvature.spending
    left = target[:, order]
    scale, zero = _by_column(scales, order, target.shape[1])
    steps = torch.empty_like(left)
    for start in range(0, len(order), _COLUMNS):
        block = slice(start, min(start + _COLUMNS, len(order)))
        spent = torch.empty_like(left[:, block])
        for i, j in enumerate(range(block.start, block.stop)):
            steps[:, j] = grid.nearest(left[:, j] / scale[:, j], None if zero is None else zero[:, j])
            spent[:, i] = (left[:, j] - steps[:, j] * scale[:, j]) / spending[j, j]
            left[:, j + 1 : block.stop].addr_(spent[:, i], spending[j, j + 1 : block.stop], alpha=-1)
        left[:, block.stop :] -= spent @ spending[block, block.stop :]
    return torch.empty_like(steps).index_copy_(1, order, steps)


def descend(target: Tensor, curvature: Curvature, grid: Grid, scales: Scales, steps: Tensor, sweeps: int) -> Tensor:
    """``steps`` after coordinate descent on ``(target - steps s) C (target - steps s)^T``, which never grows.

    One column after the other goes to the number that is best with all others as they are. At most ``sweeps`` times,
    or until nothing moves. Source: Behdin et al., QuantEase, 2023.
    """
    gram = curvature.moments
    order = curvature.order[gram.diagonal()[curvature.order] > 0]  # a column never seen stays as it is
    scale, zero = _by_column(scales, order, target.shape[1])
    found = steps[:, order]
    slope = ((target - steps * spread(scales.scale, target.shape[1])) @ gram)[:, order]
    gram = gram[order][:, order]
    for _ in range(sweeps):
        moved_at_all = False
        for start in range(0, len(order), _COLUMNS):
            block = slice(start, min(start + _COLUMNS, len(order)))
            inside, near = slope[:, block].clone(), gram[block, block]
            moved = torch.empty_like(inside)
            for i, j in enumerate(range(block.start, block.stop)):
                want = found[:, j] + inside[:, i] / (near[i, i] * scale[:, j])
                new = grid.nearest(want, None if zero is None else zero[:, j])
                moved[:, i] = (new - found[:, j]) * scale[:, j]
                found[:, j] = new
                inside.addr_(moved[:, i], near[i], alpha=-1)
            slope -= moved @ gram[block]
            moved_at_all |= bool(moved.any())
        if not moved_at_all:
            break
    return steps.index_copy(1, order, found)


def _by_column(scales: Scales, order: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of every number, columns in ``order``."""
    zero = None if scales.zero is None else spread(scales.zero, width)[:, order]
    return spread(scales.scale, width)[:, order], zero
