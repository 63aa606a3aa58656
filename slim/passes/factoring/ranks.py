"""How many directions each site keeps: one budget of numbers for all, spent where it undoes most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from slim.compiler.allocation import Option, allocate
from slim.passes.factoring.forms import Storage
from slim.passes.factoring.sites import Site, multiple_for

_FLOOR = 0.25  # of what an even share of the budget would be: losses add up only while each is small


@dataclass(frozen=True)
class Budget:
    """What sites may hold.

    Attributes:
        keep: the share of their numbers. saving: bytes that a factored site must save to be worth a second product.
        multiple: what ranks are multiples of; None goes by the matrix.
    """

    keep: float
    storage: Storage
    multiple: int | None = None
    saving: int = 0

    def ranks(self, site: Site, least: float = 0.0) -> list[int]:
        """The ranks that ``site`` may have, those from ``least`` of its numbers on."""
        multiple = self.multiple or multiple_for(*site.shape)
        return site.ranks(self.storage, multiple, int(least * site.size), self.saving)

    def even(self, site: Site) -> int | None:
        """The largest rank within the site's own share; None where there is none."""
        fitting = [r for r in self.ranks(site) if site.cost(self.storage, r) <= self.keep * site.size]
        return fitting[-1] if fitting else None


def chosen_ranks(sites: Sequence[Site], lost: Mapping[str, Tensor], budget: Budget) -> list[int | None] | None:
    """The rank of each site, None for one that stays whole, so that all hold ``budget.keep`` of their numbers at most.

    The last number that is bought undoes as much everywhere: losses are convex in what a rank costs, but for the steps
    between multiples, and what is not on the convex hull is passed over.

    Args:
        lost: name of a site -> what each rank loses, in a measure that all sites share.

    Returns:
        None where even the smallest ranks do not fit.
    """
    for floor in (_FLOOR * budget.keep, 0.0):
        ranks: list[list[int | None]] = [[*budget.ranks(site, floor), None] for site in sites]
        options = [
            [_option(site, rank, lost[site.name], budget.storage) for rank in every]
            for site, every in zip(sites, ranks, strict=True)
        ]
        chosen = allocate(options, budget.keep * sum(site.size for site in sites))
        if chosen is not None:
            return [every[index] for every, index in zip(ranks, chosen, strict=True)]
    return None


def _option(site: Site, rank: int | None, lost: Tensor, storage: Storage) -> Option:
    return Option(site.cost(storage, rank), 0.0 if rank is None else float(lost[rank]))


def share(lost: Tensor, rank: int) -> float:
    """The share of a site's results that a rank loses."""
    return float(lost[rank] / lost[0]) if float(lost[0]) > 0.0 else 0.0
