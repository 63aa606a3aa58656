"""Measures what a way to share a budget costs: the model is pruned so, on its statistics as it was, and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.statistics import SiteStatistics
from slim.compiler.statistics.batches import Batch
from slim.passes.pruning.budget import Counts
from slim.passes.pruning.obs import Order, removal_order
from slim.passes.pruning.refit import Moments, masked, refit
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
        self.moments = {site: Moments.of(statistics[site.value], site.bias is not None) for site in most}
        self.orders = {site: self._order(site, count) for site, count in most.items()}
        self.batches = _first(batches)
        self.expected = [_output(program, batch) for batch in self.batches]

    def _order(self, site: Site, count: int) -> Order | None:
        return removal_order(site.matrix(self.program), self.moments[site].now, site.columns, count) if count else None

    def loss(self, counts: Counts) -> float:
        """How far the output moves: nats a token of a language model, else the squared distance."""
        smaller = self.program.copy()
        for site, count in counts.items():
            order = self.orders[site]
            if count and order is not None:
                weight = site.matrix(self.program)
                kept = site.kept(order.units[:count])
                bias = None if site.bias is None else self.program.weights[site.bias]
                fitted = refit(weight, bias, self.moments[site], kept)
                smaller.weights[site.weight] = masked(fitted.weight, kept, self.program.weights[site.weight])
                if site.bias is not None and fitted.bias is not None and bias is not None:
                    smaller.weights[site.bias] = fitted.bias.to(bias.dtype).reshape(bias.shape)
        moved = [self._distance(e, _output(smaller, b)) for e, b in zip(self.expected, self.batches, strict=True)]
        return sum(moved) / len(moved)

    def _distance(self, before: Tensor, after: Tensor) -> float:
        if self.program.facts.kind == "causal_lm":
            return float(F.kl_div(after, before, log_target=True, reduction="batchmean"))
        return float((after - before).square().mean())


def _first(batches: Sequence[Batch]) -> list[Batch]:
    found: list[Batch] = []
    for batch in batches:
        if sum(one.inputs[0].numel() for one in found) >= TOKENS:
            break
        found.append(batch)
    return found


def _output(program: Program, batch: Batch) -> Tensor:
    """[rows, n], of a language model log-probabilities; rows of pad tokens left out."""
    output = program.run(*batch.inputs)[0].float()
    if batch.real is not None and output.shape[:2] == batch.real.shape:
        output = output[batch.real]
    rows = output.reshape(-1, output.shape[-1])
    return F.log_softmax(rows, -1) if program.facts.kind == "causal_lm" else rows
