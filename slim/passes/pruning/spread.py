"""How many units each site loses where layers may differ: those whose loss costs least for what it saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx

from slim.compiler.allocation import Option, allocate
from slim.compiler.program import Program
from slim.compiler.statistics import SiteStatistics
from slim.compiler.statistics.paired import Paired
from slim.passes.pruning.budget import Counts, TooMuch, multiple_kept, stays_even
from slim.passes.pruning.obs import removal_order
from slim.passes.pruning.sites import HEADS, Site

_LEAST = 0.25  # of a site stays: what a layer costs is not foreseen where it is as good as gone


def spread(
    costs: Mapping[Site, Tensor], wanted: float, gone: Callable[[Counts], float], multiple: int | None
) -> Counts:
    """The numbers of units that go, for the least sum of ``costs``, so that ``wanted`` goes at least.

    Args:
        costs: of each site [units], nats lost by the first 0, 1, 2, ... units that go.
        gone: what goes with so many units of each site: their costs, less what two sites share.

    Raises:
        TooMuch.
    """
    sites = list(costs)
    kept = {site: list(_kept(site, multiple)) for site in sites}
    options = [
        [Option(site.cost * left, float(costs[site][site.units - left])) for left in kept[site]] for site in sites
    ]
    goal = wanted
    while (chosen := allocate(options, sum(site.cost * site.units for site in sites) - goal)) is not None:
        counts = {site: site.units - kept[site][index] for site, index in zip(sites, chosen, strict=True)}
        short = wanted - gone(counts)
        if short <= 1e-9 * wanted:
            return counts
        goal += max(short, *(site.cost for site in sites))
    raise TooMuch


def _kept(site: Site, multiple: int | None) -> Iterator[int]:
    """The numbers of units that may be left of a site, a quarter at least, as it was first."""
    least = max(1, round(_LEAST * site.units))
    for left in range(site.units, least - 1, -1):
        gone = site.units - left
        heads = site.kind in HEADS
        whole = stays_even(site.units, gone) if heads else left == multiple_kept(site, left, multiple)
        if whole or not gone:
            yield left


def by_surgeon(
    program: Program, statistics: Mapping[fx.Node, SiteStatistics], moments: Mapping[fx.Node, Tensor], site: Site
) -> Tensor:
    """[units]: half the error of what reads the units, once that is fitted anew, each result by its curvature.

    Args:
        moments: of the gradients by what each linear puts out, as ``output_moments`` has them.
    """
    paired = Paired.of(statistics[site.value], centred=site.fitted_bias is not None)
    curvature = moments[site.linear]
    each = (curvature.diagonal() if curvature.dim() == 2 else curvature).double().clamp_min(0)
    weight = site.matrix(program).double()
    weight = weight * each.sqrt().repeat(len(weight) // len(each))[:, None]
    costs = removal_order(weight, paired.gram, site.columns, site.units - 1).costs
    return torch.cat([torch.zeros(1, dtype=torch.float64), costs / 2])


def by_scores(scores: Tensor) -> Tensor:
    """[units]: sums of the least ``scores``."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), scores.double().sort().values.cumsum(0)[:-1]])
