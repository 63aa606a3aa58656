"""What divides a value's channels: the gain and shift of a norm, or the rows and bias of a linear."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.rules import argument
from slim.compiler.scaling.scaled import scale_weight
from slim.compiler.uses import EXPERTS, LINEAR

slim = torch.ops.slim

NORMS = (slim.rms_norm.default, slim.layer_norm.default)
LINEARS = (LINEAR, EXPERTS)


class Absorber(Protocol):
    """Divides the channels of what a node computes."""

    @property
    def node(self) -> fx.Node: ...
    @property
    def name(self) -> str: ...
    def weights(self) -> list[fx.Node]:
        """The weights that it changes."""
        ...

    def divide(self, program: Program, by: Tensor) -> Tensor:
        """Divides channel j by ``by[j]``, float32 and positive; returns by what it was divided, after rounding."""
        ...


def absorber(node: fx.Node) -> Absorber | None:
    """What can divide the channels of ``node``'s result; None where nothing can."""
    if node.target in NORMS:
        return NormAbsorber(node)
    return LinearAbsorber(node) if node.target in LINEARS else None


class LinearAbsorber:
    """y = W x + b: divides rows of W and b. All experts are divided alike."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @property
    def name(self) -> str:
        return _weight_name(self.node.args[1], self.node)

    def weights(self) -> list[fx.Node]:
        return [value for value in (self.node.args[1], argument(self.node, "bias")) if isinstance(value, fx.Node)]

    def divide(self, program: Program, by: Tensor) -> Tensor:
        matrix, *bias = self.weights()
        scale_weight(program, str(matrix.target), rows=1 / by)
        for held in bias:
            scale_weight(program, str(held.target), columns=1 / by)
        return by


class NormAbsorber:
    """n(x) (w + offset) + b: divides the gain and b. A norm without a gain gets one.

    What the gain is rounded to says by what channels were divided, so that its rounding changes nothing: a gain of
    ``1 + w`` that is divided by 1000 is stored near -1, where bfloat16 has no digits left for it.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @property
    def name(self) -> str:
        held = self.weights()
        return _weight_name(held[0], self.node) if held else self.node.meta.get("module") or self.node.name

    def weights(self) -> list[fx.Node]:
        names = ("weight", "bias") if self.node.target is slim.layer_norm.default else ("weight",)
        return [value for name in names if isinstance(value := argument(self.node, name), fx.Node)]

    def divide(self, program: Program, by: Tensor) -> Tensor:
        gain = argument(self.node, "weight")
        name = str(gain.target) if isinstance(gain, fx.Node) else self._new_gain(program)
        by = self._divide_gain(program, name, by)
        shift = argument(self.node, "bias") if self.node.target is slim.layer_norm.default else None
        if isinstance(shift, fx.Node):
            scale_weight(program, str(shift.target), columns=1 / by)
        return by

    def _divide_gain(self, program: Program, name: str, by: Tensor) -> Tensor:
        held = program.weights[name]
        offset = float(argument(self.node, "offset") or 0.0)
        before = self._effective(held, offset)
        stored = (before / by.to(held.device) - offset).to(held.dtype)
        after = self._effective(stored, offset)
        program.weights[name] = torch.where(_usable(before, after), stored, held)
        ratio = torch.where(_usable(before, after), before / after, 1.0).to(by.device)
        return torch.where((before == 0).to(by.device), by, ratio)  # a dead gain leaves the shift, which takes any

    def _effective(self, weight: Tensor, offset: float) -> Tensor:
        """The gain as the norm computes it, in float32."""
        wide = bool(self.node.kwargs.get("gain_in_float")) or not offset
        return weight.float() + offset if wide else (weight + offset).float()

    def _new_gain(self, program: Program) -> str:
        """A gain of ones; where ``fold_norms`` took one off this norm, it comes back under its name."""
        facts, node = program.facts, self.node
        name = f"{node.meta.get('module') or node.name}.weight"
        if name in facts.retired:
            offset = 1.0 - facts.retired.pop(name)
        else:
            taken = set(program.weights) | facts.retired.keys()
            name = next(other for other in _numbered(name) if other not in taken)
            facts.added.append(name)
            offset = 0.0
        value = node.meta["val"]
        program.weights[name] = torch.full((int(value.shape[-1]),), 1.0 - offset, dtype=value.dtype)
        node.args = (node.args[0], program.weight_node(name), *node.args[2:])
        extra: dict[str, Any] = {"offset": offset} if offset else {}
        node.kwargs = {**{key: kept for key, kept in node.kwargs.items() if key not in ("weight", "offset")}, **extra}
        return name


def _usable(before: Tensor, after: Tensor) -> Tensor:
    """Where a gain is still what it was but for a factor."""
    ratio = before / after
    return (before != 0) & ratio.isfinite() & (ratio > 0)


def _numbered(name: str) -> Any:
    yield name
    number = 1
    while True:
        yield f"{name}_{number}"
        number += 1


def _weight_name(value: object, node: fx.Node) -> str:
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else node.name
