"""What reads the units that are left, fitted to what the linear returned in the model as it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slim.compiler.statistics import SiteStatistics
from slim.passes.pruning.obs import DAMPING


@dataclass(frozen=True)
class Fitted:
    """A weight [m, k] over the features that are kept, and the bias; None where there is none.

    Attributes:
        missing: the share of the old result's energy that it does not reproduce.
    """

    weight: Tensor
    bias: Tensor | None
    missing: float


@dataclass(frozen=True)
class Moments:
    """Second moments of what enters a linear now, and of what it entered with before anything was changed.

    Where the linear has a bias they are centred: the bias takes up the means.
    """

    now: Tensor
    cross: Tensor
    dense: Tensor
    mean: Tensor
    dense_mean: Tensor
    centred: bool

    @classmethod
    def of(cls, statistics: SiteStatistics, centred: bool) -> Moments:
        """Where the statistics are those of the model as it was, now is before."""
        assert statistics.gram is not None
        now, mean = statistics.gram.double(), statistics.mean.double()
        cross, dense, dense_mean = (
            before if held is None else held.double()
            for held, before in (
                (statistics.cross, now), (statistics.dense_gram, now), (statistics.dense_mean, mean),
            )
        )  # fmt: skip
        if centred:
            now = now - mean[:, None] * mean
            cross = cross - dense_mean[:, None] * mean
            dense = dense - dense_mean[:, None] * dense_mean
        return cls((now + now.T) / 2, cross, dense, mean, dense_mean, centred)

    def aim(self, weight: Tensor) -> Tensor:
        """The weight [m, n] that does best on what enters now what ``weight`` did on what entered before."""
        return _solved(weight.double() @ self.cross, self.now, weight.double())


def refit(weight: Tensor, bias: Tensor | None, moments: Moments, kept: Tensor) -> Fitted:
    """Least squares over the calibration tokens: W' = W E[x_dense x_K^T] E[x_K x_K^T]^-1, b' = b + W mu - W' mu_K.

    Args:
        weight: the weight over all features, [m, n], in the model as it was. kept: int64, the features left.
    """
    old = weight.double()
    now, cross = moments.now[kept][:, kept], moments.cross[:, kept]
    fitted = _solved(old @ cross, now, old[:, kept])
    shift = None
    if bias is not None:
        shift = bias.double() + old @ moments.dense_mean - fitted @ moments.mean[kept]
    energy = float(((old @ moments.dense) * old).sum())
    missing = energy - 2 * float(((old @ cross) * fitted).sum()) + float(((fitted @ now) * fitted).sum())
    return Fitted(fitted, shift, max(missing, 0.0) / energy if energy > 0.0 else 0.0)


def _solved(target: Tensor, moments: Tensor, start: Tensor) -> Tensor:
    """X with X (moments + damping) = target + damping start."""
    damping = DAMPING * float(moments.diagonal().mean())
    damped = moments + damping * torch.eye(len(moments), dtype=moments.dtype)
    return torch.cholesky_solve((target + damping * start).T, torch.linalg.cholesky(damped)).T


def masked(fitted: Tensor, kept: Tensor, like: Tensor) -> Tensor:
    """A weight of the shape and type of ``like``: ``fitted`` in the columns ``kept``, zeros in the others."""
    full = torch.zeros(like.shape, dtype=like.dtype).reshape(-1, like.shape[-1])
    full[:, kept] = fitted.to(like.dtype)
    return full.reshape(like.shape)
