"""Factors the chosen linears of a Program: what each would lose, how many directions it keeps, and then one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from slim.compiler.passes_base import Context
from slim.compiler.program import Program
from slim.compiler.report import Report
from slim.compiler.statistics import SiteStatistics, walk
from slim.compiler.statistics.gradients import output_moments
from slim.compiler.statistics.paired import Paired
from slim.passes.factoring.directions import Importance, Product, losses
from slim.passes.factoring.forms import Factors, Pivoted, Storage
from slim.passes.factoring.sites import Linear, Site, Table
from slim.passes.factoring.tables import weigh as weigh_tables
from slim.passes.factoring.write import Made, as_weights, install

Method = Literal["whitened", "svd_llm", "asvd", "svd"]

_MEASURED = "loss of the results"  # among the results of a walk; no weight is called that


def weigh(program: Program, ctx: Context, linears: Sequence[Linear], tables: Sequence[Table], asked_by: str) -> None:
    """Gives every linear, and every table, the importance of its results, from gradients."""
    nodes = [linear.node for linear in linears] + [node for table in tables for node in (*table.lookups, *table.heads)]
    moments = output_moments(program, nodes, ctx, asked_by=asked_by)
    for linear in linears:
        linear.importance = Importance((moments[linear.node],))
    weigh_tables(program, ctx, tables, moments, asked_by)


def spectra(program: Program, ctx: Context, sites: Sequence[Site], asked_by: str) -> dict[str, Tensor]:
    """Name of a site -> what keeping r directions loses on the calibration data, for every r."""
    found: dict[str, Tensor] = {}
    by_rows = _by_rows(sites)
    for block in walk(program, list(by_rows), ctx, asked_by=asked_by, gram=True, changes=False):
        for value in block.values:
            for site in by_rows[value]:
                if not block.restored:
                    moments = _moments(block.statistics[value], centred=site.has_bias)
                    block.results[site.name] = losses(site.load(), moments, site.importance)
                found[site.name] = block.results[site.name]
    return found


def factor(
    program: Program,
    ctx: Context,
    sites: Sequence[Site],
    storage: Storage,
    asked_by: str,
    report: Report,
    meant: Program | None = None,
) -> None:
    """Replaces every linear, each fitted to what it returned in the original on what its rows are by then.

    Args:
        meant: the original, where something has been changed already.
    """
    by_rows = _by_rows(sites)
    blocks = walk(
        program, list(by_rows), ctx, asked_by=asked_by, gram=True, cross=True, dense=True, grain="site",
        meant=meant, notes=report.notes,
    )  # fmt: skip
    for block in blocks:
        for value in block.values:
            for site in by_rows[value]:
                if not block.restored:
                    block.results |= _fitted(program, site, block.statistics[value], storage)
                _put(program, site, block.results)


def factor_as_published(
    program: Program,
    ctx: Context,
    sites: Sequence[Site],
    storage: Storage,
    method: Method,
    asked_by: str,
    report: Report,
) -> None:
    """Replaces every linear by what a published method makes of it in the model as it came."""
    by_rows = _by_rows(sites)
    if method == "svd":
        for site in ctx.track("factoring", sites):
            _put(program, site, _published(program, site, torch.eye(site.shape[1]), storage))
        return
    blocks = walk(
        program, list(by_rows), ctx, asked_by=asked_by, gram=method == "svd_llm", grain="site", changes=False,
        notes=report.notes,
    )  # fmt: skip
    made: Made = {}
    for block in blocks:
        for value in block.values:
            for site in by_rows[value]:
                if not block.restored:
                    statistics = block.statistics[value]
                    moments = statistics.absmean.diag() if method == "asvd" else statistics.gram
                    assert moments is not None
                    block.results |= _published(program, site, moments, storage)
        made |= block.results
    for site in sites:
        _put(program, site, made)


def _by_rows(sites: Sequence[Site]) -> dict[fx.Node, list[Site]]:
    found: dict[fx.Node, list[Site]] = {}
    for site in sites:
        found.setdefault(site.rows, []).append(site)
    return found


def _moments(statistics: SiteStatistics, *, centred: bool) -> Tensor:
    assert statistics.gram is not None
    gram, mean = statistics.gram.double(), statistics.mean.double()
    return gram - mean[:, None] * mean if centred else gram


def _fitted(program: Program, site: Site, statistics: SiteStatistics, storage: Storage) -> Made:
    """What stands for the linear, and what it does not reproduce of the original."""
    assert site.rank is not None
    old, rows, importance = site.load(), Paired.of(statistics, centred=site.has_bias), site.importance
    product = Product.of(rows.fit(old, old), rows.gram, importance, site.rank)
    bias = site.load_bias(program)
    bias = None if bias is None else bias + rows.shift(old, product.whole)
    made = as_weights(site, _form(product, bias, storage))
    weighed = (importance.weighed(weight) for weight in (old, product.whole))
    return made | {f"{site.name} {_MEASURED}": torch.tensor(rows.missing(*weighed))}


def _published(program: Program, site: Site, moments: Tensor, storage: Storage) -> Made:
    assert site.rank is not None
    product = Product.of(site.load(), moments, Importance(), site.rank)
    return as_weights(site, _form(product, site.load_bias(program), storage))


def _form(product: Product, bias: Tensor | None, storage: Storage) -> Factors | Pivoted:
    return Factors.of(product, bias) if storage == "factors" else Pivoted.of(product, bias)


def _put(program: Program, site: Site, made: Made) -> None:
    measured = made.get(f"{site.name} {_MEASURED}")
    site.measured = None if measured is None else float(measured)
    install(program, site, made)
