"""A Program as a networkx graph, for those who want its algorithms or its drawings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networkx
import torch
from torch import fx

from slim.compiler.program import Program
from slim.compiler.text import target_name
from slim.compiler.types import SHORT, show_dim


def to_networkx(program: Program) -> networkx.MultiDiGraph:
    """A node for each input, weight, operation and the output; an edge from each value to what reads it.

    Nodes are called as in the IR; a weight's node has its name in ``weight``. Their attributes:
        kind: "input", "weight", "operation" or "output".
        op: of operations, "aten.linear.default".
        dtype, shape: of tensors: "f32", and a tuple of numbers and names of symbolic sizes.
        weight, nbytes: of weights: the name and the bytes.
        module, where: of operations: the module's path and file:line of the model's source, where known.
    Edges have ``argument``: the name of the parameter they enter by, or its number where it has no name.

    Example:
        >>> graph = program.to_networkx()
        >>> len(networkx.dag_longest_path(graph))
    """
    graph = networkx.MultiDiGraph(architecture=program.facts.architecture)
    for node in program.graph.nodes:
        graph.add_node(node.name, **_attributes(program, node))
        for argument, source in _sources(node):
            graph.add_edge(source.name, node.name, argument=argument)
    return graph


def _attributes(program: Program, node: fx.Node) -> dict[str, Any]:
    kinds = {"placeholder": "input", "get_attr": "weight", "call_function": "operation", "output": "output"}
    found: dict[str, Any] = {"kind": kinds[node.op]}
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        sizes = (show_dim(size, program.dims) for size in value.shape)
        found |= {"dtype": SHORT[value.dtype], "shape": tuple(int(s) if s.isdigit() else s for s in sizes)}
    if node.op == "get_attr":
        found |= {"weight": str(node.target), "nbytes": program.weights.nbytes(str(node.target))}
    if node.op == "call_function":
        found["op"] = target_name(node.target)
        found |= {key: node.meta[key] for key in ("module", "where") if key in node.meta}
    return found


def _sources(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """(parameter, the node it is given) for every node among the arguments."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    for position, value in enumerate(node.args):
        name = names[position] if position < len(names) else str(position)
        yield from ((name, source) for source in _nodes(value))
    for name, value in node.kwargs.items():
        yield from ((name, source) for source in _nodes(value))


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _nodes(item)
