"""Measures what a way to share a budget costs: the model is pruned so, on its statistics as it was, and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from slim.compiler.objective import Objective
from slim.compiler.program import Program
from slim.compiler.statistics import SiteStatistics
from slim.compiler.statistics.batches import Batch, first_batches
from slim.compiler.statistics.paired import Paired
from slim.passes.pruning.budget import Counts
from slim.passes.pruning.obs import Order, removal_order
from slim.passes.pruning.refit import masked, refit
from slim.passes.pruning.sites import Site

TOKENS = 4096  # that candidates are compared on


class Comparison:
    """Candidates, each fitted layer by layer on what the model as it was gives; none sees what became of another."""

    def __init__(
        self,
        program: Program,
        statistics: Mapping[fx.Node, SiteStatistics],
        batches: Sequence[Batch],
        most: Counts,
    ) -> None:
        self.program = program
        self.paired = {site: Paired.of(statistics[site.value], centred=site.fitted_bias is not None) for site in most}
        self.orders = {site: self._order(site, count) for site, count in most.items()}
        self.objective = Objective.of(program)
        self.batches = first_batches(batches, TOKENS)
        self.expected = [program.run(*batch.inputs) for batch in self.batches]

    def _order(self, site: Site, count: int) -> Order | None:
        return removal_order(site.matrix(self.program), self.paired[site].gram, site.columns, count) if count else None

    def loss(self, counts: Counts) -> float:
        """How far the output moves: nats a token of a language model, else its relative square."""
        smaller = self.program.copy()
        for site, count in counts.items():
            order = self.orders[site]
            if count and order is not None:
                weight = site.matrix(self.program)
                kept = site.kept(order.units[:count])
                name = site.fitted_bias
                bias = None if name is None else self.program.weights[name]
                fitted = refit(weight, bias, self.paired[site], kept)
                smaller.weights[site.weight] = masked(fitted.weight, kept, self.program.weights[site.weight])
                if name is not None and fitted.bias is not None and bias is not None:
                    smaller.weights[name] = fitted.bias.to(bias.dtype)
        pairs = zip(self.batches, self.expected, strict=True)
        moved = [float(self.objective.loss(smaller.run(*batch.inputs), wanted, batch)) for batch, wanted in pairs]
        return sum(moved) / len(moved)
