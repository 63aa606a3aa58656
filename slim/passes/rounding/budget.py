"""Mixed formats: which weight gets how many bits, so that all fit into some bytes and the least is lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from slim import errors
from slim.compiler.allocation import Option, allocate
from slim.compiler.blocks import row_blocks
from slim.compiler.passes_base import Context
from slim.compiler.program import Program
from slim.compiler.report import Report, short_bytes
from slim.compiler.statistics import walk
from slim.compiler.uses import Role, uses
from slim.passes.rounding.curvature import Curvature
from slim.passes.rounding.grid import Grid
from slim.passes.rounding.methods import round_weight

_LADDER = ("int3", "int4", "int8")  # what a weight may be given, the cheapest first
_GROUP = 32


def within_budget(
    program: Program, ctx: Context, report: Report, grids: Mapping[fx.Node, Grid], budget: int, asked_by: str
) -> dict[fx.Node, Grid]:
    """The grid of each weight with which all weights of ``program`` take ``budget`` bytes at most.

    A weight that was to be int8 may get int8, int4 or int3; another its own format or a wider one. The damage is the
    share of what the weight puts out over the calibration data that a search of scales would lose; of a table that is
    only looked up, the share of its own size.

    Raises:
        BadPassOption: where even the cheapest formats do not fit. NeedsCalibration.
    """
    nodes = list(grids)
    choices = [_choices(node, grids[node]) for node in nodes]
    damages = _damages(program, ctx, dict(zip(nodes, choices, strict=True)), asked_by)
    options = [
        [Option(_bytes(node, grid), damage) for grid, damage in zip(found, damages[node], strict=True)]
        for node, found in zip(nodes, choices, strict=True)
    ]
    rest = program.nbytes - sum(int(program.weights[str(node.target)].nbytes) for node in nodes)
    chosen = allocate(options, budget - rest)
    if chosen is None:
        least = rest + sum(min(site).cost for site in options)
        reason = f"{budget:,} bytes do not hold the weights, which take {math.ceil(least):,} bytes at the least"
        raise errors.BadPassOption(pass_name=asked_by, option="budget", reason=reason)
    picked = {node: site[index] for node, site, index in zip(nodes, choices, chosen, strict=True)}
    counts = {name: sum(grid.format == name for grid in picked.values()) for name in (*_LADDER, "nf4", "fp8")}
    shares = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    report.notes.append(f"formats for {short_bytes(budget)}: {shares}")
    return picked


def _choices(node: fx.Node, own: Grid) -> list[Grid]:
    """What the weight may be held in, its own grid among it."""
    wider = _LADDER if own.format not in _LADDER or own.format == "int8" else _LADDER[_LADDER.index(own.format) :]
    if own.format in ("nf4", "fp8"):
        wider = ("int8",)
    found = [own]
    for name in wider:
        group = 0 if name == "int8" else own.group_size or _GROUP
        grid = Grid(name, group, own.symmetric or name == "int8")  # type: ignore[arg-type]
        if name != own.format and _fits(node, grid):
            found.append(grid)
    return found


def _fits(node: fx.Node, grid: Grid) -> bool:
    try:
        grid.groups(int(node.meta["val"].shape[-1]))
    except errors.BadInput:
        return False
    return True


def _bytes(node: fx.Node, grid: Grid) -> float:
    shape = node.meta["val"].shape
    return grid.bits(int(shape[-1])) * shape.numel() / 8


def _damages(
    program: Program, ctx: Context, choices: Mapping[fx.Node, Sequence[Grid]], asked_by: str
) -> dict[fx.Node, list[float]]:
    """What each choice of each weight loses; by the inputs of the first site that reads it, where there are data."""
    found: dict[fx.Node, list[float]] = {}
    sites: dict[fx.Node, list[fx.Node]] = {}
    if ctx.calibration is not None:
        for node in choices:
            for use in uses(node):
                if use.role in (Role.LINEAR, Role.EXPERTS) and isinstance(use.node.args[0], fx.Node):
                    sites.setdefault(use.node.args[0], []).append(node)
                    break
    for block in walk(program, list(sites), ctx, asked_by=asked_by, gram=True, changes=False) if sites else ():
        for value in block.values:
            for node in sites[value]:
                name = str(node.target)
                if not block.restored:
                    gram = block.statistics[value].gram
                    assert gram is not None
                    curvature = Curvature(gram)
                    lost = [_damage(program, node, grid, curvature) for grid in choices[node]]
                    block.results[name] = torch.tensor(lost, dtype=torch.float64)
                found[node] = block.results[name].tolist()
    for node in ctx.track("weighing formats", [node for node in choices if node not in found]):
        found[node] = [_damage(program, node, grid, None) for grid in choices[node]]
    return found


def _damage(program: Program, node: fx.Node, grid: Grid, curvature: Curvature | None) -> float:
    """The share of the outputs' square, or of the weight's own, that rounding with searched scales loses."""
    weight = program.weights[str(node.target)]
    restored = round_weight(weight, grid, "search", curvature).restored()
    rows, rounded = weight.reshape(-1, weight.shape[-1]), restored.view(-1, weight.shape[-1])
    lost = whole = 0.0
    for block in row_blocks(rows.shape):
        exact = rows[block].float()
        lost += _square(exact - rounded[block], curvature)
        whole += _square(exact, curvature)
    return lost / whole if whole else 0.0


def _square(rows: torch.Tensor, curvature: Curvature | None) -> float:
    seen = rows if curvature is None else rows @ curvature.moments
    return float((seen * rows).sum(dtype=torch.float64))
