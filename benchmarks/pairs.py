"""Programs whose linears are pairs of low rank, random ones: for tests and measurements of what runs them."""

from __future__ import annotations

import torch
from torch import fx

from slim.compiler.program import Program
from slim.compiler.uses import LINEAR

aten = torch.ops.aten


def pairs(program: Program, keep: float, storage: str = "pivot", multiple: int = 8) -> int:
    """Replaces every linear but the head's by a pair of random ones that hold ``keep`` of its numbers; how many."""
    linears = [node for node in program.nodes(LINEAR) if "lm_head" not in str(node.args[1])]
    for node in linears:
        m, n = program.weights.shape(str(node.args[1].target))
        factor(program, node, rank_of(m, n, keep, storage, multiple), storage)
    program.clean()
    return len(linears)


def rank_of(m: int, n: int, keep: float, storage: str, multiple: int = 8) -> int:
    """The rank at which a pair holds ``keep`` of m n numbers."""
    both = m + n
    rank = keep * m * n / both if storage == "factors" else (both - (both**2 - 4 * keep * m * n) ** 0.5) / 2
    return max(1, int(rank) // multiple * multiple)


def factor(program: Program, node: fx.Node, rank: int, storage: str = "pivot") -> None:
    """One linear by a pair: its pivots are rows of its weight."""
    name = str(node.args[1].target).removesuffix(".weight")  # type: ignore[union-attr]
    weight = program.weights[f"{name}.weight"].detach()
    m = weight.shape[0]
    bias = program.weights[str(node.args[2].target)].detach() if len(node.args) > 2 and node.args[2] else None
    random = torch.Generator().manual_seed(m + rank)
    places = torch.randperm(m, generator=random)
    rest = (torch.randn(m - rank if storage == "pivot" else m, rank, generator=random) * rank**-0.5).to(weight.dtype)

    def linear(x: object, weight: torch.Tensor, bias: torch.Tensor | None, part: str) -> fx.Node:
        held = {f"{name}_{part}": weight, f"{name}_{part}_bias": bias}
        program.weights.update({key: value.contiguous() for key, value in held.items() if value is not None})
        arguments = [program.weight_node(key) for key, value in held.items() if value is not None]
        return program.insert(node, LINEAR, x, *arguments, like=node)

    if storage == "factors":
        inner = linear(node.args[0], weight[places[:rank]], None, "inner")
        result = linear(inner, rest, bias, "outer")
    else:
        chosen, others = places[:rank], places[rank:]
        pivots = linear(node.args[0], weight[chosen], None if bias is None else bias[chosen], "pivots")
        made = linear(pivots, rest, None if bias is None else bias[others], "rest")
        both = program.insert(node, aten.cat.default, [pivots, made], -1, like=node)
        program.weights[f"{name}_order"] = torch.argsort(places)
        result = program.insert(
            node, aten.index_select.default, both, -1, program.weight_node(f"{name}_order"), like=node
        )
    node.replace_all_uses_with(result)
    program.graph.erase_node(node)
