"""What reads the units that are left, fitted to what the linear returned in the model as it was.

Where the statistics tell what the residual stream has lost, that is fitted too: the sum is to be what it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slim.compiler.statistics.paired import Paired


@dataclass(frozen=True)
class Fitted:
    """A weight [m, k] over the features that are kept, and the bias; None where there is none.

    Attributes:
        missing: the share of the old result's energy that it does not reproduce.
    """

    weight: Tensor
    bias: Tensor | None
    missing: float


def refit(weight: Tensor, bias: Tensor | None, paired: Paired, kept: Tensor) -> Fitted:
    """Least squares over the calibration tokens: W' = W E[x_dense x_K^T] E[x_K x_K^T]^-1, b' = b + W mu - W' mu_K.

    Args:
        weight: the weight over all features, [m, n], in the model as it was. kept: int64, the features left.
    """
    old, left = wanted(weight, len(paired.dense)), paired.only(kept)
    fitted = left.fit(old, weight[:, kept].double())
    shift = None if bias is None else bias.double() + left.shift(old, fitted)
    return Fitted(fitted, shift, left.missing(old, fitted))


def wanted(weight: Tensor, features: int) -> Tensor:
    """float64 [m, features]: what makes the result that is fitted of x_dense: the weight, and what was lost beside."""
    further = features - weight.shape[-1]
    return torch.cat([weight.double(), torch.eye(len(weight), further).double()], -1)


def masked(fitted: Tensor, kept: Tensor, like: Tensor) -> Tensor:
    """A weight of the shape and type of ``like``: ``fitted`` in the columns ``kept``, zeros in the others."""
    full = torch.zeros(like.shape, dtype=like.dtype).reshape(-1, like.shape[-1])
    full[:, kept] = fitted.to(like.dtype)
    return full.reshape(like.shape)
