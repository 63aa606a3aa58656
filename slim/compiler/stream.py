"""What a linear's result is added to: the residual stream, which is not what it was once layers before are pruned."""

from __future__ import annotations

import torch
from torch import fx

from slim.compiler.raising.cleanup import RESHAPES
from slim.compiler.uses import LINEAR

_ADD = torch.ops.aten.add.Tensor


def beside(linear: fx.Node) -> list[fx.Node]:
    """The values that the result of ``linear`` is added to and that are known before its rows are, in order.

    In a block of two residual sums it is the stream; behind a norm or a factor there is none.
    """
    if linear.target is not LINEAR:
        return []
    place = {node: index for index, node in enumerate(linear.graph.nodes)}
    value, found = linear, list[fx.Node]()
    while len(value.users) == 1:
        (user,) = value.users
        if user.target in RESHAPES:
            value = user
            continue
        if user.target is not _ADD or len(user.args) != 2 or user.kwargs:
            break
        others = [n for n in user.all_input_nodes if n is not value]
        found += [other for other in others if place[other] < place[linear.args[0]] and _is_like(other, user, linear)]
        value = user
    return found


def _is_like(value: fx.Node, total: fx.Node, linear: fx.Node) -> bool:
    """Whether a value has a row for each row of the linear's result, and neither is spread."""
    shape = value.meta["val"].shape
    return (
        value.op == "call_function" and shape == total.meta["val"].shape and shape[-1] == linear.meta["val"].shape[-1]
    )
