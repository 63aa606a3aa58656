"""Constants: what depends on no input and no parameter is computed once, now."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.program import Program

_LARGEST = 1 << 22  # elements; a larger constant is cheaper to compute than to keep


def fold_constants(program: Program) -> None:
    """Replaces subgraphs of literals and lifted constants by one constant each."""
    known: dict[fx.Node, Any] = {}
    for node in list(program.graph.nodes):
        if _foldable(program, node, known):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
            known[node] = node.target(*args, **kwargs)
        elif node.op == "get_attr" and _is_scalar_constant(program, str(node.target)):
            known[node] = program.weights[str(node.target)]
    for node, value in known.items():
        if node.op == "call_function" and isinstance(value, Tensor) and any(user not in known for user in node.users):
            _keep(program, node, value)
    program.clean()


def _is_scalar_constant(program: Program, name: str) -> bool:
    held = name in program.facts.constants and not program.weights.is_deferred(name)
    return held and program.weights.numel(name) == 1


def _foldable(program: Program, node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    if node.op != "call_function" or any(argument not in known for argument in node.all_input_nodes):
        return False
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
    return all(_is_small(value) for value in values)


def _is_small(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    return not any(isinstance(n, torch.SymInt) for n in value.shape) and math.prod(value.shape) <= _LARGEST


def _keep(program: Program, node: fx.Node, value: Tensor) -> None:
    name = f"constants.{node.name}"
    program.weights[name] = value.contiguous()
    program.facts.constants.add(name)
    program.weights.masks.add(name)
    constant = program.weight_node(name)
    node.replace_all_uses_with(constant, propagate_meta=False)
