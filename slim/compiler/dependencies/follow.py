"""Follows what indices of weights become as values are computed: which index of a result is which of an argument.

Each dimension of a value has the slots of its indices, or None where none of them can be taken out. A rule says what
an operation makes of its arguments' dimensions. Taking a slot out everywhere must leave a graph that computes what
the old one does where the readers' columns of that slot are zero: an operation that mixes indices along a dimension
(a norm, a softmax, a sum) therefore fixes it, and one without a rule fixes all that comes to it.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from slim.compiler.dependencies.flow import By, Flow, Rule
from slim.compiler.dependencies.mixing import MIXING
from slim.compiler.dependencies.moving import COPIES, MOVING, is_pointwise, pointwise
from slim.compiler.program import Program

aten, slim = torch.ops.aten, torch.ops.slim

RULES = MOVING | MIXING
# Where numbers that say which may go: unchanged, or to pick by them.
_TAKE_NUMBERS = frozenset({
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int,
    aten.t.default, aten.unsqueeze.default, aten.slice.Tensor, aten.gather.default, operator.getitem,
    slim.expert_linear.default, *COPIES,
})  # fmt: skip


def follow(program: Program, by: By) -> Flow:
    """The slots of every value of ``program``."""
    flow: Flow

    def rule(node: fx.Node) -> Rule | None:
        if node.target not in _TAKE_NUMBERS and any(value in flow.ids for value in node.all_input_nodes):
            return None
        return RULES.get(node.target) or (pointwise if is_pointwise(node.target) else None)

    flow = Flow(program, by)
    flow.walk(rule)
    return flow
