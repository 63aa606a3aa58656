"""How a product of low rank is stored: as its two factors, or as rows of it and the coefficients of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slim.passes.factoring.directions import Product

Storage = Literal["pivot", "factors"]

LARGEST = 2.0  # a coefficient: beyond it a row takes another's place
_INDEX_BYTES = 8  # of a place in the order of rows


def numbers(storage: Storage, rank: int, m: int, n: int, itemsize: int) -> int:
    """What a matrix [m, n] of rank ``rank`` takes, in numbers of ``itemsize`` bytes, the order of rows included."""
    if storage == "factors":
        return rank * (m + n)
    return rank * (m + n - rank) + -(-_INDEX_BYTES * m // itemsize)


@dataclass(frozen=True, eq=False)
class Factors:
    """y = outer (inner x) + outer_bias.

    Attributes:
        inner: [r, n]. outer: [m, r]. outer_bias: [m] or None.
    """

    inner: Tensor
    outer: Tensor
    outer_bias: Tensor | None = None

    @classmethod
    def of(cls, product: Product, bias: Tensor | None) -> Factors:
        return cls(product.inner, product.outer, bias)


@dataclass(frozen=True, eq=False)
class Pivoted:
    """y[order] are r rows of the whole, h = pivots x + pivots_bias, and behind them rest h + rest_bias.

    Attributes:
        pivots: [r, n]. rest: [m - r, r]. order: int64 [m]: where each result stands among these.
    """

    pivots: Tensor
    rest: Tensor
    order: Tensor
    pivots_bias: Tensor | None = None
    rest_bias: Tensor | None = None

    @classmethod
    def of(cls, product: Product, bias: Tensor | None) -> Pivoted:
        """The same matrix in r (m + n - r) numbers, whatever its factors.

        Source: Zhao et al., PIFA, 2025, which finds the rows by a pivoted QR.
        """
        chosen, others, rest = pivot_rows(product.outer)
        pivots = product.outer[chosen] @ product.inner
        order = torch.argsort(torch.cat([chosen, others]))
        if bias is None:
            return cls(pivots, rest, order)
        return cls(pivots, rest, order, bias[chosen], bias[others] - rest @ bias[chosen])


def pivot_rows(outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(chosen [r], others [m - r], coefficients [m - r, r]) with ``outer[others] = coefficients outer[chosen]``.

    Rows are taken as elimination with pivoting takes them; then one whose coefficient is too large takes the place of
    the row that it is the coefficient of, which makes the volume of the chosen larger by that factor, so that this
    ends. Coefficients that are small keep errors of the chosen rows, by rounding, as small in the others.

    Args:
        outer: [m, r] of rank r, float64.

    Source: Goreinov et al., How to find a good submatrix, 2010 (maximum volume).
    """
    m, r = outer.shape
    packed, swaps = torch.linalg.lu_factor(outer)
    places = _permutation(swaps, m)
    chosen, others = places[:r].clone(), places[r:].clone()
    if len(others) == 0:
        return chosen, others, outer.new_zeros(0, r)
    # rows behind the pivots are L2 U and the pivots L1 U: U, however ill it is conditioned, is not inverted
    rest = torch.linalg.solve_triangular(packed[:r], packed[r:], upper=False, left=False, unitriangular=True)
    rest = rest.contiguous()
    while True:
        largest, at = rest.abs().view(-1).max(0)
        if float(largest) <= LARGEST:
            return chosen, others, rest
        row, column = divmod(int(at), r)
        _swap(rest, row, column)
        chosen[column], others[row] = others[row].clone(), chosen[column].clone()


def _permutation(swaps: Tensor, m: int) -> Tensor:
    """The order of rows behind LAPACK's swaps, which count from 1."""
    places = list(range(m))
    for index, other in enumerate((swaps - 1).tolist()):
        places[index], places[other] = places[other], places[index]
    return torch.tensor(places)


def _swap(rest: Tensor, row: int, column: int) -> None:
    """Coefficients once the row ``row`` of the others has taken the place of the chosen row ``column``; in place."""
    pivot = rest[row, column].clone()
    taken, scaled = rest[row].clone(), rest[:, column] / pivot
    rest -= scaled[:, None] * taken
    rest[:, column] = scaled
    rest[row] = -taken / pivot
    rest[row, column] = 1 / pivot
