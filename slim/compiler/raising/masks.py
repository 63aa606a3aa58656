"""Masks a model makes itself, of sizes and constants alone: evaluated, and asked what they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.program import Program

_LENGTH = 4096  # longer than any window that a model computes a mask for without a table
_HIDDEN = -1e4  # an additive mask hides what it lowers at least so far


def static_mask(program: Program, node: fx.Node) -> tuple[bool, int | None] | None:
    """(causal, window) of a mask that depends on no input's values, or None where it is no such mask.

    A boolean mask is True where a key is seen, an additive one 0 there. The mask is evaluated at one length, that of
    its table of constants where it has one, so that a window shows.
    """
    nodes = _subgraph(program, node)
    if nodes is None:
        return None
    seen = _evaluate(program, nodes, _length(program, nodes))
    if seen is None:
        return None
    rows, columns = seen.shape
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    window = int(seen[-1].sum())
    if rows != columns or not torch.equal(seen, (column <= row) & (row - column < window)):
        return None
    return True, None if window == rows else window


def _subgraph(program: Program, root: fx.Node) -> list[fx.Node] | None:
    """The nodes that ``root`` is computed from, in order; None where an input's values are among them."""
    needed: set[fx.Node] = set()
    pending = [root]
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        if node.op == "placeholder" or (node.op == "get_attr" and str(node.target) not in program.facts.constants):
            return None
        needed.add(node)
        if not _is_size(node):
            pending += node.all_input_nodes
    return [node for node in program.graph.nodes if node in needed]


def _is_size(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int


def _length(program: Program, nodes: list[fx.Node]) -> int:
    tables = [program.weights.shape(str(n.target)) for n in nodes if n.op == "get_attr"]
    squares = [shape[-1] for shape in tables if len(shape) >= 2 and shape[-1] == shape[-2]]
    return min(squares, default=_LENGTH)


def _evaluate(program: Program, nodes: list[fx.Node], length: int) -> Tensor | None:
    """The mask [length, length] as booleans, or None where it is something else."""
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if _is_size(node):
            values[node] = 1 if node.args[1] == 0 else length
        elif node.op == "get_attr":
            values[node] = program.weights[str(node.target)]
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
    mask = values[nodes[-1]]
    if not isinstance(mask, Tensor) or mask.numel() != length * length or list(mask.shape[-2:]) != [length, length]:
        return None
    mask = mask.reshape(length, length)
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point() or not bool(((mask == 0) | (mask <= _HIDDEN)).all()):
        return None
    return mask == 0
