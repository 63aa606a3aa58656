"""What is kept of a site's rows: sums over all tokens, of O(features^2) numbers at most, and a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from slim import errors

_SEED = 0


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """What the rows x [n] that enter a linear looked like, over all calibration tokens, in float32.

    Attributes:
        count: rows; those of pad tokens are left out.
        absmax: the largest |x_j|, [n].
        absmean: E|x_j|, [n].
        mean: E x_j, [n].
        gram: E[x x^T], uncentred, [n, n]; None where it was not asked for.
        cross: E[x_dense x^T], [n, n], where x_dense are the same rows in the model before the walk changed it; where
            the walk was told of values beside the site, with what those have lost behind it: [n + m, n].
        dense_gram, dense_mean: E[x_dense x_dense^T] and E x_dense; None where they were not asked for.
        rows: a sample, [r, n], the same whenever the data are; of what the walk was told to sample.
    """

    count: int
    absmax: Tensor
    absmean: Tensor
    mean: Tensor
    gram: Tensor | None = None
    cross: Tensor | None = None
    dense_gram: Tensor | None = None
    dense_mean: Tensor | None = None
    rows: Tensor | None = None

    def tensors(self, site: str) -> dict[str, Tensor]:
        """All of it as tensors, under names that begin with ``site``."""
        return {f"{site}.{name}": torch.as_tensor(value) for name, value in vars(self).items() if value is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], site: str) -> SiteStatistics:
        """What ``tensors`` made tensors of."""
        held: dict[str, Any] = {field.name: tensors.get(f"{site}.{field.name}") for field in fields(cls)}
        return cls(**{**held, "count": int(tensors[f"{site}.count"])})


@dataclass(frozen=True)
class Wanted:
    """What to keep of each site beside the sums over channels.

    Attributes:
        gram, rows, cross: of ``SiteStatistics``.
        dense: its ``dense_gram`` and ``dense_mean``, beside ``cross``.
    """

    gram: bool = False
    rows: int = 0
    cross: bool = False
    dense: bool = False


class Accumulator:
    """The sums of one site so far.

    Args:
        site: for messages. dense: features of x_dense; None is as many as x has.
    """

    def __init__(self, site: str, width: int, wanted: Wanted, dense: int | None = None) -> None:
        self.site, self.width, self.wanted = site, width, wanted
        dense = width if dense is None else dense
        self.count = 0
        self._absmax, self._abssum, self._sum = (torch.zeros(width) for _ in range(3))
        self._gram = torch.zeros(width, width) if wanted.gram else None
        self._cross = torch.zeros(dense, width) if wanted.cross else None
        self._dense_gram = torch.zeros(dense, dense) if wanted.dense else None
        self._dense_sum = torch.zeros(dense) if wanted.dense else None
        self._rows: Tensor | None = None
        self._keys = torch.zeros(0)
        self._generator = torch.Generator().manual_seed(_SEED)

    @property
    def nbytes(self) -> int:
        own = (self._absmax, self._abssum, self._sum, self._gram, self._rows)
        dense = (self._cross, self._dense_gram, self._dense_sum)
        return sum(part.nbytes for part in (*own, *dense) if part is not None)

    def add(self, rows: Tensor, dense: Tensor | None = None, sampled: Tensor | None = None) -> None:
        """Counts ``rows`` [r, n] in; ``dense`` are the same rows of the model as it was, ``sampled`` what is sampled.

        Raises:
            NonFiniteActivation: where a number is not finite.
        """
        rows = rows.float()
        magnitude = rows.abs()
        largest = magnitude.amax(0) if len(rows) else self._absmax
        if not bool(torch.isfinite(largest).all()):
            channel = int((~torch.isfinite(largest)).nonzero()[0])
            raise errors.NonFiniteActivation(site=self.site, channel=channel)
        self.count += len(rows)
        torch.maximum(self._absmax, largest, out=self._absmax)
        self._abssum += magnitude.sum(0)
        self._sum += rows.sum(0)
        if self._gram is not None:
            self._gram.addmm_(rows.T, rows)
        if dense is not None:
            self._add_dense(dense.float(), rows)
        if self.wanted.rows:
            self._sample(rows if sampled is None else sampled.float())

    def _add_dense(self, dense: Tensor, rows: Tensor) -> None:
        if self._cross is not None:
            self._cross.addmm_(dense.T, rows)
        if self._dense_gram is not None and self._dense_sum is not None:
            self._dense_gram.addmm_(dense.T, dense)
            self._dense_sum += dense.sum(0)

    def _sample(self, rows: Tensor) -> None:
        """Every row gets a random key, and those with the largest keys stay: a fair sample of rows seen so far."""
        keys = torch.cat([self._keys, torch.rand(len(rows), generator=self._generator)])
        best = keys.topk(min(self.wanted.rows, len(keys))).indices.sort().values
        held = rows if self._rows is None else torch.cat([self._rows, rows])
        self._keys, self._rows = keys[best], held[best]

    def finish(self) -> SiteStatistics:
        """The means. Raises BadInput where no row was ever seen."""
        if self.count == 0:
            reason = f"none of its tokens reaches {self.site}"
            raise errors.BadInput(argument="calibration", reason=reason)
        share = 1.0 / self.count
        return SiteStatistics(
            self.count,
            self._absmax,
            self._abssum * share,
            self._sum * share,
            _times(self._gram, share),
            _times(self._cross, share),
            _times(self._dense_gram, share),
            _times(self._dense_sum, share),
            self._rows if self.wanted.rows else None,
        )


def _times(total: Tensor | None, share: float) -> Tensor | None:
    return None if total is None else total.mul_(share)
