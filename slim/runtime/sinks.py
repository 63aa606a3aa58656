"""Queries as sinks see them: over a window that moves on, sinks stay as near as they are in a text of that length.

A model knows no distance beyond those it was trained on. What is left of a long text, sinks and a window, is read as if
it were the whole of it (Xiao et al. 2023, StreamingLLM): to the sinks, token t stands at min(t, window + sinks - 1).
Keys are held rotated, so it is the query that is rotated once more, for them alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from slim.compiler.program import Program
from slim.compiler.rounded_kv import rounded, shifted
from slim.compiler.rules import argument
from slim.compiler.uses import ATTENTION, LINEAR

aten, slim = torch.ops.aten, torch.ops.slim

_POSITIONS = "position_ids"


def objection(node: fx.Node) -> str | None:
    """Why attention cannot see sinks nearer than they are; None where it can, or knows no positions."""
    q, key = argument(node, "q"), rounded(argument(node, "k"))
    if not _depends(q, {}):
        return None
    if q.target is not slim.rope.default:
        return "knows positions by more than a rotation of its queries, so sinks cannot be kept near; leave out sinks"
    if key is not None and shifted(key.x)[1] is not None:
        return "takes a mean off its keys, which is right for one rotation of the queries alone; leave out sinks"
    return None


def _depends(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether ``node`` is made of positions by more than the linears and attentions before it."""
    if node not in known:
        ends = node.op != "call_function" or node.target in ATTENTION or node.target is LINEAR
        known[node] = (
            node.op == "placeholder" and node.target == _POSITIONS
            if ends
            else any(_depends(source, known) for source in node.all_input_nodes)
        )
    return known[node]


class Nearer:
    """Rotates queries as if no token stood beyond ``last``; layers share the angles."""

    def __init__(self, program: Program, last: int) -> None:
        self.program, self.last = program, last
        self._copies: dict[fx.Node, fx.Node] = {}
        self._known: dict[fx.Node, bool] = {}

    def queries(self, reader: fx.Node, q: fx.Node) -> fx.Node | None:
        """``q``, which ``reader`` looks with, as sinks see it; None where it knows no positions."""
        if not _depends(q, self._known):
            return None
        x, cos, sin = q.args[:3]
        return self.program.insert(reader, slim.rope.default, x, self._copy(cos), self._copy(sin), like=q, **q.kwargs)

    def _copy(self, node: Any) -> Any:
        """``node`` as it would be at nearer positions."""
        if not isinstance(node, fx.Node) or not _depends(node, self._known):
            return node
        if node not in self._copies:
            self._copies[node] = self._nearest(node) if node.op == "placeholder" else self._again(node)
        return self._copies[node]

    def _nearest(self, positions: fx.Node) -> fx.Node:
        first = next(node for node in self.program.graph.nodes if node.op != "placeholder")
        return self.program.insert(first, aten.clamp.default, positions, None, self.last, like=positions)

    def _again(self, node: fx.Node) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._copy)
        target: Any = node.target
        return self.program.insert(node.next, target, *args, like=node, **kwargs)
