"""Sizes: every symbolic dimension is read off the first input that has it, and known sizes become numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from slim.compiler.program import Program

aten = torch.ops.aten


def canonical_sizes(program: Program) -> None:
    """Rewrites sizes so that one node stands for each of B, S...: cached decoding binds S to the new tokens only."""
    nodes: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            continue
        if isinstance(value, int):
            _replace_by_number(node, value)
        elif value.node.expr.is_Symbol:
            key = value.node.expr
            if key not in nodes:
                nodes[key] = _size_of_input(program, key)
            if node is not nodes[key]:
                node.replace_all_uses_with(nodes[key], propagate_meta=False)
        elif value.node.expr.is_Integer:
            _replace_by_number(node, int(value.node.expr))
    program.clean()


def _replace_by_number(node: fx.Node, number: int) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: number if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: number if n is node else n)


def _size_of_input(program: Program, symbol: Any) -> fx.Node:
    placeholders = program.graph.find_nodes(op="placeholder")
    for placeholder in placeholders:
        for axis, size in enumerate(placeholder.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                with program.graph.inserting_after(placeholders[-1]):
                    node = program.graph.call_function(aten.sym_size.int, (placeholder, axis))
                node.name = f"size_{program.dims[symbol]}"
                node.meta["val"] = program.typer.value(node, program.weights)
                return node
    raise LookupError(f"no input has the dimension {symbol}")
