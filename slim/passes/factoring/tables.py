"""Tables of embeddings in lower rank: rows of r numbers, and the matrix that makes whole rows of them.

A table E [V, n] is a linear W = E^T [n, V] over rows that are 1 at one place: their second moments are how often each
place is 1. Where the table is the head as well, an error of a row costs by what the head reads too, and both share one
low rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.passes_base import Context
from slim.compiler.program import Program, Streaming
from slim.compiler.report import Report
from slim.compiler.statistics import calibration_of, collect, site_values
from slim.compiler.statistics.batches import Batch, first_batches
from slim.compiler.statistics.gradients import TOKENS
from slim.compiler.uses import EMBEDDING, LINEAR
from slim.passes.factoring.directions import Importance, Product, losses
from slim.passes.factoring.sites import Table
from slim.passes.factoring.write import become

_UNSEEN = 0.01  # of all rows that are looked up, those that calibration does not show: at least


def weigh(
    program: Program, ctx: Context, tables: Sequence[Table], moments: dict[fx.Node, Tensor], asked_by: str
) -> None:
    """Gives every table how much errors of its rows cost, and what each rank would lose.

    An error e of row v, as it is looked up, costs p_v e^T E[g g^T] e. As it is a head's, it costs
    E[g_v^2] e^T E[h h^T] e. The sum of both is taken as a weight of the row times a matrix of all rows, which has no
    more than two such terms to be exact for.

    Args:
        moments: of gradients by the results of lookups and heads (``output_moments``).
    """
    counts = _counts(program, ctx, tables, asked_by)
    heads = [head for table in tables for head in table.heads]
    seen = collect(program, site_values(heads), ctx, asked_by=asked_by, gram=True)
    for table in tables:
        terms = [(_often(counts[node]), moments[node].double()) for node in table.lookups]
        for head in table.heads:
            gram, by_row = seen[head.args[0]].gram, moments[head].double()  # type: ignore[index]
            assert gram is not None
            terms.append((by_row if by_row.dim() == 1 else by_row.diagonal(), gram.double()))
        terms = [(rows, whole if whole.dim() == 2 else whole.diag()) for rows, whole in terms]
        table.often = torch.stack([rows * whole.trace() for rows, whole in terms]).sum(0)
        total = table.often.sum().clamp_min(torch.finfo(torch.float64).tiny)
        by_direction = torch.stack([rows.sum() * whole for rows, whole in terms]).sum(0) / total
        table.linears[0].importance = Importance((by_direction,))
        table.lost = losses(table.load(), table.often, table.importance)


class _Ids(Streaming):
    """Runs a Program and keeps which rows some lookups pick."""

    def __init__(self, program: Program, lookups: Sequence[fx.Node]) -> None:
        super().__init__(program)
        self._lookups = {lookup.args[1]: lookup for lookup in lookups}
        self.found: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._lookups:
            self.found[n] = value
        return value


def _counts(program: Program, ctx: Context, tables: Sequence[Table], asked_by: str) -> dict[fx.Node, Tensor]:
    """Lookup -> how often it picks each row, [V]."""
    lookups = {lookup: table for table in tables for lookup in table.lookups}
    counts = {lookup: torch.zeros(table.shape[1], dtype=torch.float64) for lookup, table in lookups.items()}
    batches = first_batches(calibration_of(program, ctx, asked_by).batches, TOKENS)
    for batch in ctx.track(f"{asked_by}: rows of tables", batches):
        run = _Ids(program, list(lookups))
        with torch.no_grad():
            run.run(*batch.inputs)
        for lookup, total in counts.items():
            ids = _real(run.found[lookup.args[1]], batch)  # type: ignore[index]
            total += torch.bincount(ids, minlength=len(total))
    return counts


def _real(ids: Tensor, batch: Batch) -> Tensor:
    """Without those of pad tokens."""
    real = batch.real is not None and batch.real.shape == ids.shape
    return (ids[batch.real] if real else ids).flatten()


def _often(counts: Tensor) -> Tensor:
    """How often each row will be looked up, in sum 1, once rows that calibration does not show have their share too.

    As many lookups are of unseen rows as were of rows seen once. Source: Good, The population frequencies of species
    and the estimation of population parameters, 1953.
    """
    total = counts.sum().clamp_min(1.0)
    unseen = (float((counts == 1).sum()) / total).clamp(_UNSEEN, 1.0)
    return (1.0 - unseen) * counts / total + unseen / len(counts)


def factor_tables(program: Program, tables: Sequence[Table], report: Report) -> None:
    """Replaces tables that have a rank; the nodes of lookups and heads stay, as the last of what stands for them."""
    for table in tables:
        assert table.rank is not None
        name, dtype = table.name, table.dtype
        product = Product.of(table.load(), table.often, table.importance, table.rank)
        program.weights[f"{name}_rows"] = product.inner.T.to(dtype).contiguous()
        program.weights[f"{name}_widen"] = product.outer.to(dtype).contiguous()
        if table.heads:
            program.weights[f"{name}_narrow"] = product.outer.T.to(dtype).contiguous()
        for lookup in table.lookups:
            args = program.weight_node(f"{name}_rows"), *lookup.args[1:]
            rows = program.insert(lookup, EMBEDDING, *args, like=lookup, **lookup.kwargs)
            become(program, lookup, LINEAR, (rows, program.weight_node(f"{name}_widen")))
        for head in table.heads:
            narrow = program.insert(head, LINEAR, head.args[0], program.weight_node(f"{name}_narrow"), like=head)
            become(program, head, LINEAR, (narrow, program.weight_node(f"{name}_rows"), *head.args[2:]))
        if table.heads:
            report.notes.append(f"{name} is embedding and head at once, and both read the same rows of lower rank")
