"""AWQ's first half in a graph: columns that meet large inputs are made larger, and what makes those inputs smaller."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from slim.compiler.passes_base import STATISTICS, Context
from slim.compiler.program import Program
from slim.compiler.scaling import ScaleSite, scale_sites, settle
from slim.compiler.scaling.sites import FIXED
from slim.compiler.statistics import SiteStatistics, calibration_of, walk
from slim.passes.rounding.awq import awq_factors
from slim.passes.rounding.curvature import Curvature
from slim.passes.rounding.grid import Grid


def move_scales(program: Program, ctx: Context, grids: Mapping[fx.Node, Grid], asked_by: str) -> str:
    """Multiplies columns of weights that will be rounded, and divides what enters them; the function stays the same.

    A site takes part where all that read it will be rounded alike and every channel of it can be scaled.

    Returns:
        What was done, for the report.

    Raises:
        NeedsCalibration.
    """
    calibration_of(program, ctx, asked_by)
    sites = [site for site in scale_sites(program)[0] if _grid_of(program, site, grids) is not None]
    values = list(dict.fromkeys(site.values[0] for site in sites))
    factors: dict[str, Tensor] = {}
    for block in walk(program, values, ctx, asked_by=asked_by, gram=True, changes=False):
        for site in sites:
            grid = _grid_of(program, site, grids)
            if site.values[0] in block.statistics and grid is not None:
                block.results[site.name] = _factors(program, site, grid, block.statistics[site.values[0]])
        factors |= block.results
    moved = 0
    for site in sites:
        if bool((factors[site.name] != 1).any()):
            site.apply(program, factors[site.name])
            moved += 1
    settle(program)
    ctx.collected.pop(STATISTICS, None)  # of inputs as they were
    return f"awq moved scales at {moved} of {len(sites)} sites"


def _grid_of(program: Program, site: ScaleSite, grids: Mapping[fx.Node, Grid]) -> Grid | None:
    """What all readers of a site are rounded to; None where they differ, or the site cannot be scaled as a whole."""
    found = {grids.get(reader.node.args[1]) for reader in site.readers}  # type: ignore[arg-type]
    whole = all(bool((reader.columns != FIXED).all()) for reader in site.readers)
    return found.pop() if len(found) == 1 and len(site.values) == 1 and whole else None


def _factors(program: Program, site: ScaleSite, grid: Grid, statistics: SiteStatistics) -> Tensor:
    """The scale of a site, [site.size]; channels that share a number of it are judged by their mean."""
    assert statistics.gram is not None
    first = site.readers[0]
    shared = site.spread(first, site.gather(first, statistics.absmean, "mean"))
    weights = [program.weights[name] for name in dict.fromkeys(reader.weight for reader in site.readers)]
    rows = [weight.reshape(-1, weight.shape[-1]) for weight in weights]
    columns = awq_factors(rows, grid, Curvature(statistics.gram), shared)
    # the readers' columns grow by what the inputs shrink by
    return site.gather(first, torch.as_tensor(columns)).clamp_min(torch.finfo(torch.float32).tiny)
