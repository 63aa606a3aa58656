"""Runs a Program so that gradients reach what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.passes_base import Context
from slim.compiler.program import Program, Streaming
from slim.compiler.uses import DEQUANTIZE, LINEAR
from slim.passes.healing.trained import Product, Trained

_QUANTIZE = torch.ops.slim.quantize.default


class Student(Streaming):
    """The Program with everything in ``trained`` as it is at the moment."""

    def __init__(self, program: Program, trained: Sequence[Trained]) -> None:
        super().__init__(program)
        self.garbage_collect_values = False  # the backward pass holds them anyway
        self.weights = program.weights.copy()
        self.weights.materialise()  # or every step would read from disk what no pass changed
        self.program, self.trained = program, list(trained)
        self._beside = {each.name: each for each in trained if isinstance(each, Product)}
        self._values: dict[str, Tensor] = {}

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for part in self.split for parameter in part]

    @property
    def split(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that are whole matrices of linears, and all others."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for each in self.trained:
            found[not each.is_matrix].extend(each.parameters)
        return found

    def outputs(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """The flat outputs; differentiable where gradients are enabled."""
        self._values = {
            each.name: each.value().to(each.weight.dtype) for each in self.trained if each.name not in self._beside
        }
        outputs = self.run(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        return fx.map_arg(args, lambda a: self._weight(str(a.target)) if a.op == "get_attr" else self.env[a])

    def _weight(self, name: str) -> Tensor:
        return self._values[name] if name in self._values else self.weights[name]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is LINEAR and (product := self._product(n)):
            return result + product.beside(self._held(n.args[0]))
        rounded = _rounds(n)
        if rounded is not None:  # gradients pass as if it were not rounded
            exact = self._held(rounded)
            return exact + (result - exact).detach()
        return result

    def _product(self, linear: fx.Node) -> Product | None:
        weight = linear.args[1]
        return self._beside.get(str(weight.target)) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None

    def _held(self, node: Any) -> Tensor:
        value: Tensor = self.env[node]
        return value


def _rounds(node: fx.Node) -> fx.Node | None:
    """What ``node`` gives back rounded: x of dequantize(quantize(x))."""
    if node.target is not DEQUANTIZE:
        return None
    numbers = node.args[0]
    if not isinstance(numbers, fx.Node) or numbers.target is not _QUANTIZE:
        return None
    x = numbers.args[0]
    return x if isinstance(x, fx.Node) and x.op != "get_attr" else None


def teacher_of(ctx: Context, program: Program) -> Streaming:
    """The Program as it was lifted, with its weights in memory: they are read at every step."""
    original: Program = (ctx.original or program).copy()
    original.weights.materialise()
    return Streaming(original)
