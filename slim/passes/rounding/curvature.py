"""What calibration data say about the rows that enter a linear, made ready for rounding its weight."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slim import errors
from slim.compiler.linalg import damped_cholesky

_DAMPING = 0.01  # of the mean diagonal, as in GPTQ's own code
_TABLE = 1.0  # of the mean diagonal: measured, see docs/quantize.md


@dataclass(frozen=True, eq=False)
class Curvature:
    """The second moments of a site's rows: how much an error of its weights costs. Made once, shared by q, k and v.

    Rounding W to V costs ``tr((W - V) C (W - V)^T)`` where C = E[x x^T]. Where the rows x that come are not the rows
    x_dense that were meant, because what is before the site has been rounded already, the weight to aim at is not W
    but ``W E[x_dense x^T] C^-1``, which undoes what can be undone.

    Args:
        gram: C, [n, n].
        cross: E[x_dense x^T], [n, n]; None aims at the weight itself.
        damping: what is added to the diagonal before anything is inverted, as a share of its mean.

    Raises:
        BadInput: where it is not square, or not finite.

    Sources: Frantar et al., GPTQ, 2022; Li et al., GPTAQ, 2025 (the error of what is before the site).
    """

    gram: Tensor
    cross: Tensor | None = None
    damping: float = _DAMPING

    def __post_init__(self) -> None:
        for name, value in (("gram", self.gram), ("cross", self.cross)):
            if value is None:
                continue
            if value.dim() != 2 or value.shape[0] != value.shape[1] or value.shape != self.gram.shape:
                raise errors.BadInput(argument=name, reason=f"it is a square matrix, not {list(value.shape)}")
            if not bool(torch.isfinite(value).all()):
                raise errors.BadInput(argument=name, reason="it holds NaN or infinity: the calibration data overflow")

    def without(self, columns: Tensor) -> Curvature:
        """For a weight whose ``columns`` are kept elsewhere: what enters them is not there."""
        kept = torch.ones(self.width, dtype=self.gram.dtype, device=self.gram.device).index_fill_(0, columns, 0)
        both = kept[:, None] * kept
        return Curvature(self.gram * both, None if self.cross is None else self.cross * both, self.damping)

    def for_table(self) -> Curvature:
        """For a matrix whose rows are also looked up, as embeddings are: their own errors count as well.

        What a row of a table is added to goes through the whole model, and no direction is known to matter less.
        """
        own = _TABLE * self.gram.diagonal().mean() * torch.eye(self.width, dtype=self.gram.dtype)
        return Curvature(self.gram + own.to(self.gram.device), self.cross, self.damping)

    @property
    def width(self) -> int:
        return len(self.gram)

    @cached_property
    def moments(self) -> Tensor:
        """C in float32; where no channel was ever seen, all count alike."""
        gram = self.gram.float()
        return gram if bool((gram.diagonal() > 0).any()) else torch.eye(len(gram), device=gram.device)

    @cached_property
    def order(self) -> Tensor:
        """Columns by how much they matter, the one that sees the largest inputs first."""
        return torch.argsort(self.moments.diagonal(), descending=True, stable=True)

    @cached_property
    def spending(self) -> Tensor:
        """U in float32, upper triangular, with ``U^T U = (C + damping)^-1``, rows and columns in ``order``.

        Row j says, up to its first number, by how much later columns move to make up for an error of column j.
        """
        sorted_ = self.moments[self.order][:, self.order]
        lower = damped_cholesky(sorted_.flip(0, 1), self.damping)
        upper = lower.flip(0, 1)  # sorted = upper upper^T, so that the inverse of upper is U
        identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, identity, upper=True).float()

    @cached_property
    def _aim(self) -> Tensor | None:
        """The transpose of ``E[x_dense x^T] C^-1``, both damped, float32."""
        if self.cross is None:
            return None
        lower = damped_cholesky(self.moments, self.damping)
        damp = self.damping * self.moments.double().diagonal().mean()
        wanted = self.cross.double().clone()
        wanted.diagonal().add_(damp)
        return torch.cholesky_solve(wanted.T.contiguous(), lower).float()

    def target(self, rows: Tensor) -> Tensor:
        """What to aim at in place of ``rows`` [m, n] of a weight."""
        return rows if self._aim is None else rows @ self._aim.T
