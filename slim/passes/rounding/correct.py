"""What is kept beside rounded weights: some columns as they were, and a product that undoes much of the error."""

from __future__ import annotations

import torch
from torch import Tensor

from slim.compiler.linalg import leading_directions
from slim.passes.rounding.curvature import Curvature


def outlier_columns(absmax: Tensor, share: float) -> Tensor:
    """The ``share`` of columns, one at least, with the largest inputs: int64, ascending.

    Args:
        absmax: the largest magnitude that each column meets, [n].

    Source: Dettmers et al., LLM.int8(), 2022, which takes the columns that ever meet a magnitude of 6 or more.
    """
    count = min(max(1, round(share * len(absmax))), len(absmax))
    order = torch.argsort(absmax, descending=True, stable=True)
    return order[:count].sort().values


def low_rank_correction(error: Tensor, curvature: Curvature, rank: int) -> tuple[Tensor, Tensor]:
    """(outer [m, r], inner [r, n]), float32: the product of rank r nearest to ``error`` [m, n] for the inputs seen.

    Of all such products ``outer inner`` has the least ``tr((error - outer inner) C (error - outer inner)^T)``: outer
    are the leading directions of the results of the error, inner is the error as seen along them. No inverse is taken.
    Source: Zhang et al., QERA, 2024, whose closed form has the same product.

    A rank beyond the smaller side of the matrix is that side.
    """
    wide = error.double()
    outer = leading_directions(wide, curvature.moments.double(), rank)[1]
    return outer.float(), (outer.T @ wide).float()
