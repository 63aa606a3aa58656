"""What units are worth, by the measures that others published: the least are taken out."""

from __future__ import annotations

import torch
from torch import Tensor

from slim.compiler.program import Program
from slim.compiler.statistics import SiteStatistics
from slim.passes.pruning.sites import Site

_SEED = 0


def magnitude(program: Program, site: Site) -> Tensor:
    """[units]: the sum of squares of every weight that goes with the unit (Li et al., 2017, over the whole group)."""
    total = torch.zeros(site.units)
    for member in site.group.members:
        value = program.weights[member.weight].float().square()
        rows = value.transpose(0, member.dim).flatten(1).sum(1) if value.dim() > 1 else value
        mine = member.unit >= 0
        total.index_add_(0, member.unit[mine], rows.cpu()[mine])
    return total


def random(program: Program, site: Site) -> Tensor:
    """[units]: the same numbers whenever the site is the same."""
    generator = torch.Generator().manual_seed(_SEED + sum(map(ord, str(site))))
    return torch.rand(site.units, generator=generator)


def wanda(program: Program, site: Site, statistics: SiteStatistics) -> Tensor:
    """[units]: the sum of |W_ij| sqrt(E x_j^2) over the unit's columns (Sun et al., 2024, summed as Wanda-sp does)."""
    assert statistics.gram is not None
    norms = statistics.gram.diagonal().clamp_min(0).sqrt()
    return site.per_unit(site.matrix(program).abs().sum(0) * norms)


def flap(program: Program, site: Site, statistics: SiteStatistics) -> Tensor:
    """[units]: the sum of Var(x_j) |W_:j|^2 over the unit's columns (An et al., FLAP, 2024: WIFV)."""
    assert statistics.gram is not None
    variance = (statistics.gram.diagonal() - statistics.mean.square()).clamp_min(0)
    return site.per_unit(site.matrix(program).square().sum(0) * variance)
