"""The directions that a linear's results mostly lie in, seen by what enters and by what is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slim import errors

_DAMPING = 0.01  # of the mean diagonal of what weighs results: no direction of them costs nothing
_RETRIES = 10


def leading_directions(weight: Tensor, moments: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """(losses [min(m, n)], directions [m, r]): the orthonormal u that W x mostly lies along, the longest first.

    Keeping r of them, as ``u u^T W``, is the product of rank r that loses least of E|W x|^2, and what it loses is the
    sum of the losses behind the first r. They are the eigenvectors of W C W^T, and no inverse is taken: C may be
    singular.

    Args:
        weight: W, [m, n], float64. moments: C = E[x x^T], [n, n], float64.
        rank: r, how many directions there shall be; None, or more than there are, is min(m, n).
    """
    m, n = weight.shape
    rank = min(m, n) if rank is None else min(rank, m, n)
    if m <= n:
        values, vectors = _eigen(weight @ moments @ weight.T)
        return values, vectors[:, :rank]
    root = _root(moments)  # the same directions, from the smaller side
    values, vectors = _eigen(root.T @ weight.T @ weight @ root)
    return values, torch.linalg.qr(weight @ (root @ vectors[:, :rank])).Q


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first and none below zero, and eigenvectors of a symmetric matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _root(matrix: Tensor) -> Tensor:
    """R with ``R R^T = matrix``, which may be singular."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt()


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
    wide = moments.dim() == 1
    mean = moments.mean() if wide else moments.diagonal().mean()
    unit, damping = mean if float(mean) > 0.0 else torch.ones_like(mean), _DAMPING
    if wide:
        return (moments + damping * unit).sqrt()
    for _ in range(_RETRIES):
        damped = moments.clone()
        damped.diagonal().add_(damping * unit)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return lower
        damping *= 2
    raise errors.BadInput(argument="calibration", reason="the moments of its gradients have no root: give more of it")


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
