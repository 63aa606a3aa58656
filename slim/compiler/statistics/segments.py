"""Cuts a graph into stretches that can be run one after the other over many batches.

Between two stretches all batches' values are kept that a later one reads, so cuts are where those are few: between the
blocks of a transformer it is the residual stream. What costs next to nothing to compute (masks, positions, rotary
tables) is not kept and is computed again in each stretch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.types import SIZE_OPS
from slim.compiler.uses import ATTENTION, EMBEDDING, EXPERTS, LINEAR, RESTORING

Grain = Literal["block", "site"]

_COSTLY = frozenset({LINEAR, EXPERTS, EMBEDDING, *ATTENTION})
_SMALL = 1 << 16  # numbers of a weight that may be behind a value that is computed again
_SITES = 4  # linears' inputs in a stretch, where there is no attention to go by


def readers(value: fx.Node) -> list[fx.Node]:
    """The linears whose rows ``value`` is."""
    return [user for user in value.users if user.target in (LINEAR, EXPERTS) and user.args[0] is value]


def named(value: fx.Node) -> str:
    """A site, by the weights that its rows are multiplied with."""
    names = [str(weight.target) for reader in readers(value) for weight in _stored(reader.args[1])]
    return names[0] if names else value.name


def _stored(node: Any) -> list[fx.Node]:
    if not isinstance(node, fx.Node):
        return []
    return [node] if node.op == "get_attr" else [w for n in node.all_input_nodes[:1] for w in _stored(n)]


class Kinds:
    """Which nodes are the same for all batches, and which are cheap to compute again."""

    def __init__(self, program: Program) -> None:
        self.constant: set[fx.Node] = set()
        self.cheap: set[fx.Node] = set()
        for node in program.graph.nodes:
            sources = node.all_input_nodes
            computed = node.op == "call_function" and bool(sources)
            if node.op == "get_attr" or (computed and all(n in self.constant for n in sources)):
                self.constant.add(node)
            elif node.op == "placeholder" or (node.op == "call_function" and self._is_cheap(node)):
                self.cheap.add(node)

    def _is_cheap(self, node: fx.Node) -> bool:
        if node.target in _COSTLY or node.target in RESTORING:
            return False
        return all(n in self.cheap or (n in self.constant and _is_small(n)) for n in node.all_input_nodes)


def _is_small(node: fx.Node) -> bool:
    value = node.meta["val"]
    return not isinstance(value, Tensor) or value.numel() <= _SMALL


def cuts(program: Program, sites: Sequence[Sequence[fx.Node]], grain: Grain = "block") -> list[fx.Node]:
    """The nodes that a stretch begins with, but for the first stretch, in order.

    Args:
        sites: of each the linears that are never cut apart: those that read it, and what else its stretch begins with.
        grain: "block": a stretch for each attention layer with what follows it, or for every four sites. "site": one
            for each site.
    """
    nodes = list(program.nodes())
    place = {node: index for index, node in enumerate(nodes)}
    places = [[place[linear] for linear in linears] for linears in sites if linears]
    spans = sorted((min(each), max(each)) for each in places)
    if grain == "site":
        return [nodes[first] for first in dict.fromkeys(first for first, _ in spans[1:])]
    marks = [place[node] for node in program.attention_nodes()]
    latest = len(marks) > 1  # of equals: an attention layer's stretch ends where the next one's begins
    if not latest:
        marks = [last for _, last in spans][_SITES - 1 :: _SITES]
        marks = marks if marks and marks[-1] == spans[-1][1] else [*marks, len(nodes)]
    sizes = _alive(program, nodes, place)
    found = []
    for before, after in itertools.pairwise(marks):
        allowed = [i for i in range(before + 1, min(after, len(nodes) - 1) + 1) if not _inside(i, spans)]
        if allowed:
            found.append(nodes[min(allowed, key=lambda i: (sizes[i], -i if latest else i))])
    return found


def _inside(index: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(first < index <= last for first, last in spans)


def _alive(program: Program, nodes: Sequence[fx.Node], place: dict[fx.Node, int]) -> list[int]:
    """For each node, the numbers that are kept where a stretch begins with it."""
    kinds = Kinds(program)
    change = [0] * (len(nodes) + 1)
    for node in nodes:
        if node in kinds.cheap or node in kinds.constant:
            continue
        last = max((place.get(user, len(nodes) - 1) for user in node.users), default=place[node])
        change[place[node] + 1] += _numbers(node)
        change[last + 1] -= _numbers(node)
    return list(itertools.accumulate(change))[: len(nodes)]


def _numbers(node: fx.Node) -> int:
    """Elements of a value, at the sizes its symbols stand for in types."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return math.prod(_hint(size) for size in value.shape)
    if isinstance(value, (tuple, list)) or node.target in SIZE_OPS:
        return 0  # its parts are counted where they are taken out
    return 1


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)
