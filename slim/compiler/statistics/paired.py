"""The rows of a site in two models, and what a linear must be over the one to do what another did over the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slim.compiler.statistics.accumulate import SiteStatistics

DAMPING = 0.01  # of the mean diagonal of the Gram matrix


@dataclass(frozen=True, eq=False)
class Paired:
    """Second moments of rows x as they are and x_dense as they were, float64, [n, n], and their means, [n].

    Attributes:
        gram: of x with x. cross: of x_dense with x. dense: of x_dense with x_dense. All less the means where centred.
            x_dense may have further features behind those of x: what a walk found lost beside the site.
    """

    gram: Tensor
    cross: Tensor
    dense: Tensor
    mean: Tensor
    dense_mean: Tensor

    @classmethod
    def of(cls, statistics: SiteStatistics, *, centred: bool) -> Paired:
        """``centred`` is for linears with a bias, which takes up the means. Of a model as it was, now is before."""
        assert statistics.gram is not None
        gram, mean = statistics.gram.double(), statistics.mean.double()
        cross, dense = (gram if held is None else held.double() for held in (statistics.cross, statistics.dense_gram))
        dense_mean = mean if statistics.dense_mean is None else statistics.dense_mean.double()
        if not centred:
            return cls(gram, cross, dense, mean, dense_mean)
        gram, cross = gram - mean[:, None] * mean, cross - dense_mean[:, None] * mean
        return cls(gram, cross, dense - dense_mean[:, None] * dense_mean, mean, dense_mean)

    def only(self, kept: Tensor) -> Paired:
        """Where of x the features ``kept``, int64, are left; x_dense has all of them."""
        return Paired(self.gram[kept][:, kept], self.cross[:, kept], self.dense, self.mean[kept], self.dense_mean)

    def fit(self, old: Tensor, start: Tensor) -> Tensor:
        """The weight [m, n] that does to x what ``old`` did to x_dense: least squares, damped towards ``start``."""
        damping = DAMPING * self.gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        damped = self.gram + damping * torch.eye(len(self.gram), dtype=self.gram.dtype)
        return torch.linalg.solve(damped, old @ self.cross + damping * start, left=False)

    def shift(self, old: Tensor, new: Tensor) -> Tensor:
        """What a bias takes up where ``new`` over x stands for ``old`` over x_dense: the difference of means, [m]."""
        return old @ self.dense_mean - new @ self.mean

    def missing(self, old: Tensor, new: Tensor) -> float:
        """The share of the energy of ``old`` x_dense that ``new`` x does not reproduce."""
        energy = float(((old @ self.dense) * old).sum())
        lost = energy - 2 * float(((old @ self.cross) * new).sum()) + float(((new @ self.gram) * new).sum())
        return max(lost, 0.0) / energy if energy > 0.0 else 0.0
