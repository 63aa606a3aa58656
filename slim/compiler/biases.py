"""Biases for linears that had none."""

from __future__ import annotations

from torch import Tensor, fx

from slim.compiler.program import Program


def new_bias(program: Program, matrix: fx.Node, value: Tensor) -> fx.Node:
    """A bias for linears over ``matrix``, named as the model would have named it; the caller makes them read it."""
    weight = str(matrix.target)
    name = f"{weight.removesuffix('.weight')}.bias" if weight.endswith(".weight") else f"{weight}_bias"
    if name not in program.facts.added:
        program.weights[name] = value
        program.facts.added.append(name)
    return program.weight_node(name)
