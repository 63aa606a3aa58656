"""Rounds the chosen weights of a Program, block by block, and puts the results into its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from slim.compiler.passes_base import Context
from slim.compiler.program import Program
from slim.compiler.report import Report
from slim.compiler.selection import is_shared
from slim.compiler.statistics import Grain, SiteStatistics, collect, walk
from slim.compiler.uses import EXPERTS, Role, uses
from slim.passes.rounding import install
from slim.passes.rounding.correct import low_rank_correction, outlier_columns
from slim.passes.rounding.curvature import Curvature
from slim.passes.rounding.grid import Grid, Stored
from slim.passes.rounding.methods import Method, default_method, round_weight, with_data

Grids = Mapping[fx.Node, Grid]

_SUFFIXES = ("", "_scale", "_zero")  # of what stands for a weight: numbers, scales, zero points


@dataclass(frozen=True)
class Recipe:
    """How weights are rounded, and what is done beside it; see ``Quantize`` for each.

    Attributes:
        asked_by: the pass with its options: for messages, progress, and to know its checkpoint again.
        method: None where slim chooses by format and data.
    """

    asked_by: str
    method: Method | None = None
    activations: Literal["int8"] | None = None
    static: bool = False
    outliers: float = 0.0
    correction: int = 0


class Work:
    """One run of a recipe over weights of a Program.

    Args:
        grids: the weights, by the nodes that read them, and what each is rounded to.
    """

    def __init__(self, program: Program, ctx: Context, report: Report, recipe: Recipe, grids: Grids) -> None:
        self.program, self.ctx, self.report, self.recipe, self.grids = program, ctx, report, recipe, grids
        self.sites = self._sites()
        self._told: set[str] = set()

    def run(self) -> None:
        """Rounds everything; where data are needed, each block is seen behind blocks that are rounded already."""
        if self._needs_data():
            self._run_with_data()
        else:
            for value in self.ctx.track("quantising", self.sites):
                self._put(value, self._make(value, None))
        for node in [node for node in self.grids if str(node.target) not in self.report.matched]:
            self._install(node, self._rounded(node, None, None, False))  # tables that no linear reads

    def _run_with_data(self) -> None:
        """Tables first, because all else comes behind them; then site by site where errors are made up for.

        What makes up for errors before a site must see its own site's rows as they have become: statistics of a whole
        block would let o make up for what q, k and v have made up for already.
        """
        asked_by, notes = self.recipe.asked_by, self.report.notes
        meant = self.program.copy() if self._aims() else None
        tables = [value for value, linears in self.sites.items() if any(map(is_shared, map(_weight, linears)))]
        for value, statistics in collect(self.program, tables, self.ctx, asked_by=asked_by, gram=True).items():
            self._put(value, self._make(value, statistics))
        values = [value for value in self.sites if value not in tables]
        grain: Grain = "block" if meant is None else "site"
        blocks = walk(
            self.program, values, self.ctx, asked_by=asked_by, gram=True, meant=meant, grain=grain, notes=notes
        )
        for block in blocks:
            for value in block.values:
                if not block.restored:
                    block.results |= self._make(value, block.statistics[value])
                self._put(value, block.results)

    def _aims(self) -> bool:
        """Whether anything is rounded by a method that makes up for what was rounded before it."""
        return any((self.recipe.method or default_method(grid, data=True)) == "best" for grid in self.grids.values())

    def _sites(self) -> dict[fx.Node, list[fx.Node]]:
        """Value -> the linears that read it and whose weights are to be rounded, all in the order of the graph."""
        linears = {use.node for node in self.grids for use in uses(node) if use.role in (Role.LINEAR, Role.EXPERTS)}
        found: dict[fx.Node, list[fx.Node]] = {}
        for linear in sorted(linears):
            found.setdefault(linear.args[0], []).append(linear)  # type: ignore[arg-type]
        return found

    def _needs_data(self) -> bool:
        """Whether anything that was asked for, or is done by default, looks at activations."""
        recipe = self.recipe
        if recipe.static or recipe.outliers or recipe.correction or recipe.method in with_data:
            return True
        return recipe.method is None and self.ctx.calibration is not None and any(map(self._gains, self.grids.values()))

    def _gains(self, grid: Grid) -> bool:
        return default_method(grid, data=True) in with_data

    # -- one site ------------------------------------------------------------------------------------------------------

    def _make(self, value: fx.Node, statistics: SiteStatistics | None) -> dict[str, Tensor]:
        """All that the linears over ``value`` will read, by name; the graph stays as it is."""
        linears = self.sites[value]
        site, dtype = str(_weight(linears[0]).target), value.meta["val"].dtype
        made: dict[str, Tensor] = {}
        curvature = (
            None if statistics is None or statistics.gram is None else Curvature(statistics.gram, statistics.cross)
        )
        columns = None
        if self.recipe.outliers and statistics is not None and self._plain(linears, "outlier columns"):
            columns = outlier_columns(statistics.absmax, self.recipe.outliers)
            made[f"{site}_columns"] = columns
            curvature = None if curvature is None else curvature.without(columns)
            if self.recipe.activations:
                made[f"{site}_keep"] = torch.ones(len(statistics.absmax), dtype=dtype).index_fill_(0, columns, 0)
        corrects = bool(self.recipe.correction) and self._plain(linears, "corrections")
        for node in self._weights(linears):
            made |= self._rounded(node, curvature, columns, corrects)
        if self.recipe.static and statistics is not None:
            absmax = statistics.absmax if columns is None else statistics.absmax.index_fill(0, columns, 0)
            made[f"{site}_step"] = (absmax.max() / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return made

    def _weights(self, linears: Sequence[fx.Node]) -> list[fx.Node]:
        """The weights that are still to be rounded; one that is read at several sites goes by the first."""
        nodes = dict.fromkeys(_weight(linear) for linear in linears)
        return [node for node in nodes if node in self.grids and str(node.target) not in self.report.matched]

    def _plain(self, linears: Sequence[fx.Node], what: str) -> bool:
        """Whether something can be added beside the linears: experts would need one for each."""
        if all(linear.target is not EXPERTS for linear in linears):
            return True
        self._note(f"experts get no {what}")
        return False

    def _is_worth_correcting(self, name: str, weight: Tensor) -> bool:
        """Whether the product is smaller than the weight that it stands beside."""
        m, n = weight.shape
        if self.recipe.correction * (m + n) < m * n:
            return True
        self._note(f"{name} gets no correction: of rank {self.recipe.correction} it would hold as much as the weight")
        return False

    def _note(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.report.notes.append(text)

    def _rounded(
        self, node: fx.Node, curvature: Curvature | None, columns: Tensor | None, corrects: bool
    ) -> dict[str, Tensor]:
        """What stands for one weight."""
        name, grid = str(node.target), self.grids[node]
        weight = self.program.weights[name]
        made: dict[str, Tensor] = {}
        if columns is not None:
            made[f"{name}_outliers"] = weight[:, columns].contiguous()
            weight = weight.index_fill(1, columns, 0)
        if curvature is not None and is_shared(node):
            curvature = curvature.for_table()
        rounded = round_weight(weight, grid, self._method(grid, curvature), curvature)
        if corrects and curvature is not None and self._is_worth_correcting(name, weight):
            error = weight.float() - rounded.restored()
            outer, inner = low_rank_correction(error, curvature, self.recipe.correction)
            made |= {f"{name}_inner": inner.to(weight.dtype), f"{name}_outer": outer.to(weight.dtype)}
        parts = zip(_SUFFIXES, rounded.packed(), strict=True)
        return made | {f"{name}{suffix}": part for suffix, part in parts if part is not None}

    def _method(self, grid: Grid, curvature: Curvature | None) -> Method:
        """What the user asked for, or the best there is; the report says which."""
        method = self.recipe.method or default_method(grid, data=curvature is not None)
        note = f"{grid.format} by {method}"
        if self.recipe.method is None and curvature is None and self._gains(grid):
            note += f", without calibration data; with it, by {default_method(grid, data=True)}"
        self._note(note)
        return method

    # -- into the graph ------------------------------------------------------------------------------------------------

    def _put(self, value: fx.Node, made: Mapping[str, Tensor]) -> None:
        linears = self.sites[value]
        site = str(_weight(linears[0]).target)
        weights = {linear: _weight(linear) for linear in linears}
        for node in self._weights(linears):
            self._install(node, made)
        beside = {name: tensor for name, tensor in made.items() if name not in self.program.weights}
        for name, tensor in beside.items():
            self.program.weights[name] = tensor
        for linear, node in weights.items():
            name = str(node.target)
            if f"{name}_inner" in made:
                install.add_low_rank(self.program, linear, f"{name}_inner", f"{name}_outer")
            if f"{site}_columns" in made:
                install.add_columns(self.program, linear, f"{site}_columns", f"{name}_outliers")
        if self.recipe.activations:
            keep, step = (name if name in made else None for name in (f"{site}_keep", f"{site}_step"))
            install.round_rows(self.program, value, linears, keep, step)

    def _install(self, node: fx.Node, made: Mapping[str, Tensor]) -> None:
        name = str(node.target)
        stored = Stored(*(made.get(f"{name}{suffix}") for suffix in _SUFFIXES))  # type: ignore[arg-type]
        install.install_weight(self.program, node, self.grids[node], stored)
        self.report.matched.append(name)


def _weight(linear: fx.Node) -> fx.Node:
    """The node that reads the weight of a linear, whether it has been rounded already or not."""
    node = linear.args[1]
    while isinstance(node, fx.Node) and node.op != "get_attr":
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node
