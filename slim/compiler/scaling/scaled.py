"""Weights with scaled rows and columns: read from what they were, in float32, and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slim.compiler.blocks import row_blocks
from slim.compiler.program import Program
from slim.compiler.weights import Derived


def by_rows(weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype, of: Callable[[slice], Tensor]) -> Tensor:
    """``of`` every block of rows of ``weight``, each rounded to ``dtype`` at once: a tensor of ``shape``."""
    out = torch.empty(shape, dtype=dtype, device=weight.device)
    for rows in row_blocks(weight.shape):
        out[rows] = of(rows).to(dtype)
    return out


@dataclass(frozen=True, eq=False)
class Scaled(Derived):
    """A weight [..., n] or [..., m, n] that is scaled whenever it is read: ``value * rows[:, None] * columns``.

    Attributes:
        value: what it was, in memory or on disk.
        rows: float32 [m], or None for ones.
        columns: float32 [n], or None for ones.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    def load(self) -> Tensor:
        weight = self.source()
        rows = None if self.rows is None else self.rows.to(weight.device)
        columns = None if self.columns is None else self.columns.to(weight.device)

        def scaled(block: slice) -> Tensor:
            part = weight[block].float()
            if rows is not None:
                part = part * (rows[block] if weight.dim() == 2 else rows)[..., None]
            if columns is not None:
                part = part * (columns[block] if weight.dim() == 1 else columns)
            return part

        return by_rows(weight, tuple(weight.shape), weight.dtype, scaled)


def scale_weight(program: Program, name: str, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Scales the rows [m] and columns [n] of the weight ``name``, [..., m, n], or the last dimension of a bias.

    Nothing is computed yet: the weight is scaled when it is read, and scales that are added later are multiplied
    together first, so that however many there are it is rounded once. ``settle`` ends that.
    """
    held = program.weights.raw(name)
    before = held if isinstance(held, Scaled) else Scaled(held)
    program.weights[name] = Scaled(before.value, _times(before.rows, rows), _times(before.columns, columns))


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a * b


def settle(program: Program) -> None:
    """Computes the scaled weights of ``program`` that are in memory; those on disk stay there."""
    for name in list(program.weights):
        held = program.weights.raw(name)
        if isinstance(held, Scaled) and isinstance(held.value, Tensor):
            program.weights[name] = held.load()
