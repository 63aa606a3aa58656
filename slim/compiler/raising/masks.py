"""Masks that a model computes itself: evaluated, and asked what they are."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.program import Program

_LENGTH = 4096  # longer than any window that a model computes a mask for without a table
_SHORT = 61  # a second length, to tell a window from a part of the length
HIDDEN = -1e3  # a score lowered so far is out of the softmax: exp(-1000) is 0 in any float type
_SAMPLE = [[1, 1, 0], [0, 1, 1]]  # of an input that is 1 at tokens and 0 at padding; B = 2, S = 3


def static_mask(program: Program, node: fx.Node, factor: float = 1.0) -> tuple[bool, int | None] | None:
    """(causal, window) of a mask that depends on no input's values, or None where it is no such mask.

    A boolean mask is True where a key is seen; an additive one, of which ``factor`` times is added, is 0 there. The
    mask is evaluated at two lengths, one of them that of its table of constants where it has one, so that a window
    shows.
    """
    return _band(program, node, functools.partial(_seen, factor=factor))


def static_gate(program: Program, node: fx.Node) -> tuple[bool, int | None] | None:
    """The same for a mask that scores are multiplied with: 1 where a key is seen, and 0 elsewhere."""
    return _band(program, node, _is_one)


def key_mask(program: Program, node: fx.Node, factor: float = 1.0) -> fx.Node | None:
    """The input [B, S] by which alone ``node`` [B, 1, 1, S] hides keys: those where it is 0."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4 or list(value.shape[1:3]) != [1, 1]:
        return None
    nodes = _subgraph(program, node, inputs=1)
    source = next((n for n in nodes or () if n.op == "placeholder"), None)
    if nodes is None or source is None or source.meta["val"].dim() != 2:
        return None
    sample = torch.tensor(_SAMPLE)
    seen = _seen(_evaluate(program, nodes, sample.shape, {source: sample.to(source.meta["val"].dtype)}), factor)
    if seen is None or list(seen.shape) != [2, 1, 1, 3] or not torch.equal(seen[:, 0, 0], sample.bool()):
        return None
    return source


def _band(program: Program, node: fx.Node, seen: Any) -> tuple[bool, int | None] | None:
    nodes = _subgraph(program, node)
    if nodes is None or not _of_one_length(nodes):
        return None
    longest = _length(program, nodes)
    lengths = min(_SHORT, longest), longest
    at = {length: _square(seen(_evaluate(program, nodes, (1, length))), length) for length in lengths}
    table = at[longest]
    if table is None or not bool(table.any()):
        return None
    window = int(table[-1].sum())
    for length, mask in at.items():
        row, column = torch.arange(length)[:, None], torch.arange(length)[None, :]
        if mask is None or not torch.equal(mask, (column <= row) & (row - column < window)):
            return None
    return True, None if window == longest else window


def _square(mask: Tensor | None, length: int) -> Tensor | None:
    """[length, length] of a mask that is the same for every batch and head; None for another."""
    if mask is None or mask.numel() == 0 or list(mask.shape[-2:]) != [length, length]:
        return None
    first, *rest = mask.reshape(-1, length, length)
    return first if all(torch.equal(first, other) for other in rest) else None


def _seen(mask: Any, factor: float) -> Tensor | None:
    if not isinstance(mask, Tensor):
        return None
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point() or not bool(((mask == 0) | (mask * factor <= HIDDEN)).all()):
        return None
    return mask == 0


def _is_one(mask: Any) -> Tensor | None:
    if not isinstance(mask, Tensor) or mask.dtype == torch.bool or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    return mask == 1


def _subgraph(program: Program, root: fx.Node, inputs: int = 0) -> list[fx.Node] | None:
    """The nodes that ``root`` is computed from, in order; None where more than ``inputs`` inputs' values are."""
    needed: set[fx.Node] = set()
    pending = [root]
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        inputs -= node.op == "placeholder"
        if inputs < 0 or (node.op == "get_attr" and str(node.target) not in program.facts.constants):
            return None
        needed.add(node)
        if not _is_size(node):
            pending += node.all_input_nodes
    return [node for node in program.graph.nodes if node in needed]


def _is_size(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int


def _of_one_length(nodes: list[fx.Node]) -> bool:
    """Whether the sizes that are read behind the first two dimensions of an input, if any, are one with all others."""
    lengths = [node for node in nodes if _is_size(node) and node.args[1] != 0]
    behind = any(node.args[1] != 1 for node in lengths)
    return not behind or len({str(node.meta["val"]) for node in lengths}) == 1


def _length(program: Program, nodes: list[fx.Node]) -> int:
    tables = [program.weights.shape(str(n.target)) for n in nodes if n.op == "get_attr"]
    squares = [shape[-1] for shape in tables if len(shape) >= 2 and shape[-1] == shape[-2] > 1]
    return min(squares, default=_LENGTH)


def _evaluate(
    program: Program, nodes: list[fx.Node], sizes: tuple[int, ...], inputs: dict[fx.Node, Tensor] | None = None
) -> Any:
    """The value of the last node for inputs of ``sizes`` [B, S], S standing for what is behind the first dimension."""
    values: dict[fx.Node, Any] = dict(inputs or {})
    for node in nodes:
        if _is_size(node):
            values[node] = sizes[node.args[1] != 0]
        elif node.op == "get_attr":
            values[node] = program.weights[str(node.target)]
        elif node.op != "placeholder":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
    return values[nodes[-1]]
