"""What several passes ask of second moments: a factor that always exists, and the directions that matter most."""

from __future__ import annotations

import torch
from torch import Tensor

from slim import errors

_RETRIES = 10


def damped_cholesky(moments: Tensor, damping: float) -> Tensor:
    """The lower factor of ``moments`` in float64, ``damping`` times their mean diagonal added; doubled until it is one.

    Raises:
        BadInput: where it never is.
    """
    wide = moments.double()
    mean = wide.diagonal().mean()
    unit = mean if float(mean) > 0.0 else torch.ones_like(mean)  # of what was never seen anything is a factor
    for _ in range(_RETRIES):
        damped = wide.clone()
        damped.diagonal().add_(damping * unit)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return lower
        damping *= 2
    reason = "second moments on it are not positive definite, however much is added to their diagonal"
    raise errors.BadInput(argument="calibration", reason=reason)


def leading_directions(weight: Tensor, moments: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """(losses [min(m, n)], directions [m, r]): the orthonormal u that W x mostly lies along, the longest first.

    Keeping r of them, as ``u u^T W``, is the product of rank r that loses least of E|W x|^2, and what it loses is the
    sum of the losses behind the first r. They are the eigenvectors of W C W^T, and no inverse is taken: C may be
    singular.

    Args:
        weight: W, [m, n], float64. moments: C = E[x x^T], [n, n], float64; [n] if it is diagonal.
        rank: r, how many directions there shall be; None, or more than there are, is min(m, n).
    """
    m, n = weight.shape
    rank = min(m, n) if rank is None else min(rank, m, n)
    if m <= n:
        values, vectors = _eigen((weight * moments if moments.dim() == 1 else weight @ moments) @ weight.T)
        return values, vectors[:, :rank]
    root = _root(moments)  # the same directions, from the smaller side
    values, vectors = _eigen(root.T @ weight.T @ weight @ root)
    return values, torch.linalg.qr(weight @ (root @ vectors[:, :rank])).Q


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first and none below zero, and eigenvectors of a symmetric matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _root(matrix: Tensor) -> Tensor:
    """R with ``R R^T = matrix``, which may be singular, or is given as its diagonal."""
    if matrix.dim() == 1:
        return matrix.sqrt().diag()
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt()
