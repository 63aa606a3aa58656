"""ALiBi: a bias of one slope a head times the key's position (Press et al., 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from slim.compiler.program import Program
from slim.compiler.rules import NearMiss

aten = torch.ops.aten

_VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.clone.default,
        aten._to_copy.default,
        aten.slice.Tensor,
    }
)


def alibi_slopes(program: Program, bias: fx.Node, factor: float) -> fx.Node | None:
    """The slopes [H] of ``factor * bias`` if it is slopes x positions in float32, else None.

    Positions may be counted by an arange or by a running sum of the attention mask: a row of scores may be shifted
    by a constant, so both give the softmax that distances give.
    """
    node = _source(bias)
    name, slopes = program.weight_of(node), None
    if name is not None:
        slopes = _table_slopes(program, name)
    elif node.target is aten.mul.Tensor and node.meta["val"].dtype == torch.float32:
        for factors, positions in (node.args[:2], node.args[1::-1]):
            name = program.weight_of(_source(factors))
            if name is not None and _counts_keys(positions):
                slopes = _flat(program, name)
                break  # the name is that of the slopes
    if slopes is None:
        return None
    return _constant(program, f"{name}_slopes" + f"_{factor:g}" * (factor != 1.0), slopes * factor)


def by_head(program: Program, slopes: fx.Node | None, heads: int) -> fx.Node | None:
    """Slopes that a batch of fixed size repeats for each row, once.

    Raises:
        NearMiss: where they are no such repetition.
    """
    name = None if slopes is None else program.weight_of(slopes)
    if name is None or program.weights.numel(name) == heads:
        return slopes
    once, *others = program.weights[name].split(heads)
    if not all(torch.equal(once, other) for other in others):
        raise NearMiss(f"its ALiBi has {program.weights.numel(name)} slopes, and there are {heads} heads")
    return _constant(program, f"{name}_by_head", once.clone())


def _table_slopes(program: Program, name: str) -> torch.Tensor | None:
    """The slopes of a constant table [H, 1, M] that rises evenly with the key's position."""
    shape = program.weights.shape(name)
    if name not in program.facts.constants or len(shape) != 3 or shape[1] != 1 or shape[2] < 2:
        return None
    table = program.weights[name].float()[:, 0]
    slopes = (table[:, -1] - table[:, 0]) / (shape[2] - 1)
    steps = torch.arange(shape[2]) - (shape[2] - 1)
    even = torch.allclose(table, table[:, -1:] + slopes[:, None] * steps, rtol=1e-5, atol=1e-6)
    return slopes if even else None


def _flat(program: Program, name: str) -> torch.Tensor | None:
    """One number a head, however the constant is laid out to be multiplied with positions."""
    if name not in program.facts.constants or max(program.weights.shape(name)) != program.weights.numel(name):
        return None
    return program.weights[name].flatten()


def _constant(program: Program, name: str, value: torch.Tensor) -> fx.Node:
    program.weights[name] = value
    program.facts.constants.add(name)
    return program.weight_node(name)


def _source(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        node = node.args[0]
    return node


def _counts_keys(node: Any) -> bool:
    """(cumsum(mask) - 1) * mask, or an arange, or minus the distance to the end."""
    node = _source(node)
    if not isinstance(node, fx.Node):
        return False
    if node.target in (aten.arange.start_step, aten.arange.default, aten.arange.start, aten.cumsum.default):
        return True
    if node.target in (aten.mul.Tensor, aten.sub.Tensor, aten.add.Tensor):
        return _counts_keys(node.args[0]) or _counts_keys(node.args[1])
    return False
