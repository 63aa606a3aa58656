"""Models whose linears are pairs of low rank, random ones: for tests and measurements of what runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from slim.compiler.passes_base import FLOAT_WEIGHTS, Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report
from slim.compiler.uses import LINEAR

aten = torch.ops.aten


@dataclass(frozen=True)
class RandomPairs(Pass):
    """Puts pairs that hold ``keep`` of a linear's numbers in its place, for all linears but the head.

    How fast a pair is does not hang on what it computes: pivots are rows of the weight, all else is random.
    """

    keep: float
    storage: Literal["pivot", "factors"] = "pivot"
    multiple: int = 32  # of ranks: what groups of weights and of kernels divide

    requires = frozenset({FLOAT_WEIGHTS})

    def run(self, program: Program, ctx: Context) -> Report:
        report = Report()
        for node in list(program.nodes(LINEAR)):
            weight = str(node.args[1].target)  # type: ignore[union-attr]
            if "head" not in weight:
                factor(program, node, self.rank(*program.weights.shape(weight)), self.storage)
                report.matched.append(weight)
        program.clean()
        return report

    def rank(self, m: int, n: int) -> int:
        """The rank at which a pair holds ``keep`` of m n numbers."""
        both, all_ = m + n, self.keep * m * n
        rank = all_ / both if self.storage == "factors" else (both - (both**2 - 4 * all_) ** 0.5) / 2
        return max(1, int(rank) // self.multiple * self.multiple)


def factor(program: Program, node: fx.Node, rank: int, storage: str = "pivot") -> None:
    """Puts a pair of rank ``rank`` in the place of one linear."""
    name = str(node.args[1].target).removesuffix("weight").rstrip(".")  # type: ignore[union-attr]
    weight, bias = (None if arg is None else program.weights[str(arg.target)] for arg in (*node.args[1:], None)[:2])  # type: ignore[union-attr]
    assert weight is not None
    m = weight.shape[0]
    random = torch.Generator().manual_seed(m + rank)
    places = torch.randperm(m, generator=random)
    chosen, others = places[:rank], places[rank:]
    wide = torch.randn(m - rank if storage == "pivot" else m, rank, generator=random) * rank**-0.5

    def linear(x: object, part: str, weight: Tensor, bias: Tensor | None) -> fx.Node:
        held = {f"{name}_{part}": weight, f"{name}_{part}_bias": bias}
        program.weights.update({key: value.contiguous() for key, value in held.items() if value is not None})
        arguments = [program.weight_node(key) for key, value in held.items() if value is not None]
        return program.insert(node, LINEAR, x, *arguments, like=node)

    if storage == "factors":
        inner = linear(node.args[0], "inner", weight[chosen], None)
        result = linear(inner, "outer", wide.to(weight.dtype), bias)
    else:
        pivots = linear(node.args[0], "pivots", weight[chosen], None if bias is None else bias[chosen])
        rest = linear(pivots, "rest", wide.to(weight.dtype), None if bias is None else bias[others])
        both = program.insert(node, aten.cat.default, [pivots, rest], -1, like=node)
        program.weights[f"{name}_order"] = torch.argsort(places)
        order = program.weight_node(f"{name}_order")
        result = program.insert(node, aten.index_select.default, both, -1, order, like=node)
    node.replace_all_uses_with(result)
    program.graph.erase_node(node)


__all__ = ["RandomPairs", "factor"]
