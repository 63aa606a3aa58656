"""Budgets: of many sites with options each, which option every site takes so that the least is lost in sum."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Option(NamedTuple):
    """One way to do with a site.

    Attributes:
        cost: bytes, or numbers. damage: what is lost by it, in a unit that all sites share.
    """

    cost: float
    damage: float


def allocate(options: Sequence[Sequence[Option]], budget: float) -> list[int] | None:
    """Which of its options each site takes, so that costs stay within ``budget``; None where that cannot be.

    All sites begin with their cheapest option and climb their lower convex hulls, the step that undoes the most damage
    for its cost first. What a Lagrange multiplier for the cost would choose is among the states passed; the steps
    behind it fill what is left. Equal sites are served in order, so the same input always gives the same answer.

    Example:
        >>> allocate([[Option(3, 9.0), Option(4, 1.0)], [Option(3, 2.0), Option(4, 1.0)]], budget=7)
        [1, 0]
    """
    hulls = [_hull(site) for site in options]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(site[index].cost for site, index in zip(options, chosen, strict=True))
    if left < 0:
        return None
    for site, before, after in _climb(options, hulls):
        price = options[site][after].cost - options[site][before].cost
        if chosen[site] == before and price <= left:
            chosen[site] = after
            left -= price
    return chosen


def together(options: Sequence[Sequence[Option]]) -> list[tuple[Option, list[int]]]:
    """The options of several sites taken as one: what they cost and lose in sum, and which option each takes.

    Those on the lower convex hull of all combinations, the cheapest first.
    """
    hulls = [_hull(site) for site in options]
    chosen = [hull[0] for hull in hulls]
    found = [chosen]
    for site, _, after in _climb(options, hulls):
        found.append([after if index == site else held for index, held in enumerate(found[-1])])
    return [(_sum(options, chosen), chosen) for chosen in found]


def _sum(options: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Option:
    taken = [site[index] for site, index in zip(options, chosen, strict=True)]
    return Option(sum(option.cost for option in taken), sum(option.damage for option in taken))


def _climb(options: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """(site, from, to) along all hulls, the step that undoes the most damage for its cost first."""
    steps = []
    for site, hull in enumerate(hulls):
        for before, after in pairwise(hull):
            old, new = options[site][before], options[site][after]
            steps.append(((old.damage - new.damage) / (new.cost - old.cost), site, before, after))
    return [step[1:] for step in sorted(steps, key=lambda step: (-step[0], step[1]))]


def _hull(site: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of damage over cost, from the cheapest to the least harmful."""
    hull: list[int] = []
    for index in sorted(range(len(site)), key=lambda i: site[i]):
        new = site[index]
        if hull and new.damage >= site[hull[-1]].damage:
            continue
        while len(hull) > 1 and _bends_up(site[hull[-2]], site[hull[-1]], new):
            hull.pop()
        hull.append(index)
    return hull


def _bends_up(first: Option, second: Option, third: Option) -> bool:
    """Whether going straight from the first to the third is at least as good as by the second."""
    gain, price = first.damage - second.damage, second.cost - first.cost
    later, more = second.damage - third.damage, third.cost - second.cost
    return gain * more <= later * price
