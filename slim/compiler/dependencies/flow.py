"""Which index of which weight each index of each value is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx

from slim.compiler.dependencies.slots import Slots
from slim.compiler.program import Program

Axes = tuple[Tensor | None, ...]
By = Literal["kv", "query"]  # an attention loses kv heads with their queries, or one query head of each kv head


class Flow:
    """The slots of every value of a Program.

    Attributes:
        axes: of each value, or of each part of one that has several.
        ids: of integer values that say which: the slots of the dimension that they pick from.
        numbers: of weights that are such values: the same.
        bent: slots that something nonlinear lies behind. heads, experts: slots of heads, and of experts.
    """

    def __init__(self, program: Program, by: By) -> None:
        self.program, self.by = program, by
        self.slots = Slots()
        self.axes: dict[fx.Node, Axes | tuple[Axes, ...]] = {}
        self.ids: dict[fx.Node, Tensor] = {}
        self.numbers: dict[fx.Node, Tensor] = {}
        self.bent: list[Tensor] = []
        self.heads: list[Tensor] = []
        self.experts: list[Tensor] = []
        self._competing: list[Tensor] = []

    # -- reading and writing, for rules --------------------------------------------------------------------------------

    def of(self, value: object) -> Axes:
        """The axes of one argument: none where it is no tensor."""
        if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], Tensor):
            return ()
        found = self.axes[value]
        return found  # type: ignore[return-value]

    def weight(self, node: fx.Node) -> Axes:
        """Fresh slots for every dimension of a weight of more than one index."""
        return tuple(self.slots.fresh(size) if size > 1 else None for size in map(int, node.meta["val"].shape))

    def tie(self, a: Tensor | None, b: Tensor | None, reason: str) -> None:
        """Ties two dimensions of one size; where one cannot be cut, the other stays too."""
        if a is not None and b is not None:
            self.slots.tie(a, b)
        else:
            self.fix(a, reason)
            self.fix(b, reason)

    def fix(self, axis: Tensor | None, reason: str) -> None:
        if axis is not None:
            self.slots.fix(axis, reason)

    def fix_all(self, value: object, reason: str) -> None:
        """Whatever can be cut of ``value`` stays."""
        if not isinstance(value, fx.Node):
            return
        found: Any = self.axes.get(value, ())
        for axis in flat(found):
            self.fix(axis, reason)
        self.fix(self.ids.get(value), reason)

    def compete(self, axis: Tensor | None) -> None:
        """Indices along ``axis`` are weighed against each other, which only a choice among them may do."""
        if axis is not None:
            self._competing.append(axis)

    # -- walking -------------------------------------------------------------------------------------------------------

    def walk(self, rules: Rules) -> None:
        """Goes through all nodes, in order."""
        for node in self.program.graph.nodes:
            self._visit(node, rules)
        self._settle_choices()

    def _visit(self, node: fx.Node, rules: Rules) -> None:
        if node.op == "get_attr":
            self.axes[node] = self.weight(node)
        elif node.op == "output":
            for value in node.all_input_nodes:
                self.fix_all(value, "it is a result of the model")
        elif node.op == "placeholder" or not any(self._carries(value) for value in node.all_input_nodes):
            self.axes[node] = nothing(node.meta["val"])
        else:
            self.axes[node] = self._applied(node, rules(node))

    def _carries(self, value: fx.Node) -> bool:
        return value in self.ids or any(axis is not None for axis in flat(self.axes[value]))

    def _applied(self, node: fx.Node, rule: Rule | None) -> Axes | tuple[Axes, ...]:
        if rule is None:
            for value in node.all_input_nodes:
                self.fix_all(value, f"it goes to {node.target}")
            return nothing(node.meta["val"])
        return rule(node, self)

    def _settle_choices(self) -> None:
        """Where indices compete and nothing chooses among them, they stay."""
        root = self.slots.components()
        chosen = {int(slot) for axis in self.experts for slot in root[axis]}
        for axis in self._competing:
            left = [int(slot) for slot in axis if int(root[slot]) not in chosen]
            self.fix(torch.tensor(left, dtype=torch.long), "a softmax weighs it against the others")


def flat(axes: Any) -> list[Tensor]:
    if axes is None:
        return []
    return [axes] if isinstance(axes, Tensor) else [axis for part in axes for axis in flat(part)]


def nothing(value: Any) -> Any:
    """Axes of a value none of whose indices can be taken out."""
    if isinstance(value, Tensor):
        return (None,) * value.dim()
    return tuple(nothing(part) for part in value) if isinstance(value, (tuple, list)) else ()


def shape_of(node: object) -> tuple[Any, ...]:
    assert isinstance(node, fx.Node)
    return tuple(node.meta["val"].shape)


Rule = Callable[[fx.Node, Flow], Axes | tuple[Axes, ...]]
Rules = Callable[[fx.Node], Rule | None]
