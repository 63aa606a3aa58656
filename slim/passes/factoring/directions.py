"""The directions that a linear's results mostly lie in, seen by what enters and by what is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slim.compiler.linalg import damped_cholesky, leading_directions

_DAMPING = 0.01  # of the mean diagonal of what weighs results: no direction of them costs nothing


@dataclass(frozen=True, eq=False)
class Importance:
    """How much an error e of a linear's result costs: e^T S e, with S = E[g g^T] damped, or 1 where nothing is known.

    Args:
        moments: of gradients by the results: S [m, m] or its diagonal [m], one for each of the linears whose results
            are taken together; none for 1.
    """

    moments: tuple[Tensor, ...] = ()

    @cached_property
    def _roots(self) -> list[Tensor]:
        return [_root_of_importance(moments.double()) for moments in self.moments]

    def weighed(self, rows: Tensor) -> Tensor:
        """K^T rows, with K K^T = S: what has the plain square that ``rows`` [m, ...] have in S."""
        if not self.moments:
            return rows
        parts = rows.split([len(root) for root in self._roots])
        done = [
            root.T @ part if root.dim() == 2 else root[:, None] * part
            for root, part in zip(self._roots, parts, strict=True)
        ]
        return torch.cat(done)

    def unweighed(self, rows: Tensor) -> Tensor:
        """K^-T rows."""
        if not self.moments:
            return rows
        parts = rows.split([len(root) for root in self._roots])
        done = [
            torch.linalg.solve_triangular(root.T, part, upper=True) if root.dim() == 2 else part / root[:, None]
            for root, part in zip(self._roots, parts, strict=True)
        ]
        return torch.cat(done)


def _root_of_importance(moments: Tensor) -> Tensor:
    """K, lower triangular, with K K^T = moments, damped; of a diagonal, its root."""
    if moments.dim() > 1:
        return damped_cholesky(moments, _DAMPING)
    mean = moments.mean()
    return (moments + _DAMPING * (mean if float(mean) > 0.0 else 1.0)).sqrt()


@dataclass(frozen=True, eq=False)
class Product:
    """W as ``outer inner``, of the rank that it has left.

    Attributes:
        outer: [m, r]. inner: [r, n]. Both float64.
    """

    outer: Tensor
    inner: Tensor

    @classmethod
    def of(cls, weight: Tensor, moments: Tensor, importance: Importance, rank: int) -> Product:
        """The product of rank ``rank`` that loses least of what W x is worth."""
        seen = importance.weighed(weight.double())
        _, kept = leading_directions(seen, moments.double(), rank)
        return cls(importance.unweighed(kept), kept.T @ seen)

    @property
    def whole(self) -> Tensor:
        return self.outer @ self.inner


def losses(weight: Tensor, moments: Tensor, importance: Importance) -> Tensor:
    """What keeping r directions loses, for r = 0 to min(m, n): [min(m, n) + 1]; the first is all there is."""
    values, _ = leading_directions(importance.weighed(weight.double()), moments.double(), 0)
    lost = values.flip(0).cumsum(0).flip(0)
    return torch.cat([lost, lost.new_zeros(1)])
