"""What the experts of a mixture add to the stream: those that add least are missed least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.passes_base import Context
from slim.compiler.program import Program, Streaming
from slim.compiler.rules import argument
from slim.compiler.statistics.batches import Batch, first_batches
from slim.compiler.types import expression
from slim.passes.pruning.sites import Site

TOKENS = 16_384  # of the calibration data, at most


def saliency(program: Program, batches: Sequence[Batch], sites: Sequence[Site], ctx: Context) -> dict[Site, Tensor]:
    """[experts]: the sum over tokens of |g f(x)|^2, g the weight that the router gives the expert and f(x) its result.

    Source: Lasby et al., REAP, 2025, here with the square, which is what the layer's result loses without the expert.
    """
    weighing = _Weighing(program, sites)
    with torch.no_grad():
        for batch in ctx.track("weighing experts", first_batches(batches, TOKENS)):
            weighing.run(*batch.inputs)
    return weighing.totals


class _Weighing(Streaming):
    def __init__(self, program: Program, sites: Sequence[Site]) -> None:
        super().__init__(program)
        self.totals = {site: torch.zeros(site.units) for site in sites}
        self._linears = {site.linear: site for site in sites}
        self._weighed = {weighed(program, site.linear): site for site in sites}
        self._experts = dict[Site, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._linears:
            chosen = argument(n, "expert")
            self._experts[self._linears[n]] = self.env[chosen]
        if n in self._weighed:
            site = self._weighed[n]
            asked = self._experts.pop(site)
            energy = value.float().reshape(len(asked), -1).square().sum(1)
            self.totals[site].index_add_(0, asked.cpu(), energy.cpu())
        return value


def weighed(program: Program, linear: fx.Node) -> fx.Node:
    """What experts put out once the router's weights are multiplied in: the last value of as many numbers."""

    def numbers(node: fx.Node) -> Any:
        value = node.meta["val"]
        shape = value.shape if isinstance(value, Tensor) else (0,)
        total: Any = 1
        for size in shape:
            total = total * expression(size, program.dims)
        return total

    while len(linear.users) == 1 and numbers(follower := next(iter(linear.users))) == numbers(linear):
        linear = follower
    return linear
