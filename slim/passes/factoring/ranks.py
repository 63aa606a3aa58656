"""How many directions each linear keeps, alone or with others: one budget of numbers, spent where it undoes most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from slim.compiler.allocation import Option, allocate, together
from slim.passes.factoring.forms import Storage
from slim.passes.factoring.sites import Site, multiple_for

_FLOOR = 0.25  # of what an even share of the budget would be: losses add up only while each is small

Plan = list[tuple[Site, int | None]]  # what is done with some linears that read the same rows


class Group(NamedTuple):
    """Linears that read the same rows: each on its own, and all as one where that can be."""

    apart: Sequence[Site]
    joint: Site | None

    @property
    def sites(self) -> list[Site]:
        return [*self.apart, *([] if self.joint is None else [self.joint])]


@dataclass(frozen=True)
class Budget:
    """What linears may hold.

    Attributes:
        keep: the share of their numbers. saving: the share that a factored form must save to be worth a second product.
        multiple: what ranks are multiples of; None goes by the matrix.
    """

    keep: float
    storage: Storage
    multiple: int | None = None
    saving: float = 0.0

    def ranks(self, site: Site, least: float = 0.0) -> list[int]:
        """The ranks that save enough; of those the ones that hold the share ``least`` at least, or the largest."""
        multiple, most = self.multiple or multiple_for(*site.shape), site.size * (1 - self.saving)
        every = range(multiple, min(site.shape), multiple)
        fitting = [rank for rank in every if (held := site.cost(self.storage, rank)) <= most and held < site.size]
        return [rank for rank in fitting if site.cost(self.storage, rank) >= least * site.size] or fitting[-1:]

    def least(self, site: Site) -> int:
        """The numbers that its smallest form holds."""
        return min((site.cost(self.storage, rank) for rank in self.ranks(site)), default=site.size)

    def even(self, site: Site) -> int | None:
        """The largest rank within the site's own share; None where there is none."""
        fitting = [rank for rank in self.ranks(site) if site.cost(self.storage, rank) <= self.keep * site.size]
        return fitting[-1] if fitting else None


def chosen_ranks(groups: Sequence[Group], lost: Mapping[str, Tensor], budget: Budget) -> Plan | None:
    """Every linear in one site, alone or joint, with its rank, or None if it stays whole; within the budget in sum.

    The last number that is bought undoes as much everywhere: of what a group may do, the options on the lower convex
    hull of loss over numbers are taken in the order of what they gain.

    Args:
        lost: name of a site -> what each rank loses, in a measure that all sites share.

    Returns:
        None where even the smallest ranks do not fit.
    """
    whole = sum(site.size for group in groups for site in group.apart)
    for floor in (_FLOOR * budget.keep, 0.0):
        plans = [_plans(group, lost, budget, floor) for group in groups]
        chosen = allocate([[option for option, _ in found] for found in plans], budget.keep * whole)
        if chosen is not None:
            return [step for found, index in zip(plans, chosen, strict=True) for step in found[index][1]]
    return None


def _plans(group: Group, lost: Mapping[str, Tensor], budget: Budget, floor: float) -> list[tuple[Option, Plan]]:
    """What may be done with a group."""
    ranks: list[list[int | None]] = [[*budget.ranks(site, floor), None] for site in group.apart]
    options = [
        [_option(site, rank, lost, budget) for rank in every] for site, every in zip(group.apart, ranks, strict=True)
    ]
    plans = [
        (option, [(site, every[i]) for site, every, i in zip(group.apart, ranks, chosen, strict=True)])
        for option, chosen in together(options)
    ]
    joint: list[tuple[Option, Plan]] = []
    if group.joint is not None:
        site = group.joint
        joint = [(_option(site, rank, lost, budget), [(site, rank)]) for rank in budget.ranks(site, floor)]
    return plans + joint


def _option(site: Site, rank: int | None, lost: Mapping[str, Tensor], budget: Budget) -> Option:
    return Option(site.cost(budget.storage, rank), 0.0 if rank is None else float(lost[site.name][rank]))


def share(lost: Tensor, rank: int) -> float:
    """The share of a site's results that a rank loses."""
    return float(lost[rank] / lost[0]) if float(lost[0]) > 0.0 else 0.0
